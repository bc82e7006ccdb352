"""The curve of a shared threshold and the choice from it, against trying every threshold."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.choosing.curve import for_budget, for_latency, for_max_drop, shared_curve
from early_exit.choosing.record import Scores, score_record
from early_exit.errors import UserError
from early_exit.inference.policy import NEVER, Policy


@st.composite
def cases(draw):
    """Scores with many ties, correct and wrong answers, disabled exits and rising costs."""
    num_exits = draw(st.integers(2, 5))
    count = draw(st.integers(1, 8))
    score = st.integers(-3, 3).map(lambda value: value / 4)  # exact in float32
    grid = st.lists(
        st.lists(score, min_size=num_exits, max_size=num_exits), min_size=count, max_size=count
    )
    answer = st.lists(
        st.lists(st.integers(0, 1), min_size=num_exits, max_size=num_exits),
        min_size=count,
        max_size=count,
    )
    enabled = draw(st.lists(st.booleans(), min_size=num_exits - 1, max_size=num_exits - 1))
    steps = draw(st.lists(st.integers(1, 50), min_size=num_exits, max_size=num_exits))
    scores = np.array(draw(grid), np.float32)
    scores[:, :-1][:, ~np.array(enabled)] = -np.inf  # as `score_record` scores disabled exits
    scored = Scores(scores, np.array(draw(answer)), np.zeros(count, np.int64))
    return scored, tuple(enabled), tuple(itertools.accumulate(steps))


def try_threshold(scored, enabled, macs, threshold):
    """Accuracy and mean MACs under one threshold, image by image."""
    count, num_exits = scored.scores.shape
    correct = cost = 0
    for image in range(count):
        exit_index = num_exits - 1
        for index in reversed(range(num_exits - 1)):
            if enabled[index] and scored.scores[image, index] >= threshold:
                exit_index = index
        correct += bool(scored.answers[image, exit_index] == scored.targets[image])
        cost += macs[exit_index]
    return correct / count, cost / count


def try_all(scored, enabled, macs):
    """The outcome of every threshold that can matter: each score there is, and none."""
    early = scored.scores[:, :-1][:, np.array(enabled, bool)]
    values = [NEVER, *sorted(set(early.ravel().tolist()), reverse=True)]
    return {value: try_threshold(scored, enabled, macs, value) for value in values}


@given(cases())
def test_every_point_of_the_curve_is_what_its_threshold_does(case):
    curve = shared_curve(*case)
    for threshold, accuracy, macs in zip(curve.thresholds, curve.accuracy, curve.macs, strict=True):
        assert try_threshold(*case, threshold) == pytest.approx((accuracy, macs))


@given(cases())
def test_no_outcome_is_missing_from_the_curve(case):
    curve = shared_curve(*case)
    for threshold, outcome in try_all(*case).items():
        # thresholds fall: the last one that is not below
        here = np.flatnonzero(curve.thresholds >= threshold)[-1]
        assert (curve.accuracy[here], curve.macs[here]) == pytest.approx(outcome)


@given(cases())
def test_the_curve_starts_with_no_exit_taken_and_gets_cheaper(case):
    scored, enabled, macs = case
    curve = shared_curve(*case)
    assert curve.thresholds[0] == NEVER
    assert curve.macs[0] == macs[-1]
    assert curve.accuracy[0] == scored.correct[:, -1].mean()
    assert (np.diff(curve.thresholds) < 0).all()
    assert (np.diff(curve.macs) < 0).all()
    assert len(curve.thresholds) <= scored.scores.shape[0] * sum(enabled) + 1


@given(cases(), st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]))
def test_max_drop_finds_the_cheapest_of_all_thresholds(case, drop):
    chosen = for_max_drop(shared_curve(*case), drop)
    outcomes = try_all(*case)
    final = outcomes[NEVER][0]
    allowed = [macs for accuracy, macs in outcomes.values() if accuracy >= final - drop - 1e-9]
    accuracy, macs = try_threshold(*case, chosen)
    assert accuracy >= final - drop - 1e-9
    assert macs == pytest.approx(min(allowed))


@given(cases(), st.floats(1, 250))
def test_budget_finds_the_most_accurate_of_all_thresholds(case, budget):
    curve, outcomes = shared_curve(*case), try_all(*case).values()
    allowed = [(accuracy, -macs) for accuracy, macs in outcomes if macs <= budget]
    if not allowed:
        with pytest.raises(UserError, match="budget"):
            for_budget(curve, budget)
    else:
        accuracy, macs = try_threshold(*case, for_budget(curve, budget))
        assert (accuracy, -macs) == pytest.approx(max(allowed))  # of equals the cheapest


def test_the_curve_by_hand():
    # three images, one early exit at 40, the final one at 100
    scored = Scores(
        np.array([[0.9, 0], [0.5, 0], [0.5, 0]], np.float32),
        np.array([[1, 0], [1, 1], [1, 0]]),
        np.array([1, 1, 0]),
    )
    curve = shared_curve(scored, (True,), (40, 100))
    # final: wrong, correct, correct. Image 0 exits early and is correct; then the other two exit
    # together, of which the last becomes wrong.
    assert curve.thresholds.tolist() == [NEVER, np.float32(0.9), 0.5]
    assert curve.accuracy.tolist() == pytest.approx([2 / 3, 1, 2 / 3])
    assert curve.macs.tolist() == [100, 80, 40]


@given(cases())
def test_every_point_has_the_shares_of_the_exits(case):
    scored, enabled, macs = case
    curve = shared_curve(*case)
    for threshold, shares, cost in zip(curve.thresholds, curve.shares, curve.macs, strict=True):
        policy = Policy(
            exit_names=(*map(str, range(len(macs) - 1)), "final"),
            thresholds=(threshold,) * (len(macs) - 1),
            enabled=enabled,
        )
        counts = np.bincount(scored.exit_index(policy), minlength=len(macs))
        assert shares == pytest.approx(counts / len(scored.targets))
        assert shares @ np.array(macs) == pytest.approx(cost)


@given(cases(), st.floats(1, 250))
def test_a_latency_budget_finds_the_most_accurate_of_all_thresholds(case, budget):
    curve = shared_curve(*case)
    seconds = curve.macs**1.5  # not in proportion to the shares
    allowed = [(a, -s) for a, s in zip(curve.accuracy, seconds, strict=True) if s <= budget]
    if not allowed:
        least = f"{1000 * seconds.min():.2f} ms"
        with pytest.raises(UserError, match=f"{1000 * budget:.2f} ms.*{least}"):
            for_latency(curve, seconds, budget)
    else:
        here = np.flatnonzero(curve.thresholds == for_latency(curve, seconds, budget))[0]
        assert (curve.accuracy[here], -seconds[here]) == max(allowed)


def test_no_drop_may_still_be_cheaper_and_better_than_the_final_exit():
    scored = Scores(
        np.array([[0.9, 0], [0.5, 0]], np.float32), np.array([[1, 0], [0, 1]]), np.array([1, 1])
    )
    curve = shared_curve(scored, (True,), (40, 100))
    assert for_max_drop(curve, 0.0) == 0.5  # 1 of 2 is correct as before, at 40


def test_with_all_exits_disabled_there_is_one_outcome():
    scored = Scores(np.zeros((2, 3), np.float32), np.array([[0, 0, 1]] * 2), np.array([1, 0]))
    curve = shared_curve(scored, (False, False), (10, 20, 30))
    assert curve.thresholds.tolist() == [NEVER]
    assert curve.accuracy.tolist() == [0.5]
    assert curve.macs.tolist() == [30]


def test_an_unreachable_budget_names_the_lowest_cost_in_one_line():
    scored = Scores(np.zeros((2, 2), np.float32), np.zeros((2, 2)), np.zeros(2))
    curve = shared_curve(scored, (True,), (40_000_000, 100_000_000))
    with pytest.raises(UserError, match=r"\b30\.00 M .*\b40\.00 M") as error:
        for_budget(curve, 30e6)
    assert "\n" not in str(error.value)


def test_a_budget_of_exactly_the_lowest_cost_is_met():
    scored = Scores(np.zeros((2, 2), np.float32), np.zeros((2, 2)), np.zeros(2))
    assert for_budget(shared_curve(scored, (True,), (40, 100)), 40) == 0.0


@pytest.mark.parametrize("criterion", ["max_prob", "entropy", "margin", "patience"])
@pytest.mark.parametrize("enabled", [(True, True, True), (False, True, True)])
def test_a_policy_with_the_chosen_threshold_does_what_the_curve_says(stored, criterion, enabled):
    macs = (20, 45, 80, 105)
    policy = Policy(
        exit_names=stored.info.exit_names,
        thresholds=(NEVER,) * 3,
        criterion=criterion,
        enabled=enabled,
    )
    scored = score_record(stored, policy)
    curve = shared_curve(scored, enabled, macs)
    for threshold in {for_max_drop(curve, 0.01), for_max_drop(curve, 0.2), for_budget(curve, 90)}:
        exit_index = scored.exit_index(policy.with_threshold(threshold))
        point = np.flatnonzero(curve.thresholds == threshold)[0]
        accuracy = scored.correct[np.arange(len(exit_index)), exit_index].mean()
        assert accuracy == pytest.approx(curve.accuracy[point])
        assert np.array(macs)[exit_index].mean() == pytest.approx(curve.macs[point])
