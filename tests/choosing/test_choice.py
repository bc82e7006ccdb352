"""The choice of a policy: that it is what the curve says, and the fastest in seconds."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from helpers import refusal

from early_exit.choosing.choice import (
    CURVE_POINTS,
    calibrated,
    choose,
    fit_and_certify,
    spans_to_time,
    thinned,
)
from early_exit.choosing.curve import for_budget, for_latency, for_max_drop, shared_curve
from early_exit.choosing.goals import (
    Budget,
    FixedPolicy,
    FixedThresholds,
    LatencyBudget,
    MaxDrop,
    Risk,
)
from early_exit.choosing.outcome import apply_policy
from early_exit.choosing.record import score_record
from early_exit.choosing.search import cheapest, exits_that_pay, most_accurate, shortlist
from early_exit.inference.criteria import CRITERIA, declare, max_prob
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segment_times import SegmentTimes, all_spans
from early_exit.model.cost import Cost

COST = Cost(("stem", "layer1", "layer2", "final"), (10, 30, 30, 30), (1, 12, 1, 0), 0, (0,) * 4)


def times_of(stages, heads, call=0.0, candidates=None):
    """Seconds of one image: of the stages of a segment, of the head it ends at, and of a call."""
    count = len(stages)
    pairs = all_spans(range(count - 1) if candidates is None else candidates, count)
    seconds = {
        (first, last): (call + sum(stages[first : last + 1]) + (*heads, 0)[last],)
        for first, last in pairs
    }
    return SegmentTimes(1, (1,), seconds, plain=sum(stages) + call)


TIMES = times_of((0.1, 0.2, 0.2, 0.2), (0.1, 0.1, 0.1))


@pytest.fixture(scope="module")
def val(stored):
    """A thousand of the stored images."""
    return stored.subset(np.arange(1000), "val", "a thousand")


class TestChoice:
    def scored(self, val, goal):
        return score_record(val, calibrated(val, goal))

    @pytest.mark.parametrize("criterion", ["max_prob", "entropy", "patience"])
    @pytest.mark.parametrize("drop", [0.0, 0.02])
    def test_max_drop(self, val, criterion, drop):
        goal = MaxDrop(drop, criterion=criterion)
        policy = choose(val, goal, COST)
        scored, enabled = self.scored(val, goal), (True,) * 3
        if criterion != "patience":
            needed = scored.correct[:, -1].mean() - drop
            enabled = exits_that_pay(scored, COST.mean_macs, cheapest(needed))
        assert policy.enabled == enabled
        threshold = for_max_drop(shared_curve(scored, enabled, COST.cumulative(enabled)), drop)
        assert policy.thresholds == (threshold,) * 3
        assert policy.temperatures == calibrated(val, goal).temperatures
        outcome = apply_policy(policy, val, COST)
        assert outcome.point.accuracy >= outcome.final_accuracy - drop - 1e-9

    def test_budget(self, val):
        policy = choose(val, Budget(0.7), COST)
        scored = self.scored(val, Budget(0.7))
        curve = shared_curve(scored, policy.enabled, COST.cumulative(policy.enabled))
        assert policy.thresholds == (for_budget(curve, 70),) * 3
        assert apply_policy(policy, val, COST).point.macs_share <= 0.7 + 1e-9

    @pytest.mark.parametrize("goal", [LatencyBudget(0.5), LatencyBudget(0.8, of_plain=True)])
    def test_latency_budget(self, val, goal):
        policy = choose(val, goal, COST, TIMES)
        curve = shared_curve(
            self.scored(val, goal), policy.enabled, COST.cumulative(policy.enabled)
        )
        limit = 0.5 if not goal.of_plain else 0.8 * 0.7
        seconds = TIMES.of(policy.enabled, curve.shares)
        assert policy.thresholds == (for_latency(curve, seconds, limit),) * 3
        shares = np.array([apply_policy(policy, val, COST).exit_shares])
        assert TIMES.of(policy.enabled, shares)[0] <= limit + 1e-9

    def test_thresholds_are_taken_as_given(self, val):
        assert choose(val, FixedThresholds((0.7,)), COST).thresholds == (0.7,) * 3
        given = (0.7, 0.8, 0.9)
        policy = choose(val, FixedThresholds(given), COST)
        assert policy.thresholds == given and policy.enabled == (True,) * 3

    def test_without_calibration_temperatures_are_one(self, val):
        assert choose(val, Budget(0.7, calibrate=False), COST).temperatures == (1.0,) * 4
        assert 1.0 not in choose(val, Budget(0.7), COST).temperatures

    def test_a_policy_is_taken_whole_without_its_guarantee(self, val):
        policy = Policy(
            exit_names=val.info.exit_names,
            thresholds=(-0.4, -1.5, NEVER),
            criterion="entropy",
            temperatures=(2.0, 1.5, 1.0, 1.0),
            enabled=(True, False, True),
            guarantee={"risk": 0.1},
        )
        assert choose(val, FixedPolicy(policy), COST) == dataclasses.replace(policy, guarantee=None)

    @pytest.mark.parametrize("confidence", [0.9, None])
    def test_a_risk_is_certified_on_other_images_than_the_fitted(self, val, confidence):
        fit, certify = fit_and_certify(val)
        assert len(fit) == 200 and sorted([*fit, *certify]) == list(range(1000))
        policy = choose(val, Risk(0.05, confidence=confidence), COST)
        assert (
            policy.temperatures == calibrated(val.subset(fit, "val", ""), Risk(0.05)).temperatures
        )
        guarantee = policy.guarantee
        assert (guarantee["images"], guarantee["risk"]) == (800, 0.05)
        outcome = apply_policy(policy, val.subset(certify, "val", ""), COST)
        lost = outcome.scored.correct[:, -1] & ~outcome.correct
        assert guarantee["losses"] == lost.sum() <= 0.05 * 800
        assert val.info.split_hash in guarantee["data"]


def test_a_thinned_curve_is_even_in_macs_and_has_both_ends(val):
    scored = score_record(val, calibrated(val, MaxDrop(0.0)))
    curve = shared_curve(scored, (True,) * 3, COST.cumulative())
    points = thinned(curve)
    assert len(points) <= CURVE_POINTS < len(curve.macs)
    assert (points[0], points[-1]) == (0, len(curve.macs) - 1)
    step = (curve.macs[0] - curve.macs[-1]) / (CURVE_POINTS - 1)
    # a point is at most half a step and half the gap between two outcomes from where it should be
    widest = np.diff(-curve.macs).max()
    assert np.diff(-curve.macs[points]).max() <= step + widest + 1e-9


def test_no_exit_is_disabled_under_a_criterion_that_needs_several(val, monkeypatch):
    needs_three = declare(min_early_exits=3)(lambda logits, state: max_prob(logits))
    monkeypatch.setitem(CRITERIA, "needs_three", needs_three)
    head_macs = (10**6, 10**6, 10**6, 0)  # no head pays
    expensive = dataclasses.replace(COST, head_macs=head_macs)
    assert not all(choose(val, MaxDrop(0.0), expensive).enabled)
    assert all(choose(val, MaxDrop(0.0, criterion="needs_three"), expensive).enabled)


def probability(score, answer=0):
    """Logits of two classes, of which `answer` gets this probability."""
    logits = [math.log(score), math.log(1 - score)]
    return logits if answer == 0 else logits[::-1]


FAST = MaxDrop(0.0, calibrate=False, minimise="seconds")


# Expected with both exits: a + 0.6 b + 0.3 c; with one of them a + 0.6 b or a + 0.3 b. With 10
# seconds a stage, 1 a head and h a call:
#   both 20.6 + 1.9 h; the first 23 + 1.6 h; the second 24 + 1.3 h; none 30 + h
BY_CALL = {call: times_of((10, 10, 10), (1, 1), call) for call in (0, 10, 30)}


class TestSeconds:
    """Ten images, all correct in the end. The first exit is sure of 4 of them and the second of 7,
    with a probability of 0.95; where they are not sure they are wrong."""

    COST = Cost(("exit0", "exit1", "final"), (10, 10, 10), (1, 1, 0), 0, (0,) * 3)

    @pytest.fixture(scope="class")
    @classmethod
    def ten(cls, make_record):
        sure, unsure = probability(0.95), probability(0.55, answer=1)
        return make_record(
            [
                [sure if image < 4 else unsure, sure if image < 7 else unsure, sure]
                for image in range(10)
            ],
            [0] * 10,
        )

    @pytest.mark.parametrize(
        ("call", "enabled", "seconds"),
        [
            (0, (True, True), 20.6),  # 23, 24 and 30
            (10, (False, True), 37.0),  # 39.6, 39 and 40
            (30, (False, False), 60.0),  # 77.6, 71 and 63
        ],
    )
    def test_the_fastest_exits_are_enabled(self, ten, call, enabled, seconds):
        times = BY_CALL[call]
        policy = choose(ten, FAST, self.COST, times)
        outcome = apply_policy(policy, ten, self.COST)
        assert policy.enabled == enabled
        assert outcome.point.accuracy == 1
        assert times.of(enabled, np.array([outcome.exit_shares])) == pytest.approx([seconds])

    @pytest.mark.parametrize("call", BY_CALL)
    def test_fewest_multiply_adds_are_another_choice(self, ten, call):
        """They know of no calls: both exits cost least, 20.6 of 30, whatever is fastest."""
        macs = dataclasses.replace(FAST, minimise="macs")
        assert choose(ten, macs, self.COST, BY_CALL[call]).enabled == (True, True)

    def test_seconds_alone_decide(self, ten):
        """Heads that cost more multiply-adds than the network, and no time."""
        expensive = dataclasses.replace(self.COST, head_macs=(100, 100, 0))
        assert choose(ten, FAST, expensive, BY_CALL[0]).enabled == (True, True)
        macs = dataclasses.replace(FAST, minimise="macs")
        assert choose(ten, macs, expensive).enabled == (False, False)

    def test_the_drop_is_spent_where_it_saves_seconds(self, ten):
        """With 60 % of wrong answers allowed all exit at once: a stage and its head."""
        policy = choose(ten, dataclasses.replace(FAST, drop=0.6), self.COST, BY_CALL[0])
        outcome = apply_policy(policy, ten, self.COST)
        assert outcome.exit_shares == (1, 0, 0)
        shares = np.array([outcome.exit_shares])
        assert BY_CALL[0].of(policy.enabled, shares) == pytest.approx([11])

    def test_an_exit_that_was_not_measured_is_never_enabled(self, ten):
        times = times_of((10, 10, 10), (1, 1), candidates=[1])
        assert choose(ten, FAST, self.COST, times).enabled == (False, True)
        none = times_of((10, 10, 10), (1, 1), candidates=[])
        assert choose(ten, FAST, self.COST, none).enabled == (False, False)
        budget = LatencyBudget(25, calibrate=False)
        assert choose(ten, budget, self.COST, times).enabled == (False, True)  # 24 seconds

    def test_a_latency_budget_counts_segments(self, ten):
        """Within 38 seconds only the second exit alone is correct for all; both take 39.6."""
        policy = choose(ten, LatencyBudget(38, calibrate=False), self.COST, BY_CALL[10])
        assert policy.enabled == (False, True)
        assert apply_policy(policy, ten, self.COST).point.accuracy == 1

    def test_a_budget_that_no_segment_meets_names_the_least(self, ten):
        message = refusal(choose, ten, LatencyBudget(0.5, calibrate=False), self.COST, BY_CALL[10])
        assert "21000.00 ms" in message  # exiting at once: 10 + 1 + 10 seconds

    @pytest.mark.parametrize("batch_size", [1, 10])
    def test_at_another_batch_size_other_exits_are_fastest(self, ten, batch_size):
        """A call takes 30 seconds, whether of one image or of ten. A batch of ten takes 296
        seconds with both exits, 290 with the first, 300 with the second and 330 with none."""
        sizes = (1, 2, 4, 8, 10)[: 5 if batch_size == 10 else 1]
        seconds = {
            (first, last): tuple(30 + rows * value[0] for rows in sizes)
            for (first, last), value in BY_CALL[0].seconds.items()
        }
        times = SegmentTimes(batch_size, sizes, seconds, plain=330.0)
        goal = dataclasses.replace(FAST, batch_size=batch_size)
        expected = (False, False) if batch_size == 1 else (True, False)
        assert choose(ten, goal, self.COST, times).enabled == expected


def random_record(make_record, seed, count=24):
    """Images from easy to hard at three early exits and the final one."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count)
    logits = []
    for index in range(4):
        chance = 1 - hard * (1 - 0.25 * index) + 0.15 * rng.normal(size=count)
        right = rng.random(count) < chance.clip(0.02, 0.98)
        score = (0.5 + 0.5 * (chance + 0.15 * rng.normal(size=count))).clip(0.51, 0.99)
        logits.append([probability(p, int(not r)) for p, r in zip(score, right, strict=True)])
    return make_record(np.array(logits).swapaxes(0, 1), [0] * count)


