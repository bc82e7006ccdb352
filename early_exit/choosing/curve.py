"""One threshold for all early exits, found exactly.

As the threshold falls, an image only moves to an earlier exit, and only where the threshold passes
a score that is higher than all before it. So there are at most images x exits + 1 outcomes, and one
sort and a few running sums give the accuracy and the cost of all of them: O(M log M) for
M = images x exits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.choosing.record import Scores
from early_exit.errors import UserError
from early_exit.inference.policy import NEVER

SLACK = 1e-12  # relative, for the rounding of sums


@dataclass(frozen=True)
class Curve:
    """Every outcome of a shared threshold on a sample, from no exit taken to all taken.

    thresholds: (P,) falling; accuracy: (P,) fractions; macs: (P,) mean per image; shares: (P,
    exits) of the images that exit at each exit.
    """

    thresholds: np.ndarray
    accuracy: np.ndarray
    macs: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class _Moves:
    """Images that move from one exit to an earlier one when the threshold falls to `threshold`.

    All fields: (M,).
    """

    threshold: np.ndarray
    image: np.ndarray
    source: np.ndarray
    target: np.ndarray


def shared_curve(
    scored: Scores, enabled: Sequence[bool], macs: Sequence[float] | np.ndarray
) -> Curve:
    """The outcomes of all shared thresholds.

    macs: (exits,) the cost of an image that exits at each exit.
    """
    count, num_exits = scored.scores.shape
    cost, correct = np.asarray(macs, np.float64), scored.correct.astype(np.float64)
    moves = _all_moves(scored.scores, [index for index in range(num_exits - 1) if enabled[index]])
    # equal scores exit together: the outcome after the last move of each threshold counts
    last = np.append(moves.threshold[1:] != moves.threshold[:-1], True)[: len(moves.threshold)]
    gained = correct[moves.image, moves.target] - correct[moves.image, moves.source]
    added = cost[moves.target] - cost[moves.source]
    arrivals = [
        (moves.target == index).astype(np.int64) - (moves.source == index)
        for index in range(num_exits)
    ]
    start_correct, start_cost = correct[:, -1].sum(), cost[-1] * count
    start_shares = np.eye(num_exits)[-1:]
    shares = np.stack([np.cumsum(part)[last] for part in arrivals], axis=1) / count
    return Curve(
        np.concatenate([[NEVER], moves.threshold[last].astype(np.float64)]),
        np.concatenate([[start_correct], (start_correct + np.cumsum(gained))[last]]) / count,
        np.concatenate([[start_cost], (start_cost + np.cumsum(added))[last]]) / count,
        np.concatenate([start_shares, start_shares + shares]),
    )


def _all_moves(scores: np.ndarray, enabled: Sequence[int]) -> _Moves:
    """Every move, in order of falling threshold.

    An image exits at the first exit whose score reaches the threshold. So as the threshold falls,
    exit i takes the image at score[i] unless an exit before i reached that score, and takes it from
    the first later exit with a higher score, or else from the final one.
    """
    count, num_exits = scores.shape
    best_before = np.full(count, -np.inf, scores.dtype)
    parts = [(scores[:0, 0], *(np.empty(0, np.int64) for _ in range(3)))]
    for index in enabled:
        own = scores[:, index]
        source = np.full(count, num_exits - 1)
        for later in reversed([other for other in enabled if other > index]):
            source = np.where(scores[:, later] > own, later, source)
        rows = np.flatnonzero(own > best_before)
        parts.append((own[rows], rows, source[rows], np.full(len(rows), index)))
        best_before = np.maximum(best_before, own)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(-columns[0], kind="stable")
    return _Moves(*(column[order] for column in columns))


def for_max_drop(curve: Curve, drop: float, cost: np.ndarray | None = None) -> float:
    """The threshold of the cheapest outcome that is at most `drop` (a fraction) less accurate than
    the final exit; the first point of a curve is that exit.

    cost: (P,), of each outcome, in any unit; default: its MACs.
    """
    cost = curve.macs if cost is None else cost
    allowed = np.flatnonzero(curve.accuracy >= curve.accuracy[0] - drop - SLACK)
    return float(curve.thresholds[allowed[np.argmin(cost[allowed])]])


def for_budget(curve: Curve, macs: float) -> float:
    """The threshold of the most accurate outcome of at most `macs` multiply-adds per image.

    Raises UserError, naming the lowest possible cost, if exiting at once costs more.
    """
    threshold = _most_accurate(curve, curve.macs, macs)
    if threshold is None:
        raise UserError(
            f"a budget of {macs / 1e6:.2f} M MACs is too low: this network's exits cost at least"
            f" {curve.macs.min() / 1e6:.2f} M; allow more, or put an exit earlier"
        )
    return threshold


def for_latency(curve: Curve, seconds: np.ndarray, budget: float) -> float:
    """The threshold of the most accurate outcome that takes at most `budget` seconds.

    seconds: (P,), of each outcome of the curve. Raises UserError if none is fast enough.
    """
    threshold = _most_accurate(curve, seconds, budget)
    if threshold is None:
        raise UserError(
            f"a latency budget of {1000 * budget:.2f} ms is too low: this network's exits take at"
            f" least {1000 * seconds.min():.2f} ms; allow more, or put an exit earlier"
        )
    return threshold


def _most_accurate(curve: Curve, cost: np.ndarray, limit: float) -> float | None:
    allowed = np.flatnonzero(cost <= limit * (1 + SLACK))
    if not len(allowed):
        return None
    best = allowed[curve.accuracy[allowed] == curve.accuracy[allowed].max()]
    return float(curve.thresholds[best[np.argmin(cost[best])]])
