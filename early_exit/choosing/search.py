"""Which exits pay, searched on val.

A head costs every image that reaches it. An exit is disabled if a shared threshold for the others
serves the goal better. Of exits with cheap heads some subset looks better on any sample, by chance:
those are switched only for more than 3 % of the cost, or 0.3 points of accuracy.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from early_exit.choosing.curve import SLACK, shared_curve
from early_exit.choosing.record import Scores

Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Accuracies and costs (P,) -> three arrays (P,) that should be small, the first one first. One
below 0 is a negated accuracy."""
Pricing = Callable[[Sequence[bool], np.ndarray], np.ndarray]
"""Which early exits are enabled, and the shares (P, exits) of a sample that exit at each -> mean
costs (P,)."""

CHEAP = 0.005  # a head below this share of the whole cost is switched only for:
MIN_GAIN_IN_COST, MIN_GAIN_IN_ACCURACY = 0.03, 0.003
NOISE = 0.01  # of measured costs
MAX_TRIALS = 200  # choices of exits, each of which takes a millisecond or so


def most_accurate(budget: float) -> Objective:
    """At most `budget` per image, then as accurate as possible, then cheap."""
    return lambda accuracy, cost: (np.maximum(cost - budget * (1 + SLACK), 0.0), -accuracy, cost)


def cheapest(accuracy_needed: float) -> Objective:
    """At least this accurate, then as cheap as possible, then accurate."""
    return lambda accuracy, cost: (
        np.maximum(accuracy_needed - SLACK - accuracy, 0.0),
        cost,
        -accuracy,
    )


@dataclass(frozen=True, order=True)
class Subset:
    """Which exits are enabled, and the best value of the objective with a shared threshold."""

    value: tuple[float, ...]
    enabled: tuple[bool, ...]


def exits_that_pay(scored: Scores, pricing: Pricing, objective: Objective) -> tuple[bool, ...]:
    """Which early exits to enable if all share a threshold.

    A greedy search from both ends: all exits, disabling one at a time as long as that improves the
    objective; and none, enabling one at a time. The better end counts. scored: with all exits
    enabled, whose scores must not depend on each other.
    """
    num_early = scored.scores.shape[1] - 1
    cheap = cheap_heads(pricing, num_early)
    evaluate = partial(_valued, scored, pricing, objective)

    def follow(subset: Subset, switch_to: bool) -> Subset:
        while True:
            improved = [
                trial
                for index, is_enabled in enumerate(subset.enabled)
                if is_enabled != switch_to
                for trial in [evaluate(replaced(subset.enabled, index, switch_to))]
                if improves(trial.value, subset.value, cheap[index])
            ]
            if not improved:
                return subset
            subset = min(improved)

    backward = follow(evaluate((True,) * num_early), switch_to=False)
    forward = follow(evaluate((False,) * num_early), switch_to=True)
    best = forward if improves(forward.value, backward.value, all(cheap)) else backward
    return best.enabled


def subset_that_pays(
    scored: Scores, pricing: Pricing, objective: Objective, candidates: Sequence[bool]
) -> tuple[bool, ...]:
    """Which of a few candidate early exits to enable if all share a threshold and the price was
    measured: every subset is tried, and of those whose cost is within `NOISE` of the best one's
    that with the fewest exits is taken.

    candidates: flags of the early exits that may be enabled; scored: as for `exits_that_pay`.
    """
    trials = [
        _valued(scored, pricing, objective, enabled)
        for enabled in itertools.product(
            *((False, True) if flag else (False,) for flag in candidates)
        )
    ]
    best = min(trials)
    near = [trial for trial in trials if _is_near(trial.value, best.value)]
    return min(near, key=lambda trial: (sum(trial.enabled), trial)).enabled


def _is_near(value: tuple[float, ...], best: tuple[float, ...]) -> bool:
    """Whether the parts up to the cost are as good as the best ones, the cost but for `NOISE`."""
    for index, (ours, theirs) in enumerate(zip(value, best, strict=True)):
        if index and theirs > 0:  # the cost
            return ours <= theirs * (1 + NOISE)
        if ours > theirs + SLACK * max(1.0, abs(theirs)):
            return False
    return True


def _valued(
    scored: Scores, pricing: Pricing, objective: Objective, enabled: tuple[bool, ...]
) -> Subset:
    """The exits with the best value that a shared threshold gives them."""
    curve = shared_curve(scored, enabled, np.zeros(len(enabled) + 1))
    return Subset(minimum(objective(curve.accuracy, pricing(enabled, curve.shares))), enabled)


def cheap_heads(pricing: Pricing, num_early: int) -> list[bool]:
    """Which early heads cost less than half a percent of the whole."""
    all_enabled, no_exit_taken = (True,) * num_early, np.eye(num_early + 1)[-1:]

    def cost(enabled: tuple[bool, ...]) -> float:
        return float(pricing(enabled, no_exit_taken)[0])

    whole = cost(all_enabled)
    return [
        whole - cost(replaced(all_enabled, index, False)) < CHEAP * whole
        for index in range(num_early)
    ]


def shortlist(
    scored: Scores, pricing: Pricing, objective: Objective, most: int
) -> tuple[bool, ...]:
    """At most `most` early exits that are worth measuring, by a price that needs no measurement.

    All of them, if they are that few. Otherwise the exit without which the objective is best is
    removed, one at a time, until few enough are left to try every choice of `most` of them.
    """
    enabled = (True,) * (scored.scores.shape[1] - 1)
    while sum(enabled) > most:
        remaining = np.flatnonzero(enabled).tolist()
        size = most if math.comb(len(remaining), most) <= MAX_TRIALS else len(remaining) - 1
        trials = [
            tuple(index in chosen for index in range(len(enabled)))
            for chosen in itertools.combinations(remaining, size)
        ]
        enabled = min(_valued(scored, pricing, objective, trial) for trial in trials).enabled
    return enabled


def replaced(enabled: tuple[bool, ...], index: int, value: bool) -> tuple[bool, ...]:
    """The flags with another value at `index`."""
    return (*enabled[:index], value, *enabled[index + 1 :])


def minimum(parts: tuple[np.ndarray, ...]) -> tuple[float, ...]:
    """The lexicographic minimum of an objective over its points."""
    at = int(np.lexsort(parts[::-1])[0])
    return tuple(float(part[at]) for part in parts)


def improves(value: tuple[float, ...], best: tuple[float, ...], cheap: bool) -> bool:
    """Whether the first part that differs by more than rounding is smaller; for a cheap head by at
    least the minimal gain. The first part, how far a limit is missed, has no minimal gain."""
    for index, (ours, theirs) in enumerate(zip(value, best, strict=True)):
        if abs(ours - theirs) > SLACK * max(1.0, abs(theirs)):
            if not cheap or index == 0:
                return ours < theirs
            gain = MIN_GAIN_IN_COST * theirs if theirs > 0 else MIN_GAIN_IN_ACCURACY
            return ours < theirs - gain
    return False
