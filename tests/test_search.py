"""A threshold for each exit, against trying every combination."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.policy import NEVER
from early_exit.records import Scores
from early_exit.search import Moves, cheapest, most_accurate, per_exit, that_pay
from early_exit.thresholds import for_budget, for_max_drop, shared_curve

EARLY = 3
ON = (True,) * EARLY
STAGES, HEADS = (20, 25, 25, 30), (1, 1, 1, 0)


def price_of(enabled, heads=HEADS):
    """What an image costs that leaves at each exit."""
    run = [head * on for head, on in zip(heads, (*enabled, True), strict=True)]
    return tuple(itertools.accumulate(map(sum, zip(STAGES, run, strict=True))))


def sample(seed: int, count: int = 24) -> Scores:
    """Images from easy to hard; later exits are right more often, and scores say so roughly."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count)
    scores = np.zeros((count, EARLY + 1), np.float32)
    answers = np.zeros((count, EARLY + 1), np.int64)
    for index in range(EARLY + 1):
        chance = 1 - hard * (1 - 0.25 * index) + 0.15 * rng.normal(size=count)
        answers[:, index] = rng.random(count) < chance.clip(0.02, 0.98)
        scores[:, index] = (chance + 0.15 * rng.normal(size=count)).clip(0, 1)
    return Scores(scores, answers, np.ones(count, np.int64))


def outcome(scored, thresholds, enabled=ON, price=None):
    """Accuracy and mean price, image by image."""
    price = price or price_of(enabled)
    right = total = 0
    for image in range(len(scored.targets)):
        taken = EARLY
        for index in reversed(range(EARLY)):
            if enabled[index] and scored.scores[image, index] >= thresholds[index]:
                taken = index
        right += bool(scored.right[image, taken])
        total += price[taken]
    return right / len(scored.targets), total / len(scored.targets)


def every_combination(scored):
    """Accuracies and mean prices of all combinations of thresholds that can matter."""
    columns = [[NEVER, *np.unique(scored.scores[:, index])] for index in range(EARLY)]
    thresholds = np.array(list(itertools.product(*columns)))
    taken = np.full((len(thresholds), len(scored.targets)), EARLY)
    for index in reversed(range(EARLY)):
        leaves = scored.scores[None, :, index] >= thresholds[:, index, None]
        taken = np.where(leaves, index, taken)
    right = scored.right[np.arange(len(scored.targets)), taken]
    return right.mean(axis=1), np.array(price_of(ON))[taken].mean(axis=1)


@given(st.integers(0, 10**6), st.data())
def test_a_move_knows_what_each_value_does(seed, data):
    scored = sample(seed, count=8)
    scored.scores[:] = np.round(scored.scores * 4) / 4  # ties
    thresholds = tuple(data.draw(st.sampled_from([NEVER, 0.25, 0.5, 0.75, -1.0])) for _ in ON)
    index = data.draw(st.integers(0, EARLY - 1))
    outcomes = Moves(scored, ON, price_of(ON)).outcomes(thresholds, index)
    for value, *found in zip(*outcomes, strict=True):
        moved = (*thresholds[:index], value, *thresholds[index + 1 :])
        assert outcome(scored, moved) == pytest.approx(tuple(found))


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.1]))
def test_it_is_never_worse_than_one_for_all(seed, drop):
    scored = sample(seed)
    curve = shared_curve(scored, ON, price_of(ON))
    needed = curve.accuracy[0] - drop
    shared = for_max_drop(curve, drop)
    found, enabled = per_exit(scored, price_of, cheapest(needed), shared, ON)
    accuracy, price = outcome(scored, found, enabled)
    assert accuracy >= needed - 1e-9
    assert price <= outcome(scored, (shared,) * EARLY)[1] + 1e-9
    shared = for_budget(curve, 70)
    found, enabled = per_exit(scored, price_of, most_accurate(70), shared, ON)
    accuracy, price = outcome(scored, found, enabled)
    assert price <= 70 + 1e-9
    assert accuracy >= outcome(scored, (shared,) * EARLY)[0] - 1e-9


