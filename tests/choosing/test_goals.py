"""Goals: what they refuse, and what they are called."""

import math

import numpy as np
import pytest
from helpers import assert_names, refusal

from early_exit.choosing.choice import (
    choose,
)
from early_exit.choosing.goals import (
    Budget,
    ConditionalDeepLearning,
    FixedPolicy,
    FixedThresholds,
    Goal,
    LatencyBudget,
    MaxDrop,
    Risk,
    check_given,
    timed_batch,
)
from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA
from early_exit.inference.policy import NEVER, Policy
from early_exit.model.cost import Cost

COST = Cost(("stem", "layer1", "layer2", "final"), (10, 30, 30, 30), (1, 12, 1, 0), 0, (0,) * 4)
NAMES = ("a", "b", "c", "final")


@pytest.fixture(scope="module")
def val(stored):
    """A thousand of the stored images."""
    return stored.subset(np.arange(1000), "val", "a thousand")


class TestRefusals:
    @pytest.mark.parametrize(
        ("goal", "values", "named"),
        [
            (MaxDrop, {"drop": -0.01}, ["--max-drop", "-1"]),
            (MaxDrop, {"drop": 1.5}, ["--max-drop", "150"]),
            (MaxDrop, {"drop": math.nan}, ["--max-drop", "nan"]),
            (MaxDrop, {"drop": 0.1, "minimise": "joules"}, ["--minimise", "'joules'", "seconds"]),
            (MaxDrop, {"drop": 0.1, "batch_size": 0}, ["--latency-batch", "0"]),
            (Budget, {"share": 0.0}, ["--budget", "0"]),
            (Budget, {"share": -0.5}, ["--budget", "-50"]),
            (Budget, {"share": math.nan}, ["--budget", "nan"]),
            (LatencyBudget, {"limit": math.nan}, ["--latency-budget", "nan"]),
            (LatencyBudget, {"limit": 0.0}, ["--latency-budget", "0"]),
            (LatencyBudget, {"limit": math.inf}, ["--latency-budget", "inf"]),
            (LatencyBudget, {"limit": 0.1, "batch_size": 0}, ["--latency-batch", "0"]),
            (Risk, {"risk": 0.0}, ["--risk", "0"]),
            (Risk, {"risk": 1.0}, ["--risk", "100"]),
            (Risk, {"risk": 0.1, "confidence": 1.0}, ["--confidence", "100"]),
            (Risk, {"risk": 0.1, "loss": "late"}, ["'late'", "wrong", "differs"]),
            (MaxDrop, {"drop": 0.1, "criterion": "oracle"}, ["'oracle'", "max_prob"]),
        ],
    )
    def test_values_out_of_range_are_named(self, goal, values, named):
        message = refusal(goal, **values)
        assert all(part in message for part in named)

    @pytest.mark.parametrize(
        ("criterion", "threshold", "highest"),
        [("max_prob", 1.01, 1), ("margin", 1.5, 1), ("entropy", 0.4, 0)],
    )
    def test_a_threshold_above_every_score_is_refused(self, criterion, threshold, highest):
        for thresholds in ((threshold,), (highest, threshold)):
            message = refusal(FixedThresholds, thresholds, criterion=criterion)
            assert_names(message, "--thresholds", threshold, criterion, highest)

    @pytest.mark.parametrize(
        ("criterion", "thresholds"),
        [
            ("max_prob", (1.0, 0.01)),
            ("entropy", (-0.4,)),
            ("patience", (3.0, 100.0)),
            ("max_prob", (NEVER,)),  # no image exits
        ],
    )
    def test_every_other_threshold_is_accepted(self, criterion, thresholds):
        assert FixedThresholds(thresholds, criterion=criterion).thresholds == thresholds

    @pytest.mark.parametrize(
        ("criterion", "threshold"), [("max_prob", -0.3), ("margin", -1), ("patience", -1)]
    )
    def test_a_threshold_below_every_score_is_refused(self, criterion, threshold):
        message = refusal(FixedThresholds, (0.5, threshold), criterion=criterion)
        assert_names(message, "--thresholds", threshold, criterion)

    def test_minus_infinity_is_refused(self):
        assert "infinity" in refusal(FixedThresholds, (0.5, -math.inf))

    @pytest.mark.parametrize(
        ("criterion", "threshold", "meant"),
        [("max_prob", 90, "0.9"), ("margin", 50, "0.5"), ("entropy", 0.4, "-0.4")],
    )
    def test_what_was_probably_meant_is_named(self, criterion, threshold, meant):
        message = refusal(FixedThresholds, (threshold,), criterion=criterion)
        assert_names(message, f"--thresholds={meant}")

    @pytest.mark.parametrize(
        ("criterion", "threshold"),
        [
            ("max_prob", 0.0),
            ("max_prob", 0.25),
            ("entropy", -math.log(4)),
            ("entropy", -5.0),
            ("margin", 0.0),
            ("patience", 0.0),
            ("patience", 3.0),  # the third early exit has counted two agreements at most
            ("max_prob", math.nan),
        ],
    )
    def test_what_every_score_or_none_reaches_in_four_classes(self, criterion, threshold):
        with pytest.raises(UserError, match=criterion):
            check_given(FixedThresholds((threshold,), criterion=criterion), 4, NAMES)

    @pytest.mark.parametrize(
        ("criterion", "threshold"),
        [
            ("max_prob", 0.26),
            ("max_prob", 1.0),
            ("entropy", -1.38),
            ("entropy", 0.0),
            ("margin", 1e-6),
            ("margin", 1.0),
            ("patience", 2.0),
            ("patience", 0.5),
            ("margin", NEVER),
        ],
    )
    def test_what_some_scores_reach_in_four_classes(self, criterion, threshold):
        check_given(FixedThresholds((threshold,), criterion=criterion), 4, NAMES)

    @pytest.mark.parametrize("threshold", [90.0, 1.5, 0.2, -0.5, -math.inf])
    def test_a_given_policys_thresholds_are_checked_too(self, threshold):
        policy = Policy(exit_names=("a", "b", "final"), thresholds=(0.5, threshold))
        with pytest.raises(UserError, match=r"\bb\b"):
            check_given(FixedPolicy(policy), 4, policy.exit_names)

    @pytest.mark.parametrize(
        ("criterion", "threshold", "enabled"),
        [
            ("margin", 0.0, True),  # the lowest score on val
            ("max_prob", float(np.float32(1 / 7)), True),
            ("max_prob", NEVER, True),
            ("max_prob", 90.0, False),
        ],
    )
    def test_a_policy_that_was_chosen_on_val_can_be_given(self, criterion, threshold, enabled):
        policy = Policy(
            exit_names=("a", "final"),
            thresholds=(threshold,),
            criterion=criterion,
            enabled=(enabled,),
        )
        check_given(FixedPolicy(policy), 7, policy.exit_names)

    def test_a_criterion_that_needs_more_exits(self):
        message = refusal(check_given, MaxDrop(0.1, criterion="patience"), 4, ("one", "final"))
        assert_names(message, "patience", 2, 1)
        check_given(MaxDrop(0.1, criterion="patience"), 4, NAMES)

    def test_a_criterion_without_a_range_takes_any_number(self, monkeypatch):
        monkeypatch.setitem(CRITERIA, "mine", lambda logits, state: (logits, logits[:, 0], None))
        check_given(FixedThresholds((-90.0, 0.0, 90.0), criterion="mine"), 4, NAMES)

    def test_probabilities_in_percent(self):
        assert_names(refusal(ConditionalDeepLearning, 90), "--delta 0.9")
        assert_names(refusal(Risk, 0.01, confidence=0.0095), "--confidence", 95)

    @pytest.mark.parametrize("count", [2, 4])
    def test_another_number_of_thresholds_is_refused(self, val, count):
        message = refusal(choose, val, FixedThresholds((0.5,) * count), COST)
        assert_names(message, count, 3)

    def test_a_policy_of_other_exits_is_refused(self, val):
        policy = Policy(exit_names=("a", "final"), thresholds=(0.5,))
        message = refusal(choose, val, FixedPolicy(policy), COST)
        assert "a, final" in message and "stem, layer1, layer2, final" in message

    def test_a_goal_itself_chooses_nothing(self, val):
        with pytest.raises(TypeError, match="Goal"):
            choose(val, Goal(), COST)

    @pytest.mark.parametrize("goal", [LatencyBudget(0.5), MaxDrop(0.01, minimise="seconds")])
    def test_seconds_without_times_are_a_mistake_of_the_caller(self, val, goal):
        with pytest.raises(ValueError, match="times"):
            choose(val, goal, COST)


