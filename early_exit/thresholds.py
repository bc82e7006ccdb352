"""Choosing thresholds on val.

One threshold shared by all early exits is found exactly. As it falls, an image's exit only moves
to the front, and only where the threshold passes a score that is higher than all before it; so
every threshold there is gives one of at most images x exits + 1 outcomes, and one sort and two
running sums give the accuracy and the cost of all of them: O(M log M) for M = images x exits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.errors import UserError
from early_exit.policy import NEVER
from early_exit.records import Scores


@dataclass(frozen=True)
class Curve:
    """Every outcome a shared threshold can have on a sample, from never leaving early to always.

    thresholds: (P,) falling; accuracy: (P,) fractions; macs: (P,) mean per image; shares: (P,
    exits) of the images that leave at each exit.
    """

    thresholds: np.ndarray
    accuracy: np.ndarray
    macs: np.ndarray
    shares: np.ndarray


def shared_curve(scored: Scores, enabled: Sequence[bool], macs: Sequence[int]) -> Curve:
    """The outcomes of all shared thresholds.

    macs: (exits,) what an image costs that leaves at each exit.
    """
    count, num_exits = scored.scores.shape
    on = [index for index in range(num_exits - 1) if enabled[index]]
    price = np.asarray(macs, np.float64)
    right = scored.right
    # An image leaves at the first exit whose score reaches the threshold: as that falls, exit i
    # takes the image at score[i] if no exit before i reached as much, from the next exit that had.
    best_before = np.full(count, -np.inf, np.float32)
    steps: list[tuple[np.ndarray, ...]] = []  # threshold, d right, d price, from and to which exit
    takers = {index: scored.scores[:, index] for index in on}
    for index in on:
        scores = takers[index]
        takes = scores > best_before
        # who holds the image just before: the first later exit with a higher score, else the last
        holder = np.full(count, num_exits - 1)
        for later in reversed([other for other in on if other > index]):
            holder = np.where(takers[later] > scores, later, holder)
        rows = np.flatnonzero(takes)
        gained = right[rows, index].astype(np.float64) - right[rows, holder[rows]]
        saved = price[index] - price[holder[rows]]
        steps.append((scores[rows], gained, saved, holder[rows], np.full(len(rows), index)))
        best_before = np.maximum(best_before, scores)
    start_right, start_price = right[:, -1].sum(), price[-1] * count
    start_shares = np.eye(num_exits)[-1:]
    if not steps:
        only = np.array([NEVER])
        start = np.array([start_right / count]), np.array([price[-1]])
        return Curve(only, *start, start_shares)
    at, gained, saved, source, target = (
        np.concatenate(part) for part in zip(*steps, strict=True)
    )
    order = np.argsort(-at, kind="stable")
    at, gained, saved = at[order], gained[order], saved[order]
    last_of_value = np.append(at[1:] != at[:-1], True)  # equal scores leave together
    accuracy = (start_right + np.cumsum(gained))[last_of_value] / count
    mean_price = (start_price + np.cumsum(saved))[last_of_value] / count
    moved = [
        np.cumsum((target[order] == index).astype(np.int64) - (source[order] == index))
        for index in range(num_exits)
    ]
    shares = start_shares + np.stack([part[last_of_value] for part in moved], axis=1) / count
    return Curve(
        np.concatenate([[NEVER], at[last_of_value].astype(np.float64)]),
        np.concatenate([[start_right / count], accuracy]),
        np.concatenate([[price[-1]], mean_price]),
        np.concatenate([start_shares, shares]),
    )


def for_max_drop(curve: Curve, drop: float) -> float:
    """The threshold of the cheapest outcome that is at most `drop` (a fraction) less accurate than
    the final exit on its own; the first point of a curve is that exit."""
    good = curve.accuracy >= curve.accuracy[0] - drop - 1e-12
    candidates = np.flatnonzero(good)
    return float(curve.thresholds[candidates[np.argmin(curve.macs[candidates])]])


def for_budget(curve: Curve, macs: float) -> float:
    """The threshold of the most accurate outcome of at most `macs` multiply-adds an image.

    Raises UserError where even leaving at once costs more, naming the least it can cost.
    """
    if (found := _most_accurate(curve, curve.macs, macs)) is None:
        raise UserError(
            f"a budget of {macs / 1e6:.2f} M MACs cannot be kept: the least this network's exits"
            f" cost is {curve.macs.min() / 1e6:.2f} M; ask for more, or put an exit further up"
        )
    return found


def for_latency(curve: Curve, seconds: np.ndarray, budget: float) -> float:
    """The threshold of the most accurate outcome that takes at most `budget` seconds.

    seconds: (P,), what each outcome of the curve takes. Raises UserError where none is fast enough.
    """
    if (found := _most_accurate(curve, seconds, budget)) is None:
        raise UserError(
            f"{1000 * budget:.2f} ms cannot be kept: the least this network's exits take is"
            f" {1000 * seconds.min():.2f} ms; ask for more, or put an exit further up"
        )
    return found


def _most_accurate(curve: Curve, price: np.ndarray, limit: float) -> float | None:
    candidates = np.flatnonzero(price <= limit * (1 + 1e-12))
    if not len(candidates):
        return None
    best = curve.accuracy[candidates].max()
    equal = candidates[curve.accuracy[candidates] == best]
    return float(curve.thresholds[equal[np.argmin(price[equal])]])


def geometric(scored: Scores, enabled: Sequence[bool], ratio: float) -> tuple[float, ...]:
    """MSDNet's budgeted batch classification (Huang et al., arXiv:1703.09844, section 4.2): each
    exit takes `ratio` times as many images of the sample as the one before, the surest of those
    that are left."""
    num_exits = scored.scores.shape[1]
    on = [index for index in range(num_exits - 1) if enabled[index]]
    wanted = ratio ** np.arange(len(on) + 1.0)
    wanted = wanted / wanted.sum() * len(scored.scores)
    chosen = [NEVER] * (num_exits - 1)
    left = np.ones(len(scored.scores), bool)
    for index, number in zip(on, np.round(wanted).astype(int).tolist()[:-1], strict=True):
        scores = np.sort(scored.scores[left, index])[::-1]
        if number and len(scores):
            chosen[index] = float(scores[min(number, len(scores)) - 1])
        left &= scored.scores[:, index] < chosen[index]
    return tuple(chosen)
