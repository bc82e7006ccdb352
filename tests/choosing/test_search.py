"""Which exits pay, against trying every subset."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.choosing.curve import for_latency, shared_curve
from early_exit.choosing.record import Scores
from early_exit.choosing.search import (
    NOISE,
    cheap_heads,
    cheapest,
    exits_that_pay,
    improves,
    most_accurate,
    shortlist,
    subset_that_pays,
)

EARLY = 3
ALL, NONE = (True,) * EARLY, (False,) * EARLY
STAGES, HEADS = (20, 25, 25, 30), (1, 1, 1, 0)
SUBSETS = list(itertools.product([True, False], repeat=EARLY))


def cost_of(enabled, heads=HEADS):
    """The cost of an image that exits at each exit."""
    run = [head * flag for head, flag in zip(heads, (*enabled, True), strict=True)]
    return tuple(itertools.accumulate(map(sum, zip(STAGES, run, strict=True))))


def pricing(enabled, shares, heads=HEADS):
    """The mean cost of an image."""
    return shares @ np.array(cost_of(enabled, heads), float)


def seconds(enabled, shares):
    """A cost that is not a sum over images: half of a stage's time is spent as soon as one image
    reaches it."""
    reach = 1 - np.cumsum(shares, axis=1) + shares
    stages = np.array(STAGES) + np.array(HEADS) * np.array((*enabled, True))
    return (stages * np.where(reach > 1e-9, 0.5 + 0.5 * reach, 0)).sum(axis=1)


def sample(seed: int, count: int = 24) -> Scores:
    """Images from easy to hard; later exits are correct more often, and scores roughly say so."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count)
    scores = np.zeros((count, EARLY + 1), np.float32)
    answers = np.zeros((count, EARLY + 1), np.int64)
    for index in range(EARLY + 1):
        chance = 1 - hard * (1 - 0.25 * index) + 0.15 * rng.normal(size=count)
        answers[:, index] = rng.random(count) < chance.clip(0.02, 0.98)
        scores[:, index] = (chance + 0.15 * rng.normal(size=count)).clip(0, 1)
    return Scores(scores, answers, np.ones(count, np.int64))


def lowest_cost(scored, enabled, needed, heads=HEADS):
    """The lowest mean cost of a shared threshold that is as accurate as needed."""
    curve = shared_curve(scored, enabled, cost_of(enabled, heads))
    return curve.macs[curve.accuracy >= needed - 1e-12].min()


def best_accuracy(scored, enabled, limit, heads=HEADS):
    """The best accuracy of a shared threshold within a budget, -1 if none is."""
    curve = shared_curve(scored, enabled, cost_of(enabled, heads))
    return curve.accuracy[curve.macs <= limit * (1 + 1e-12)].max(initial=-1.0)