@pytest.mark.parametrize(
    ("goal", "name"),
    [
        (MaxDrop(0.005), "max drop 0.5 points"),
        (MaxDrop(0.005, minimise="seconds"), "max drop 0.5 points, seconds at batch 1"),
        (MaxDrop(0.01, batch_size=64), "max drop 1 points"),
        (Budget(0.6), "budget 60 % of MACs"),
        (LatencyBudget(0.003), "latency 3 ms at batch 1"),
        (
            LatencyBudget(0.6, of_plain=True, batch_size=2),
            "latency 60 % of the seconds at batch 2",
        ),
        (FixedThresholds((0.9, 0.75)), "thresholds 0.9 0.75"),
        (Risk(0.01), "risk 1 points wrong 95 %"),
        (Risk(0.01, confidence=None, loss="differs"), "risk 1 points differs average"),
    ],
)
def test_names_of_goals_stay(goal, name):
    """Directories of evaluations are named after them."""
    assert str(goal) == name


@pytest.mark.parametrize(
    ("goal", "batch_size"),
    [
        (MaxDrop(0.01), None),
        (MaxDrop(0.01, batch_size=64), None),
        (MaxDrop(0.01, minimise="seconds"), 1),
        (MaxDrop(0.01, minimise="seconds", batch_size=64), 64),
        (LatencyBudget(0.01, batch_size=8), 8),
        (Budget(0.5), None),
        (FixedThresholds((0.5,)), None),
    ],
)
def test_which_goals_count_seconds(goal, batch_size):
    assert timed_batch(goal) == batch_size
