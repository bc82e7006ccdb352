"""Numbers about answers."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 21  # logits looked at at once; those of many classes may lie on the disk
MANY_CLASSES = 10  # with more, it is also told how often the target is among the best five


def top1(logits: Tensor, target: Tensor) -> Tensor:
    """How many of the B answers are right: a scalar tensor, so nothing waits for the device.

    logits: (B, K); target: (B,).
    """
    return (logits.argmax(dim=-1) == target).sum()


def among5(logits: Tensor, target: Tensor) -> Tensor:
    """Whether each of the B targets is among the five likeliest classes, (B,).

    logits: (B, K), K at least 5; target: (B,).
    """
    return (logits.topk(5, dim=-1).indices == target[:, None]).any(dim=-1)


def in_chunks(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, K) and targets (B,), some rows at a time."""
    size = max(1, CHUNK // logits.shape[1])
    return zip(logits.split(size), target.split(size), strict=True)


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; one value has a deviation of 0."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


Bin = tuple[float, float, float]
"""Mean confidence, accuracy, and the share of all answers that lie in it."""


def reliability(
    logits: Tensor, target: Tensor, temperature: float = 1.0, bins: int = 15
) -> tuple[Bin, ...]:
    """Confidence against accuracy in bins of equal width of confidence, the empty ones left out.

    logits: (B, K), which are divided by the temperature; target: (B,).
    """
    sums = torch.zeros(3, bins, dtype=torch.float64)
    for some, their in in_chunks(logits, target):
        confidence, answer = (some / temperature).softmax(dim=-1).max(dim=-1)
        index = (confidence * bins).long().clamp(max=bins - 1)
        values = [confidence, answer == their, torch.ones_like(confidence)]
        sums.index_add_(1, index, torch.stack([value.double() for value in values]))
    confidence, right, count = sums[:, sums[2] > 0]
    table = torch.stack([confidence / count, right / count, count / len(target)])
    return tuple(tuple(column) for column in table.T.tolist())


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between confidence and accuracy (arXiv:1706.04599, equation 3), in [0, 1]."""
    return sum(share * abs(confidence - accuracy) for confidence, accuracy, share in bins)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """How often a positive row has a higher score than another one, ties counting half; None where
    all rows are alike.

    scores, positive: (B,).
    """
    count = int(positive.sum())
    if not 0 < count < len(positive):
        return None
    _, place, size = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[place]  # ties share the mean of their ranks
    above = rank[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))