class TestEverySubset:
    HEADS = (9, 3, 1, 0)  # none is cheap: 0.5 % of 113 is 0.565

    @given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.1]))
    def test_the_cheapest_subset_is_found(self, seed, drop):
        """In all of 9,000 samples of three exits; with more exits a greedy search may miss it."""
        scored = sample(seed)
        needed = scored.correct[:, -1].mean() - drop
        found = exits_that_pay(scored, partial(pricing, heads=self.HEADS), cheapest(needed))
        cost = {subset: lowest_cost(scored, subset, needed, self.HEADS) for subset in SUBSETS}
        assert cost[found] <= cost[ALL] + 1e-9
        assert cost[found] <= 1.05 * min(cost.values()) + 1e-9

    def test_how_often_the_cheapest_one_is_found(self):
        missed = []
        for seed in range(200):
            scored = sample(seed)
            needed = scored.correct[:, -1].mean() - (0, 0.05, 0.1)[seed % 3]
            found = exits_that_pay(scored, partial(pricing, heads=self.HEADS), cheapest(needed))
            cost = {subset: lowest_cost(scored, subset, needed, self.HEADS) for subset in SUBSETS}
            missed.append(cost[found] > min(cost.values()) + 1e-9)
        assert sum(missed) <= 2

    def test_how_often_the_most_accurate_one_is_found(self):
        missed = []
        for seed in range(200):
            scored, limit = sample(seed), (50, 70, 90)[seed % 3]
            found = exits_that_pay(scored, partial(pricing, heads=self.HEADS), most_accurate(limit))
            best = {subset: best_accuracy(scored, subset, limit, self.HEADS) for subset in SUBSETS}
            assert best[found] >= best[ALL] - 1e-9
            missed.append(best[found] < max(best.values()) - 1e-9)
        assert sum(missed) <= 2

    @pytest.mark.parametrize(("count", "at_least"), [(5, 26), (6, 26)])
    def test_the_cheapest_of_more_exits_is_found_mostly(self, count, at_least):
        """In at least 26 of 30 samples, with random costs of stages and heads."""
        rng = np.random.default_rng(count)
        best_found = 0
        for _ in range(30):
            scored, costs = many_exits(rng, count)
            needed = scored.correct[:, -1].mean() - 0.02

            def price(enabled, shares, costs=costs):
                heads = costs[1] * np.array((*enabled, True))
                return shares @ np.cumsum(costs[0] + heads)

            def lowest(enabled, scored=scored, costs=costs, needed=needed):
                heads = costs[1] * np.array((*enabled, True))
                curve = shared_curve(scored, enabled, np.cumsum(costs[0] + heads))
                return curve.macs[curve.accuracy >= needed - 1e-12].min()

            found = exits_that_pay(scored, price, cheapest(needed))
            best = min(map(lowest, itertools.product([True, False], repeat=count)))
            best_found += lowest(found) <= best * (1 + 1e-9)
        assert best_found >= at_least


def many_exits(rng, count):
    """Forty images with `count` early exits, and the costs of their stages and heads."""
    hard = rng.random(40)
    depth = np.arange(1, count + 2) / (count + 1)
    chance = 1 - hard[:, None] * (1 - 0.8 * depth) + 0.15 * rng.normal(size=(40, count + 1))
    answers = (rng.random(chance.shape) < chance.clip(0.02, 0.98)).astype(np.int64)
    scores = (chance + 0.15 * rng.normal(size=chance.shape)).clip(0, 1).astype(np.float32)
    heads = np.append(rng.integers(1, 9, count), 0)
    return Scores(scores, answers, np.ones(40, np.int64)), (rng.integers(5, 30, count + 1), heads)


class TestAnyCost:
    """The seconds of a batch, too, are a function of the shares that exit."""

    @given(st.integers(0, 10**6), st.sampled_from([50, 70, 90]))
    def test_a_budget_of_seconds_holds(self, seed, budget):
        scored = sample(seed)
        enabled = exits_that_pay(scored, seconds, most_accurate(budget))
        curve = shared_curve(scored, enabled, cost_of(enabled))
        paid = seconds(enabled, curve.shares)
        at = np.flatnonzero(curve.thresholds == for_latency(curve, paid, budget))[0]
        assert paid[at] <= budget * (1 + 1e-9)
        with_all = shared_curve(scored, ALL, cost_of(ALL))
        allowed = seconds(ALL, with_all.shares) <= budget
        assert curve.accuracy[at] >= with_all.accuracy[allowed].max() - 1e-9


