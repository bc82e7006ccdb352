"""Conditional Deep Learning: which stages are admitted, and when an image stops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import DOOR, refusal, tiny_network

from early_exit import cdl
from early_exit.checkpoint import load
from early_exit.choosing import Goal, choose
from early_exit.config import Config, build
from early_exit.cost import Cost
from early_exit.experiment import plan_phases
from early_exit.policy import Policy
from early_exit.records import Scores
from early_exit.training import default_run_dir, train

COST = Cost(("a", "b", "final"), (20, 30, 50), (4, 5, 0), 0, (0, 0, 0))


def scores(*columns) -> Scores:
    """Images by the confidence of two early exits."""
    early = np.array(columns, np.float32).T
    count = len(early)
    return Scores(
        np.hstack([early, np.ones((count, 1), np.float32)]), np.zeros((count, 3), np.int64),
        np.zeros(count, np.int64),
    )


class TestAdmission:
    FIVE = scores((0.9, 0.8, 0.6, 0.6, 0.6), (0.9, 0.9, 0.9, 0.95, 0.7))

    def test_gains_worked_out_by_hand(self):
        first, second = cdl.admit(self.FIVE, COST, delta=0.8, epsilon=0.0)
        # the first stops 2 of 5, each spared 80, and asks all 5 at 4 each
        assert (first.reached, first.stopped) == (1.0, 0.4)
        assert (first.saved, first.spent, first.gain) == pytest.approx((32, 4, 28))
        # 3 go on; of those the second stops 2, each spared 50, and asks 3 at 5 each
        assert (second.reached, second.stopped) == pytest.approx((0.6, 0.4))
        assert (second.saved, second.spent, second.gain) == pytest.approx((20, 3, 17))
        assert first.admitted and second.admitted

    def test_a_gain_that_does_not_exceed_epsilon_is_not_enough(self):
        first, second = cdl.admit(self.FIVE, COST, delta=0.8, epsilon=0.2)
        assert first.admitted and not second.admitted

    def test_a_stage_that_is_not_admitted_stops_nobody(self):
        first, second = cdl.admit(self.FIVE, COST, delta=0.8, epsilon=0.3)
        assert not first.admitted
        assert second.reached == 1.0
        assert second.stopped == 0.8  # those that the first would have stopped too
        assert second.saved == pytest.approx(40) and second.spent == 5

    def test_a_classifier_that_costs_more_than_it_saves_is_out(self):
        dear = Cost(("a", "b", "final"), (20, 30, 50), (33, 5, 0), 0, (0, 0, 0))
        assert cdl.enabled(cdl.admit(self.FIVE, dear, 0.8, 0.0)) == (False, True)

    @pytest.mark.parametrize("delta", [0.49, 1.0, float("nan")])
    def test_delta_is_a_probability_of_at_least_a_half(self, delta):
        said = refusal(cdl.admit, self.FIVE, COST, delta, 0.0)
        assert "delta" in said and f"{delta:g}" in said.split()

    @given(st.integers(0, 10**6), st.floats(0.5, 0.99), st.sampled_from([0.0, 0.05]))
    def test_equals_asking_image_by_image(self, seed, delta, epsilon):
        rng = np.random.default_rng(seed)
        scored = scores(*rng.uniform(0.2, 1, (2, 12)))
        admitted, left = [], list(range(12))
        for index, rest in ((0, 80), (1, 50)):
            stopped = [row for row in left if scored.scores[row, index] >= delta]
            gain = (len(stopped) * rest - len(left) * COST.head_macs[index]) / 12
            admitted.append(gain > epsilon * 100)
            if admitted[-1]:
                left = [row for row in left if row not in stopped]
        assert cdl.enabled(cdl.admit(scored, COST, delta, epsilon)) == tuple(admitted)


@given(st.integers(0, 10**6), st.floats(0.5, 0.999))
def test_a_policy_stops_where_exactly_one_class_exceeds_delta(seed, delta):
    logits = 3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))
    policy = Policy(exit_names=("a", "final"), thresholds=(delta,))
    _, score, _ = policy.score(0, logits)
    literally = (logits.softmax(dim=-1) > delta).sum(dim=-1) == 1
    assert torch.equal(policy.leaves(0, score), literally)


class TestGoal:
    @pytest.mark.parametrize(("head", "second"), [(1, True), (2000, False)])
    def test_the_policy_is_what_admission_says(self, stored, make_record, head, second):
        """The first exit is never so sure; the second is, and may cost more than all the rest."""
        logits = stored.logits[:500].copy()
        logits[:, 0] = 0
        val = make_record(logits, stored.targets[:500])
        cost = Cost(val.info.exit_names, (10, 10, 10, 1000), (1, head, 1, 0), 0, (0,) * 4)
        policy = choose(val, Goal(delta=0.6, calibrate=False), cost)
        assert policy.thresholds == (0.6,) * 3
        assert policy.temperatures == (1.0,) * 4
        assert policy.criterion == "max_prob"
        assert policy.enabled == (False, second, True)

    def test_delta_is_a_knob_of_the_stored_policy(self, tmp_path):
        policy = Policy(exit_names=("a", "b", "final"), thresholds=(0.9, 0.9),
                        enabled=(True, False))
        policy.save(tmp_path / "policy.yaml")
        turned = Policy.load(tmp_path / "policy.yaml").shared(0.7)
        assert turned.thresholds == (0.7, 0.7) and turned.enabled == (True, False)

    @pytest.mark.parametrize(("options", "said"), [
        ({"delta": 0.4}, ["--delta", "0.4"]),
        ({"delta": 0.9, "criterion": "entropy"}, ["--delta", "--criterion", "entropy"]),
        ({"delta": 0.9, "epsilon": -0.1}, ["--epsilon", "-10"]),
        ({"delta": 0.9, "epsilon": float("nan")}, ["--epsilon", "nan"]),
        ({"delta": 0.9, "per_exit": True}, ["--delta", "--per-exit"]),
        ({"delta": 0.9, "budget": 0.5}, ["--delta", "--budget"]),
    ])
    def test_mistakes_are_named(self, options, said):
        message = refusal(Goal, **options)
        assert all(part in message for part in said)


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


def test_a_run_of_many_exits_has_a_name_that_a_file_system_takes(tmp_path):
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(18)]
    found = default_run_dir(tmp_path, configured(), [*names, "final"])
    assert found.name == "digits-resnet32-54exits-cdl-seed0"


class TestTraining:
    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, tmp_path_factory):
        """What is learned at once, and by one head at a time."""
        root = tmp_path_factory.mktemp("cdl")
        found = {}
        for name, weights in (("both", None), ("first", [1, 0, 0]), ("second", [0, 1, 0])):
            config = configured(loss={"weights": weights})
            found[name] = load(train(config, DOOR, runs=root, run_dir=root / name))["network"]
        return found

    def test_at_once_is_one_stage_after_the_other(self, weights):
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
        said = refusal(plan_phases, config, network.num_exits)
        assert "linear" in said and "conv" in said