def test_how_far_it_is_from_the_best_there_is():
    excess, shared_excess = [], []
    for seed in range(100):
        scored = sample(seed)
        curve = shared_curve(scored, ON, price_of(ON))
        drop = (0, 0.04, 0.09)[seed % 3]
        needed = curve.accuracy[0] - drop
        shared = for_max_drop(curve, drop)
        found, _ = per_exit(scored, price_of, cheapest(needed), shared, ON, switch=False)
        accuracies, prices = every_combination(scored)
        best = prices[accuracies >= needed - 1e-12].min()
        excess.append(outcome(scored, found)[1] / best - 1)
        shared_excess.append(outcome(scored, (shared,) * EARLY)[1] / best - 1)
    excess = np.array(excess)
    assert (excess > -1e-9).all()
    # as the module says
    assert (excess < 1e-9).sum() >= 93
    assert excess.mean() < 0.002 and excess.max() < 0.057
    assert 0.2 < np.mean(shared_excess) < 0.3


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.1]))
def test_what_pays_with_a_shared_threshold_is_never_worse_than_all(seed, drop):
    scored, heads = sample(seed), (9, 3, 1, 0)  # some are dear

    def cheapest_of(enabled):
        scores = scored.scores.copy()
        scores[:, :-1][:, ~np.array(enabled)] = -np.inf
        part = Scores(scores, scored.answers, scored.targets)
        curve = shared_curve(part, enabled, price_of(enabled, heads))
        return curve.macs[curve.accuracy >= needed - 1e-12].min()

    needed = scored.right[:, -1].mean() - drop
    found = that_pay(scored, lambda on: price_of(on, heads), cheapest(needed))
    shared = for_max_drop(shared_curve(scored, found, price_of(found, heads)), drop)
    each, on = per_exit(
        scored, lambda on: price_of(on, heads), cheapest(needed), shared, found
    )
    accuracy, price = outcome(scored, each, on, price_of(on, heads))
    assert accuracy >= needed - 1e-9 and price <= cheapest_of(found) + 1e-9
    subsets = list(itertools.product([True, False], repeat=EARLY))
    assert cheapest_of(found) <= cheapest_of(ON) + 1e-9
    # one at a time, it may miss a better pair
    assert cheapest_of(found) <= 1.25 * min(map(cheapest_of, subsets)) + 1e-9


class TestSwitchingOff:
    def test_a_dear_exit_without_use_is_off_with_a_shared_threshold(self):
        scored = sample(1, count=200)
        scored.answers[:, 1] = 0  # never right
        scored.scores[:, 1] = 0.99
        on = that_pay(scored, price_of, cheapest(scored.right[:, -1].mean()))
        assert on == (True, False, True)

    def test_exits_that_pay_stay_on_with_a_shared_threshold(self):
        scored = sample(1, count=200)
        scored.answers[:] = 1
        assert that_pay(scored, price_of, cheapest(1.0))[0]

    def test_an_exit_that_never_pays_is_off(self):
        scored = sample(1, count=200)
        scored.answers[:, 1] = 0  # never right
        heads = (1, 9, 1, 0)
        found, enabled = per_exit(
            scored, lambda on: price_of(on, heads), cheapest(scored.right[:, -1].mean()), NEVER, ON
        )
        assert enabled == (True, False, True) and found[1] == NEVER

    def test_all_are_off_where_none_pays(self):
        scored = sample(1, count=200)
        scored.answers[:, :-1] = 0
        scored.answers[:, -1] = 1
        found, enabled = per_exit(scored, price_of, cheapest(1.0), NEVER, ON)
        assert enabled == (False,) * EARLY and found == (NEVER,) * EARLY

    def test_exits_that_pay_stay(self):
        scored = sample(1, count=200)
        scored.answers[:] = 1
        found, enabled = per_exit(scored, price_of, cheapest(1.0), NEVER, ON)
        assert enabled[0] and outcome(scored, found, enabled)[1] <= 21  # everybody leaves at once

    def test_they_may_have_to_stay(self):
        scored = sample(1, count=200)
        scored.answers[:, 1] = 0
        _, enabled = per_exit(scored, price_of, most_accurate(60), -1.0, ON, switch=False)
        assert enabled == ON


def test_no_goal_in_reach_is_missed_for_want_of_a_good_start():
    scored = sample(5, count=300)
    accuracies = [scored.right[:, index].mean() for index in range(EARLY + 1)]
    assert accuracies[0] < accuracies[-1]
    found, enabled = per_exit(scored, price_of, most_accurate(21), -1.0, ON)
    assert outcome(scored, found, enabled)[1] <= 21 + 1e-9