class TestDisabling:
    def test_an_exit_that_is_never_correct_is_disabled(self):
        scored = sample(1, count=200)
        scored.answers[:, 1] = 0
        scored.scores[:, 1] = 0.99
        enabled = exits_that_pay(scored, pricing, cheapest(scored.correct[:, -1].mean()))
        assert enabled == (True, False, True)

    def test_all_are_disabled_if_none_pays(self):
        scored = sample(1, count=200)
        scored.answers[:, :-1] = 0
        scored.answers[:, -1] = 1
        assert exits_that_pay(scored, pricing, cheapest(1.0)) == NONE

    def test_an_exit_that_pays_stays_enabled(self):
        scored = sample(1, count=200)
        scored.answers[:] = 1
        enabled = exits_that_pay(scored, pricing, cheapest(1.0))
        assert enabled[0]
        assert lowest_cost(scored, enabled, 1.0) <= 21  # every image exits at once

    def test_a_budget_that_only_the_first_exit_meets_is_met(self):
        scored = sample(5, count=300)
        accuracies = scored.correct.mean(axis=0)
        assert accuracies[0] < accuracies[-1]
        enabled = exits_that_pay(scored, pricing, most_accurate(21))
        assert best_accuracy(scored, enabled, 21) >= accuracies[0]


class TestCheapHeads:
    def test_which_heads_cost_less_than_half_a_percent(self):
        # with all heads 100 + 0.4 + 0.6 + 9 = 110, of which half a percent is 0.55
        heads = (0.4, 0.6, 9, 0)
        assert cheap_heads(partial(pricing, heads=heads), EARLY) == [True, False, False]

    def test_they_are_disabled_only_for_more_than_three_percent_of_the_cost(self):
        heads, unchanged, better = (0.1, 0.1, 0.1, 0), 0, 0
        for seed in range(20):
            scored = sample(seed, count=200)
            needed = scored.correct[:, -1].mean()
            cost = {subset: lowest_cost(scored, subset, needed, heads) for subset in SUBSETS}
            enabled = exits_that_pay(scored, partial(pricing, heads=heads), cheapest(needed))
            assert enabled == ALL or cost[enabled] < 0.97 * cost[ALL]
            unchanged += enabled == ALL
            better += min(cost.values()) < cost[ALL] - 1e-9
        # sometimes a subset was a little cheaper, and still all stayed enabled
        assert unchanged + better > 20

    def test_they_are_disabled_only_for_more_than_a_third_of_a_point(self):
        heads, unchanged, better = (0.1, 0.1, 0.1, 0), 0, 0
        for seed in range(20):
            scored = sample(seed, count=1000)
            best = {subset: best_accuracy(scored, subset, 60, heads) for subset in SUBSETS}
            enabled = exits_that_pay(scored, partial(pricing, heads=heads), most_accurate(60))
            assert enabled == ALL or best[enabled] > best[ALL] + 0.003
            unchanged += enabled == ALL
            better += max(best.values()) > best[ALL] + 1e-9
        assert unchanged + better > 20

    @pytest.mark.parametrize(("head", "expected"), [(0.1, True), (2.0, False)])
    def test_a_cheap_head_stays_where_an_expensive_one_goes(self, head, expected):
        """The second exit takes one image of a hundred, which the third would take as well."""
        scores = np.zeros((100, EARLY + 1), np.float32)
        scores[:50, 0], scores[50, 1], scores[50:80, 2] = 0.9, 0.9, 0.9
        scored = Scores(scores, np.ones((100, EARLY + 1), np.int64), np.ones(100, np.int64))
        scored.answers[scores == 0] = 0
        scored.answers[:, -1] = 1
        heads = (0.1, head, 0.1, 0)
        enabled = exits_that_pay(scored, partial(pricing, heads=heads), cheapest(1.0))
        assert enabled == (True, expected, True)

    def test_a_missed_limit_has_no_minimal_gain(self):
        """Nearer to a budget is better by however little; cheaper is not."""
        assert improves((19.9, -1.0, 30.0), (20.0, -1.0, 30.0), cheap=True)
        assert not improves((0.0, 19.9, -1.0), (0.0, 20.0, -1.0), cheap=True)
        assert improves((0.0, 19.9, -1.0), (0.0, 20.0, -1.0), cheap=False)
        assert improves((0.0, 19.3, -1.0), (0.0, 20.0, -1.0), cheap=True)


