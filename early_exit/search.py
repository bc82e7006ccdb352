"""Which exits pay, and a threshold of its own for every exit, searched on val.

What one exit's threshold can do while the others stay is known exactly and for all its values at
once: one sort, done before, and running sums. The search is made of such moves alone, so no grid is
laid anywhere. It follows the best of accuracy - weight x price from never leaving early to always
and back, over a range of weights (a Lagrangian relaxation, each by coordinate ascent), and from the
best points it met and from the shared threshold's it goes on with the goal itself.

Last, each exit is tried without. Its head then costs nothing, and where that serves the goal it
stays off. Among exits whose heads are cheap some subset looks better on any sample, by chance:
those go only for more than 3 % of the price, or 0.3 points.

A move costs O(images), the search about weights x exits x a few of them: two seconds for 50,000
images and four exits. It may end beside the best there is. On 100 samples of 24 images and three
early exits it found the best of all combinations 93 times, and cost 0.2 % more on average and 5.6 %
at most (tests/test_search.py); one threshold for all cost 25 % more on average.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from early_exit.policy import NEVER
from early_exit.records import Scores
from early_exit.thresholds import shared_curve

Key = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Accuracies and prices (P,) -> what is to be small, first things first."""
Price = Callable[[Sequence[bool], np.ndarray], np.ndarray]
"""Which exits are on, and the shares (P, exits) of a sample that leave at each -> prices (P,)."""

WEIGHTS = np.geomspace(1e-3, 10, 32)  # accuracy that the whole network's price is worth
KEPT = 6  # points from which the goal itself is followed
SLACK = 1e-12
CHEAP = 0.005  # a head that costs less of the whole is switched only for:
LEAST_GAIN = 0.03, 0.003  # of the price, and of accuracy


def most_accurate(budget: float) -> Key:
    """The key of: at most `budget` an image, then as accurate as can be, then cheap."""
    return lambda accuracy, price: (_over(price - budget * (1 + SLACK)), -accuracy, price)


def cheapest(accuracy_needed: float) -> Key:
    """The key of: at least so accurate, then as cheap as can be, then accurate."""
    return lambda accuracy, price: (_over(accuracy_needed - SLACK - accuracy), price, -accuracy)


def _over(excess: np.ndarray) -> np.ndarray:
    return np.maximum(excess, 0.0)


def that_pay(scored: Scores, price: Price, key: Key) -> tuple[bool, ...]:
    """Which exits are on, if all share a threshold: from all of them one after the other is
    switched off, the one without which the goal is served best, as long as that is better by `key`;
    and from none of them one after the other is switched on. The better end counts. A cheap head
    must gain more to be switched.

    scored: with all exits on, which say the same if others are off.
    """
    early = scored.scores.shape[1] - 1
    unpriced = np.zeros(early + 1)

    def served(enabled: tuple[bool, ...]) -> tuple[float, ...]:
        curve = shared_curve(scored, enabled, unpriced)
        return _least(key(curve.accuracy, price(enabled, curve.shares)))[1]

    cheap = cheap_heads(price, early)

    def followed(enabled: tuple[bool, ...], to: bool) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        found = served(enabled)
        while True:
            trials = [
                (served(trial), trial, cheap[index])
                for index, on in enumerate(enabled) if on != to
                for trial in [_put(enabled, index, to)]
            ]
            paying = [(rank, trial) for rank, trial, slight in trials if _pays(rank, found, slight)]
            if not paying:
                return found, enabled
            found, enabled = min(paying)

    (down, fewer), (up, more) = followed((True,) * early, False), followed((False,) * early, True)
    return more if _pays(up, down, cheap=all(cheap)) else fewer


def cheap_heads(price: Price, early: int) -> list[bool]:
    """Which early heads cost under half a percent of the whole."""
    all_on, everybody = (True,) * early, np.eye(early + 1)[-1:]
    whole = float(price(all_on, everybody)[0])
    return [
        whole - float(price(_put(all_on, index, False), everybody)[0]) < CHEAP * whole
        for index in range(early)
    ]


