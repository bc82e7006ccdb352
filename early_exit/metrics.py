"""Metrics: accuracy, calibration, and how well a score ranks."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 21  # logits processed at once; a large record is memory-mapped
MANY_CLASSES = 10  # with more than these, top-5 accuracy is reported too


def top1(logits: Tensor, target: Tensor) -> Tensor:
    """How many of the B answers are correct: a scalar tensor, so nothing waits for the device.

    logits: (B, K); target: (B,).
    """
    return (logits.argmax(dim=-1) == target).sum()


def in_top5(logits: Tensor, target: Tensor) -> Tensor:
    """Whether each of the B targets is among the five most likely classes: (B,), boolean.

    logits: (B, K), K at least 5; target: (B,).
    """
    return (logits.topk(5, dim=-1).indices == target[:, None]).any(dim=-1)


def in_chunks(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, K) and targets (B,), split into chunks of rows."""
    size = max(1, CHUNK // logits.shape[1])
    return zip(logits.split(size), target.split(size), strict=True)


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


Bin = tuple[float, float, float]
"""Mean confidence, accuracy, and the share of all rows that are in the bin."""


def reliability(
    logits: Tensor, target: Tensor, temperature: float = 1.0, bins: int = 15
) -> tuple[Bin, ...]:
    """Confidence against accuracy, in bins of equal width of confidence; empty bins are omitted.

    logits: (B, K), which are divided by `temperature`; target: (B,).
    """
    sums = torch.zeros(3, bins, dtype=torch.float64)
    for logits_chunk, target_chunk in in_chunks(logits, target):
        confidence, answer = (logits_chunk / temperature).softmax(dim=-1).max(dim=-1)
        index = (confidence * bins).long().clamp(max=bins - 1)
        values = [confidence, answer == target_chunk, torch.ones_like(confidence)]
        sums.index_add_(1, index, torch.stack([value.double() for value in values]))
    confidence, correct, count = sums[:, sums[2] > 0]
    table = torch.stack([confidence / count, correct / count, count / len(target)])
    return tuple(tuple(column) for column in table.T.tolist())


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between confidence and accuracy (arXiv:1706.04599, equation 3), in [0, 1]."""
    return sum(share * abs(confidence - accuracy) for confidence, accuracy, share in bins)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive row has a higher score than a negative one,
    ties counting half. None if all rows are positive or all are negative.

    scores: (B,); positive: (B,), boolean.
    """
    count = int(positive.sum())
    if not 0 < count < len(positive):
        return None
    _, tie, size = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[tie]  # tied rows share the mean of their ranks
    pairs_won = rank[positive].sum() - count * (count + 1) / 2
    return float(pairs_won / (count * (len(positive) - count)))
