"""Lookahead in the trainer: what a phase reports and starts from, resuming, and what is refused."""

import dataclasses

import pytest
import torch
from helpers import (
    TASK,
    ask_to_stop,
    assert_names,
    assert_same_run,
    at_batch,
    mixed_config,
    refusal,
    resume_run,
    slowly,
    tensors,
)

from early_exit.system import signals
from early_exit.trained import load_network
from early_exit.training import checkpoint


def lookahead(every=2, **run):
    """`mixed_config` with Lookahead: one epoch of the backbone, two of everything, each of three
    steps."""
    config = mixed_config(**run)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lookahead=every))


@pytest.fixture(scope="module")
def whole_lookahead(tmp_path_factory):
    """A run of `lookahead`, never stopped."""
    return resume_run(tmp_path_factory.mktemp("lookahead") / "run", lookahead())


# 3: at the end of a phase whose last step is no update; 7: between updates, within an epoch; 2: as
# 3, before the validation; 6: after an update, within an epoch
@pytest.mark.parametrize("batch", [3, 7, *slowly(2, 6)])
def test_it_resumes_to_the_last_bit(monkeypatch, whole_lookahead, tmp_path, batch):
    at_batch(monkeypatch, batch, ask_to_stop)
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", lookahead())
    resume_run(tmp_path / "run", lookahead())
    assert_same_run(tmp_path / "run", whole_lookahead)
    ours, theirs = (
        tensors(checkpoint.load(run)["average"]) for run in (tmp_path / "run", whole_lookahead)
    )
    assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_slow_weights_are_reported(whole_lookahead):
    state = checkpoint.load(whole_lookahead)
    assert state["averaged"] == 6  # steps of the phase; the last is an update
    loaded = load_network(whole_lookahead, TASK, {"run": {"device": "cpu"}})
    assert "slow weights" in loaded.weights and "running average" not in loaded.weights
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, state["average"][name]), name


def test_a_phase_starts_from_the_slow_weights_of_the_one_before(monkeypatch, tmp_path):
    """The backbone's phase has three steps, so its last is not in them; the rate of the next phase
    is 0 here, so its steps leave the weights where they are."""
    config = lookahead()
    monkeypatch.setattr(
        "early_exit.training.epochs.lr_at", lambda optim, _: 0.1 * (optim.lr == 0.5)
    )
    config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=1.0, weight_decay=0.0),
        backbone_phase=dataclasses.replace(config.backbone_phase, lr=0.5),
    )
    at_batch(monkeypatch, 3, ask_to_stop)
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", config)
    before = checkpoint.load(tmp_path / "run")
    at_batch(monkeypatch, 2, ask_to_stop)
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", config)
    after = checkpoint.load(tmp_path / "run")
    assert after["position"]["phase"] == 1
    name = "backbone.conv1.weight"
    assert not torch.equal(before["network"][name], before["average"][name])
    assert torch.equal(after["network"][name], before["average"][name])


def test_a_frozen_backbone_is_left_as_it_is(whole_lookahead, tmp_path):
    config = lookahead(regime="frozen")
    model = dataclasses.replace(config.model, backbone=str(whole_lookahead))
    resume_run(tmp_path / "run", dataclasses.replace(config, model=model))
    given = checkpoint.reported(checkpoint.load(whole_lookahead))
    state = checkpoint.load(tmp_path / "run")
    for weights in (state["network"], state["average"]):
        for name, value in weights.items():
            if name.startswith("backbone."):
                assert torch.equal(value, given[name]), name


def test_a_phase_without_an_update_is_refused(tmp_path):
    message = refusal(resume_run, tmp_path / "run", lookahead(4))
    assert_names(message, "optim.lookahead", 4, "backbone", 3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"lookahead": 3}, {"lookahead_decay": 0.9}])
def test_another_lookahead_is_refused_on_resume(tmp_path, monkeypatch, changes):
    at_batch(monkeypatch, 2, ask_to_stop)
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", lookahead())
    config = lookahead()
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))
    message = refusal(resume_run, tmp_path / "run", changed, TASK)
    ((name, value),) = changes.items()
    assert_names(message, f"optim.{name}", getattr(config.optim, name), value)
