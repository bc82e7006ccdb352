"""Conditional Deep Learning: which stages are admitted, and where images exit."""

import numpy as np
import pytest
import torch
from helpers import TASK, assert_names, refusal, tiny_network
from hypothesis import given
from hypothesis import strategies as st

from early_exit.choosing import cdl
from early_exit.choosing.choice import choose
from early_exit.choosing.goals import ConditionalDeepLearning
from early_exit.choosing.record import Scores
from early_exit.config import Config, build
from early_exit.inference.policy import Policy
from early_exit.model.cost import Cost
from early_exit.training.checkpoint import load
from early_exit.training.phases import plan_phases
from early_exit.training.train import default_run_dir, train

COST = Cost(("a", "b", "final"), (20, 30, 50), (4, 5, 0), 0, (0, 0, 0))


def scores(*columns) -> Scores:
    """Images by the confidence of two early exits."""
    early = np.array(columns, np.float32).T
    count = len(early)
    return Scores(
        np.hstack([early, np.ones((count, 1), np.float32)]),
        np.zeros((count, 3), np.int64),
        np.zeros(count, np.int64),
    )


class TestAdmission:
    FIVE = scores((0.9, 0.8, 0.6, 0.6, 0.6), (0.9, 0.9, 0.9, 0.95, 0.7))

    def test_gains_worked_out_by_hand(self):
        first, second = cdl.admit(self.FIVE, COST, delta=0.8, epsilon=0.0)
        # at the first 2 of 5 exit, each spared 80, and its head runs for all 5 at 4 each
        assert (first.reached, first.stopped) == (1.0, 0.4)
        assert (first.saved, first.spent, first.gain) == pytest.approx((32, 4, 28))
        # 3 remain; of those 2 exit at the second, each spared 50, and its head runs for 3 at 5 each
        assert (second.reached, second.stopped) == pytest.approx((0.6, 0.4))
        assert (second.saved, second.spent, second.gain) == pytest.approx((20, 3, 17))
        assert first.admitted and second.admitted

    def test_a_gain_that_does_not_exceed_epsilon_is_not_enough(self):
        first, second = cdl.admit(self.FIVE, COST, delta=0.8, epsilon=0.2)
        assert first.admitted and not second.admitted

    def test_no_image_exits_at_a_stage_that_is_not_admitted(self):
        first, second = cdl.admit(self.FIVE, COST, delta=0.8, epsilon=0.3)
        assert not first.admitted
        assert second.reached == 1.0
        assert second.stopped == 0.8  # with those that would have exited at the first
        assert second.saved == pytest.approx(40) and second.spent == 5

    def test_a_classifier_that_costs_more_than_it_saves_is_not_admitted(self):
        expensive = Cost(("a", "b", "final"), (20, 30, 50), (33, 5, 0), 0, (0, 0, 0))
        assert cdl.enabled(cdl.admit(self.FIVE, expensive, 0.8, 0.0)) == (False, True)

    @given(st.integers(0, 10**6), st.floats(0.5, 0.99), st.sampled_from([0.0, 0.05]))
    def test_equals_considering_image_by_image(self, seed, delta, epsilon):
        rng = np.random.default_rng(seed)
        scored = scores(*rng.uniform(0.2, 1, (2, 12)))
        admitted, remaining = [], list(range(12))
        for index, rest in ((0, 80), (1, 50)):
            exits = [row for row in remaining if scored.scores[row, index] >= delta]
            gain = (len(exits) * rest - len(remaining) * COST.head_macs[index]) / 12
            admitted.append(gain > epsilon * 100)
            if admitted[-1]:
                remaining = [row for row in remaining if row not in exits]
        assert cdl.enabled(cdl.admit(scored, COST, delta, epsilon)) == tuple(admitted)


@given(st.integers(0, 10**6), st.floats(0.5, 0.999))
def test_an_image_exits_where_exactly_one_class_exceeds_delta(seed, delta):
    logits = 3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))
    policy = Policy(exit_names=("a", "final"), thresholds=(delta,))
    _, score, _ = policy.score(0, logits)
    literally = (logits.softmax(dim=-1) > delta).sum(dim=-1) == 1
    assert torch.equal(policy.exits(0, score), literally)