class TestSubsets:
    """Every subset of the candidates is tried."""

    def test_it_is_the_best_of_all_but_for_noise(self):
        for seed in range(20):
            scored = sample(seed)
            needed = scored.correct[:, -1].mean() - 0.05
            for candidates in SUBSETS:
                allowed = [
                    enabled
                    for enabled in SUBSETS
                    if all(flag or not used for used, flag in zip(enabled, candidates))
                ]
                costs = {enabled: lowest_cost(scored, enabled, needed) for enabled in allowed}
                found = subset_that_pays(scored, pricing, cheapest(needed), candidates)
                near = [one for one in allowed if costs[one] <= min(costs.values()) * (1 + NOISE)]
                assert found in near
                assert sum(found) == min(map(sum, near))

    def test_the_price_is_asked_for_subsets_of_the_candidates_alone(self):
        """Segments that end at other exits were not measured."""
        asked = set()

        def noting(enabled, shares):
            asked.add(tuple(enabled))
            return pricing(enabled, shares)

        subset_that_pays(sample(0), noting, cheapest(0.9), (True, False, True))
        assert asked == {(a, False, b) for a in (True, False) for b in (True, False)}

    def test_a_gain_within_noise_enables_no_exit(self):
        """An exit that all images take at once, and that saves less than the clock can tell."""
        scored = sample(0)

        def price(saved):
            return lambda enabled, shares: np.full(len(shares), 100.0 - saved * sum(enabled))

        for saved, expected in ((0.3, NONE), (2.0, ALL)):
            assert subset_that_pays(scored, price(saved), cheapest(0.0), ALL) == expected

    def test_accuracy_has_no_tolerance(self):
        for seed in range(20):
            scored = sample(seed)
            found = subset_that_pays(scored, pricing, most_accurate(60), ALL)
            accuracies = {one: best_accuracy(scored, one, 60) for one in SUBSETS}
            assert accuracies[found] == max(accuracies.values())


class TestShortlist:
    def costs(self, scored, needed, most):
        """The lowest cost with every subset of `most` exits."""
        count = scored.scores.shape[1] - 1
        return {
            enabled: lowest_of(scored, enabled, needed)
            for enabled in itertools.product([True, False], repeat=count)
            if sum(enabled) == most
        }

    @pytest.mark.parametrize("most", [3, 4, 100])
    def test_few_exits_are_all_listed(self, most):
        assert shortlist(sample(0), pricing, cheapest(0.9), most) == ALL

    def test_no_exit(self):
        assert shortlist(sample(0), pricing, cheapest(0.9), 0) == NONE

    def test_without_one_exit_it_is_the_best(self):
        for seed in range(30):
            scored = sample(seed)
            needed = scored.correct[:, -1].mean() - 0.05
            costs = self.costs(scored, needed, 2)
            found = shortlist(scored, pricing, cheapest(needed), 2)
            assert costs[found] == min(costs.values())

    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_of_five_the_best_are_found(self, most):
        rng = np.random.default_rng(most)
        for _ in range(30):
            scored, _ = many_exits(rng, 5)
            needed = scored.correct[:, -1].mean() - 0.05
            costs = self.costs(scored, needed, most)
            found = shortlist(scored, even_price, cheapest(needed), most)
            assert sum(found) == most
            assert costs[found] <= min(costs.values()) + 1e-9


def even_costs(enabled):
    """Stages that cost 10 each and heads that cost 2."""
    return np.cumsum(10 + 2 * np.array((*enabled, False)))


def even_price(enabled, shares):
    return shares @ even_costs(enabled)


def lowest_of(scored, enabled, needed):
    """The lowest cost of these exits that is as accurate as needed."""
    costs = even_costs(enabled) if len(enabled) > EARLY else cost_of(enabled)
    curve = shared_curve(scored, enabled, costs)
    return curve.macs[curve.accuracy >= needed - 1e-12].min()