def slow_seconds(times, enabled, exits):
    """The mean seconds of images that take these exits, one after the other."""
    total, ends = 0.0, [index for index in range(3) if enabled[index]] + [3]
    for exit_index in exits:
        start = 0
        for end in ends:
            total += times.seconds[start, end][0]
            start = end + 1
            if end == exit_index:
                break
    return total / len(exits)


def fastest(scored, times, needed):
    """The fewest seconds of every subset of the exits and every shared threshold, one after the
    other, that is as accurate as needed."""
    thresholds = [NEVER, *np.unique(scored.scores[:, :-1]).tolist()]
    found = []
    for enabled in itertools.product([True, False], repeat=3):
        for threshold in thresholds:
            exits = [
                next((at for at in range(3) if enabled[at] and row[at] >= threshold), 3)
                for row in scored.scores.tolist()
            ]
            correct = [row[at] for row, at in zip(scored.correct.tolist(), exits, strict=True)]
            if sum(correct) / len(correct) >= needed - 1e-9:
                found.append(slow_seconds(times, enabled, exits))
    return min(found)


class TestEverySubsetInSeconds:
    NAMES = ("exit0", "exit1", "exit2", "final")

    def times(self, rng, noise):
        """Random times of stages and heads, and of a call; each segment off by up to `noise`. No
        head is cheap: each takes 2 % of the whole or more."""
        times = times_of(rng.uniform(5, 20, 4), rng.uniform(2, 8, 3), rng.uniform(0, 15))
        seconds = {
            span: (value * rng.uniform(1 - noise, 1 + noise),)
            for span, (value,) in times.seconds.items()
        }
        return dataclasses.replace(times, seconds=seconds)

    @pytest.mark.parametrize("noise", [0.0, 0.1])
    @pytest.mark.parametrize("drop", [0.0, 0.05])
    def test_the_fastest_is_found(self, make_record, noise, drop):
        """Of three early exits nearly always; it is never slower than by 5 %."""
        cost = Cost(self.NAMES, (10,) * 4, (1, 1, 1, 0), 0, (0,) * 4)
        goal, missed = dataclasses.replace(FAST, drop=drop), 0
        for seed in range(10):
            val = random_record(make_record, seed)
            times = self.times(np.random.default_rng(seed), noise)
            policy = choose(val, goal, cost, times)
            outcome = apply_policy(policy, val, cost)
            assert outcome.point.accuracy >= outcome.final_accuracy - drop - 1e-9
            took = slow_seconds(times, policy.enabled, outcome.exit_index.tolist())
            scored = score_record(val, policy.with_all_enabled())
            best = fastest(scored, times, outcome.final_accuracy - drop)
            assert best - 1e-9 <= took <= 1.05 * best
            missed += took > best + 1e-9
        assert missed <= 1