class TestGoal:
    @pytest.mark.parametrize(("head", "second"), [(1, True), (2000, False)])
    def test_the_policy_enables_the_admitted_stages(self, stored, make_record, head, second):
        """No image reaches delta at the first exit; the second may cost more than it saves."""
        logits = stored.logits[:500].copy()
        logits[:, 0] = 0
        val = make_record(logits, stored.targets[:500])
        cost = Cost(val.info.exit_names, (10, 10, 10, 1000), (1, head, 1, 0), 0, (0,) * 4)
        policy = choose(val, ConditionalDeepLearning(0.6), cost)
        assert policy.thresholds == (0.6,) * 3
        assert policy.temperatures == (1.0,) * 4
        assert policy.criterion == "max_prob"
        assert policy.enabled == (False, second, True)

    def test_another_delta_for_the_stored_policy(self, tmp_path):
        policy = Policy(
            exit_names=("a", "b", "final"), thresholds=(0.9, 0.9), enabled=(True, False)
        )
        policy.save(tmp_path / "policy.yaml")
        changed = Policy.load(tmp_path / "policy.yaml").with_threshold(0.7)
        assert changed.thresholds == (0.7, 0.7) and changed.enabled == (True, False)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"delta": 0.4}, ["--delta", "0.4"]),
            ({"delta": 0.49}, ["--delta", "0.49"]),
            ({"delta": 1.0}, ["--delta", "1"]),
            ({"delta": float("nan")}, ["--delta", "nan"]),
            ({"delta": 0.9, "criterion": "entropy"}, ["--delta", "--criterion", "entropy"]),
            ({"delta": 0.9, "epsilon": -0.1}, ["--epsilon", "-10"]),
            ({"delta": 0.9, "epsilon": float("nan")}, ["--epsilon", "nan"]),
        ],
    )
    def test_mistakes_are_named(self, options, named):
        assert_names(refusal(ConditionalDeepLearning, **options), *named)


def configured(**over) -> Config:
    """A training of linear heads alone, on a tiny network and few digits."""
    values = {
        "data": {"dataset": "digits"},
        "model": {"head": "linear", "exits": ["layer1", "layer2"]},
        "run": {"regime": "cdl", "device": "cpu", "amp": "off", "threads": 1},
        "optim": {"epochs": 2, "batch_size": 8, "lr": 0.05},
        "backbone_phase": {"epochs": 1},
    }
    return build(Config, {**values, **over})


def test_a_run_of_many_exits_has_a_short_name(tmp_path):
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(18)]
    found = default_run_dir(tmp_path, configured(), [*names, "final"])
    assert found.name == "digits-resnet32-54exits-cdl-seed0"
    some = configured(model={"exits": None, "head": "linear"})  # how many depends on the classes
    counts = {default_run_dir(tmp_path, some, [*names[:n], "final"]).name for n in (53, 54)}
    assert counts == {"digits-resnet32-default-exits-cdl-seed0"}
    (tmp_path / "digits-resnet32-54exits-cdl-seed0").mkdir()  # of an older version
    assert default_run_dir(tmp_path, some, [*names, "final"]).name == found.name


class TestTraining:
    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, tmp_path_factory):
        """The weights after training all heads at once, and one head at a time."""
        root = tmp_path_factory.mktemp("cdl")
        found = {}
        for name, weights in (("both", None), ("first", [1, 0, 0]), ("second", [0, 1, 0])):
            config = configured(loss={"weights": weights})
            found[name] = load(train(config, TASK, runs=root, run_dir=root / name))["network"]
        return found

    def test_at_once_equals_one_stage_after_the_other(self, weights):
        for stage, name in (("first", "heads.layer1."), ("second", "heads.layer2.")):
            parts = [key for key in weights["both"] if key.startswith(name)]
            assert any("linear.weight" in key for key in parts)
            for key in parts:
                assert torch.equal(weights["both"][key], weights[stage][key]), key

    def test_the_backbone_is_that_of_its_own_phase(self, weights):
        for key, value in weights["both"].items():
            if key.startswith("backbone."):
                assert torch.equal(value, weights["first"][key]), key

    def test_a_head_that_is_not_trained_differs(self, weights):
        key = "heads.layer2.linear.weight"
        assert not torch.equal(weights["both"][key], weights["first"][key])

    def test_other_heads_are_refused(self):
        config = configured(model={"head": "conv", "exits": ["layer1"]})
        network = tiny_network(config, 10)
        assert_names(refusal(plan_phases, config, network.num_exits), "linear", "conv")