def per_exit(
    scored: Scores,
    price: Price,
    key: Key,
    shared: float,
    shared_on: tuple[bool, ...],
    switch: bool = True,
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """A threshold for each early exit, and which exits are on; never worse by `key` than the
    `shared` threshold for the exits in `shared_on`.

    scored: with all exits on. switch: whether exits may be switched off, which must not change what
    the others say.
    """
    enabled = (True,) * (scored.scores.shape[1] - 1)
    moves = Moves(scored, enabled, price)
    starts = [(shared,) * len(enabled), *moves.sweep(WEIGHTS)]
    starts = [starts[0], *sorted(set(starts), key=lambda start: moves.rank(start, key))[:KEPT]]
    ends = [moves.descend(start, key) for start in starts]
    best = min(ends, key=lambda end: moves.rank(end, key))
    if shared_on != enabled:
        fewer = Moves(scored, shared_on, price, moves.order)
        each = tuple(shared if on else NEVER for on in shared_on)
        end = fewer.descend(each, key)
        if _less(fewer.rank(end, key), moves.rank(best, key)):
            enabled, moves, best = shared_on, fewer, end
    cheap = cheap_heads(price, len(enabled))
    while switch and any(enabled):
        found = moves.rank(best, key)
        trials = []
        for index in moves.on:
            fewer = _put(enabled, index, False)
            without = Moves(scored, fewer, price, moves.order)
            end = without.descend(_put(best, index, NEVER), key)
            rank = without.rank(end, key)
            if _pays(rank, found, cheap[index]):
                trials.append((rank, fewer, without, end))
        if not trials:
            break
        rank, fewer, without, end = min(trials, key=lambda trial: trial[0])
        enabled, moves, best = fewer, without, end
    return moves.finite(best), enabled


def path(
    scored: Scores, price: Price, enabled: Sequence[bool], steps: int = 100
) -> list[tuple[float, ...]]:
    """Thresholds for each early exit, from never leaving early to always, falling in price: the
    most accurate found for each of `steps` budgets, from the best points of a sweep and of one
    threshold for all."""
    moves = Moves(scored, enabled, price)
    never, always = ((limit,) * len(enabled) for limit in (NEVER, -np.inf))
    curve = shared_curve(scored, enabled, np.zeros(len(enabled) + 1))
    met = {each: moves.outcome(each) for each in (never, always, *moves.sweep(WEIGHTS))}
    shared = curve.accuracy, price(enabled, curve.shares)
    found = {never, always}
    for budget in np.linspace(met[never][1], met[always][1], steps)[1:-1]:
        key = most_accurate(budget)
        best = min(met, key=lambda each: _rank(met[each], key))
        at, _ = _least(key(*shared))
        starts = best, (float(curve.thresholds[at]),) * len(enabled)
        found.add(
            min((moves.descend(each, key) for each in starts), key=lambda end: moves.rank(end, key))
        )
    found = {moves.finite(each) for each in found}
    return sorted(found, key=lambda each: moves.outcome(each)[1], reverse=True)


def _rank(outcome: tuple[float, float], key: Key) -> tuple[float, ...]:
    return tuple(float(part[0]) for part in key(*(np.array([value]) for value in outcome)))


def _worth(weight: float) -> Key:
    def key(accuracy: np.ndarray, price: np.ndarray) -> tuple[np.ndarray, ...]:
        return weight * price - accuracy, price, -accuracy

    return key


class Moves:
    """What changing one threshold does, on a sample."""

    def __init__(
        self,
        scored: Scores,
        enabled: Sequence[bool],
        price: Price,
        order: dict[int, np.ndarray] | None = None,
    ) -> None:
        """order: of the images by each exit's score, where it is known already."""
        self.scores, self.right = scored.scores, scored.right
        self.price = partial(price, enabled)
        self.on = [index for index, on in enumerate(enabled) if on]
        self.order = order or {
            index: np.argsort(-self.scores[:, index], kind="stable") for index in self.on
        }
        self.rows = np.arange(len(self.scores))

    def leaves(self, thresholds: Sequence[float]) -> np.ndarray:
        """Which exits are sure enough, (images, exits); the final one always is."""
        leaves = np.zeros(self.scores.shape, bool)
        leaves[:, -1] = True
        for index in self.on:
            leaves[:, index] = self.scores[:, index] >= thresholds[index]
        return leaves

    def finite(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """The same on this sample, where all leave at an exit by its lowest score."""
        lowest = self.scores.min(axis=0).tolist()
        return tuple(
            lowest[index] if each == -np.inf and index in self.on else
            NEVER if index not in self.on else each
            for index, each in enumerate(thresholds)
        )

    def outcome(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """Accuracy and price of one policy."""
        taken = self.leaves(thresholds).argmax(axis=1)
        shares = np.bincount(taken, minlength=self.scores.shape[1]) / len(taken)
        return float(self.right[self.rows, taken].mean()), float(self.price(shares[None])[0])

    def rank(self, thresholds: Sequence[float], key: Key) -> tuple[float, ...]:
        """The key of one policy."""
        return _rank(self.outcome(thresholds), key)

    def outcomes(
        self, thresholds: Sequence[float], index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every value that matters for the threshold of exit `index`, falling, with the accuracy
        and the mean price that it gives: three arrays (P,)."""
        leaves = self.leaves(thresholds)
        leaves[:, index] = False
        taken = leaves.argmax(axis=1)  # without this exit
        order = self.order[index]
        order = order[taken[order] > index]  # whom it can take, the surest first
        here, there = self.right[order, index], self.right[order, taken[order]]
        gained = np.cumsum(here.astype(np.int64) - there)
        values = self.scores[order, index]
        last = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)])
        count, right = len(self.rows), self.right[self.rows, taken].sum()
        leave = np.tile(np.bincount(taken, minlength=self.scores.shape[1]), (len(last) + 1, 1))
        leave[1:, index] += last + 1
        for later in range(index + 1, leave.shape[1]):
            leave[1:, later] -= np.cumsum(taken[order] == later)[last]
        return (
            np.concatenate([[NEVER], values[last].astype(np.float64)]),
            np.concatenate([[right], right + gained[last]]) / count,
            self.price(leave / count),
        )

    def sweep(self, weights: np.ndarray) -> Iterator[tuple[float, ...]]:
        """The best found of accuracy - weight x price, in units of the whole network's price, for
        every weight, from never leaving early to always and back."""
        num_exits = self.scores.shape[1]
        whole = float(self.price(np.eye(num_exits)[-1:])[0])
        for first, each in ((NEVER, weights), (-np.inf, weights[::-1])):
            thresholds = (first,) * (num_exits - 1)
            for weight in each:
                thresholds = self.descend(thresholds, _worth(weight / whole))
                yield thresholds

    def descend(self, thresholds: Sequence[float], key: Key) -> tuple[float, ...]:
        """Moves one threshold after the other to where the key is least, until none gains."""
        thresholds = tuple(thresholds)
        best, waited = self.rank(thresholds, key), 0
        for index in self._rounds():
            if waited == len(self.on):
                break
            values, *outcome = self.outcomes(thresholds, index)
            at, found = _least(key(*outcome))
            waited += 1
            if _less(found, best):
                thresholds, best, waited = _put(thresholds, index, float(values[at])), found, 1
        return thresholds

    def _rounds(self) -> Iterator[int]:
        while self.on:
            yield from self.on


def _put(values: tuple, index: int, value: object) -> tuple:
    """The tuple with another value at `index`."""
    return (*values[:index], value, *values[index + 1 :])


def _least(parts: tuple[np.ndarray, ...]) -> tuple[int, tuple[float, ...]]:
    """Where a key is least, and what it is there."""
    at = int(np.lexsort(parts[::-1])[0])
    return at, tuple(float(part[at]) for part in parts)


def _pays(found: tuple[float, ...], best: tuple[float, ...], cheap: bool) -> bool:
    """Whether the first part that differs by more than rounding is smaller; if the head is cheap,
    by what it must gain. Parts below 0 are accuracies; the first says how far a limit is passed."""
    of_price, of_accuracy = LEAST_GAIN if cheap else (0.0, 0.0)
    for index, (ours, theirs) in enumerate(zip(found, best, strict=True)):
        if abs(ours - theirs) > SLACK * max(1.0, abs(theirs)):
            least = of_price * theirs if theirs > 0 else of_accuracy
            return ours < theirs - (least if index else 0.0)
    return False


def _less(found: tuple[float, ...], best: tuple[float, ...]) -> bool:
    """Whether the first part that differs by more than rounding is smaller."""
    for ours, theirs in zip(found, best, strict=True):
        if abs(ours - theirs) > SLACK * max(1.0, abs(theirs)):
            return ours < theirs
    return False