class TestSpansToTime:
    def test_all_if_exits_are_few(self, val):
        found = spans_to_time(val, MaxDrop(0.01, minimise="seconds"), COST, 3)
        assert found == all_spans([0, 1, 2], 4)

    def test_otherwise_those_that_save_multiply_adds(self, val):
        """The second head costs 12 of 100."""
        found = spans_to_time(val, MaxDrop(0.01, minimise="seconds"), COST, 2)
        assert found == all_spans([0, 2], 4)

    @pytest.mark.parametrize(
        ("goal", "objective"),
        [
            (MaxDrop(0.02, minimise="seconds"), None),
            (LatencyBudget(0.6, of_plain=True), most_accurate(60)),
            (LatencyBudget(0.003), most_accurate(50)),
        ],
    )
    @pytest.mark.parametrize("most", [0, 1, 2])
    def test_by_the_goal_in_multiply_adds(self, val, goal, objective, most):
        scored = score_record(val, calibrated(val, goal))
        objective = objective or cheapest(scored.correct[:, -1].mean() - 0.02)
        enabled = shortlist(scored, COST.mean_macs, objective, most)
        expected = all_spans(np.flatnonzero(enabled).tolist(), 4)
        assert spans_to_time(val, goal, COST, most) == expected
        assert sum(enabled) == most

    def test_those_of_all_exits_under_a_criterion_that_needs_the_exits_before(self, val):
        """No other policy can be chosen."""
        goal = MaxDrop(0.01, criterion="patience", minimise="seconds")
        found = spans_to_time(val, goal, COST, 1)
        assert found == [(0, 0), (1, 1), (2, 2), (3, 3)]
        seconds = {span: TIMES.seconds[span] for span in found}
        times = dataclasses.replace(TIMES, seconds=seconds)
        assert choose(val, goal, COST, times) == choose(val, goal, COST, TIMES)


