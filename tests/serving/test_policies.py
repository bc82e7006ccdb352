"""Which policy the engine uses."""

import asyncio
import dataclasses

import pytest
from fakes import FakeEngine, colour_model
from helpers import assert_names, refusal

from early_exit.inference.policy import Policy
from early_exit.serving import adapt
from early_exit.serving.policies import Policies

CURVE = [
    {"threshold": 0.9, "accuracy": 0.8, "macs_share": 0.8, "exit_shares": [0.5, 0.5]},
    {"threshold": 0.5, "accuracy": 0.79, "macs_share": 0.7, "exit_shares": [1.0, 0.0]},
]


@pytest.fixture
def engine():
    """An engine of a model that stores a curve of two thresholds."""
    model = colour_model()
    manifest = dataclasses.replace(
        model.manifest,
        val={"thresholds": [0.9], "temperatures": [1.0, 1.0], "accuracy": 0.8, "macs_share": 0.8},
        val_curve=CURVE,
    )
    return FakeEngine(dataclasses.replace(model, manifest=manifest))


def policies_of(engine: FakeEngine, directory, max_drop: float | None) -> Policies:
    """With a target of a second."""
    return Policies(engine, engine.model.manifest, directory, max_drop, 1.0)


def overload(policies: Policies, now: float) -> None:
    """100 rows arrive in the second before `now`, and 1.5 s of work wait: of half the rows two
    segments, 10 ms each."""
    policies.step(now - 1)
    policies.engine.arrived += 100
    policies.engine.waiting = 100
    policies.step(now)


def test_a_long_queue_makes_the_policy_cheaper_and_a_short_one_restores_it(
    engine, tmp_path, caplog
):
    caplog.set_level("INFO")
    policies = policies_of(engine, tmp_path, 0.02)
    overload(policies, 10.0)
    assert engine.policy.thresholds == (0.5,)
    engine.waiting = 0
    policies.step(12.0)
    assert engine.policy.thresholds == (0.5,)
    policies.step(12.0 + adapt.HOLD)
    assert engine.policy.thresholds == (0.9,)
    assert len(caplog.messages) == 2
    assert_names(caplog.messages[0], 1500, 50, 0.5)


def test_it_looks_at_the_load_by_itself(engine, tmp_path):
    """Rows arrive too fast for a target of 20 ms, until the policy has changed."""
    policies = Policies(engine, engine.model.manifest, tmp_path, 0.02, 0.02)

    async def run() -> None:
        task = asyncio.ensure_future(policies.adapt())
        async with asyncio.timeout(60):
            while engine.policy.thresholds == (0.9,):
                engine.arrived += 100
                engine.waiting = 100
                await asyncio.sleep(0.01)
        assert not task.done()  # and goes on
        task.cancel()

    asyncio.run(run())
    assert engine.policy.thresholds == (0.5,)


@pytest.mark.parametrize("max_drop", [None, 0.005])
def test_without_a_cheaper_policy_nothing_changes(engine, tmp_path, caplog, max_drop):
    overload(policies_of(engine, tmp_path, max_drop), 10.0)
    assert engine.policy.thresholds == (0.9,)
    if max_drop is None:
        assert caplog.messages == []
    else:
        assert_names("".join(caplog.messages), "--adapt has no effect", "--max-drop 0.5")


def test_a_target_that_is_too_short_to_look_within_is_refused(engine, tmp_path):
    message = refusal(Policies, engine, engine.model.manifest, tmp_path, 0.02, 0.019)
    assert_names(message, "--target-p99", 19, 20)


def test_a_model_without_a_curve_cannot_adapt(tmp_path):
    assert_names(refusal(policies_of, FakeEngine(colour_model()), tmp_path, 0.02), "val_curve")


def test_a_model_without_shares_cannot_adapt(engine, tmp_path):
    curve = [{**row, "exit_shares": None} for row in CURVE]
    engine.model = dataclasses.replace(
        engine.model, manifest=dataclasses.replace(engine.model.manifest, val_curve=curve)
    )
    assert_names(refusal(policies_of, engine, tmp_path, 0.02), "--adapt", "export")
    policies_of(engine, tmp_path, None)


def test_the_file_is_read_again_and_adapted_from(engine, tmp_path):
    policies = policies_of(engine, tmp_path, 0.02)
    overload(policies, 10.0)
    Policy(exit_names=engine.policy.exit_names, thresholds=(0.9,)).save(tmp_path / "policy.yaml")
    asyncio.run(policies.reload())
    assert engine.policy.thresholds == (0.9,)
    overload(policies, 20.0)
    assert engine.policy.thresholds == (0.5,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "exit_names: [layer1, final]\nthresholds: [7]\n",  # no score reaches it
        "exit_names: [layer1, final]\nthresholds: [0.7]\n",  # nothing of it is stored
    ],
)
def test_of_a_file_that_cannot_be_used_the_policy_before_stays(engine, tmp_path, caplog, text):
    (tmp_path / "policy.yaml").write_text(text)
    asyncio.run(policies_of(engine, tmp_path, 0.02).reload())
    assert engine.policy.thresholds == (0.9,)
    assert len(caplog.messages) == 1