class TestSeveralExitsNeeded:
    SLOW = times_of((1, 1, 1, 1), (100, 100, 100))  # no exit pays

    def test_patience_keeps_all_and_its_threshold_is_the_fastest(self, val):
        goal = MaxDrop(0.02, criterion="patience", minimise="seconds")
        policy = choose(val, goal, COST, TIMES)
        scored = score_record(val, calibrated(val, goal))
        curve = shared_curve(scored, (True,) * 3, COST.cumulative())
        price = TIMES.of((True,) * 3, curve.shares)
        assert policy.enabled == (True,) * 3
        assert policy.thresholds == (for_max_drop(curve, 0.02, price),) * 3
        assert all(choose(val, goal, COST, self.SLOW).enabled)

    def test_other_exits_are_disabled_there(self, val):
        goal = MaxDrop(0.02, minimise="seconds")
        assert choose(val, goal, COST, self.SLOW).enabled == (False,) * 3

    def test_a_criterion_that_needs_three(self, val, monkeypatch):
        needs_three = declare(min_early_exits=3)(lambda logits, state: max_prob(logits))
        monkeypatch.setitem(CRITERIA, "needs_three", needs_three)
        goal = MaxDrop(0.02, criterion="needs_three", minimise="seconds")
        assert choose(val, goal, COST, self.SLOW).enabled == (True,) * 3
        assert spans_to_time(val, goal, COST, 1) == [(0, 0), (1, 1), (2, 2), (3, 3)]
