"""Temperature scaling (Guo et al., arXiv:1706.04599): one number per exit, fitted on val."""

import math

from torch import Tensor

LIMITS = (0.05, 20.0)  # a val set without an error would drive the temperature to 0
HALVINGS = 50


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of logits / T.

    logits: (B, K) of one exit on val; target: (B,). The cross-entropy is convex in 1 / T, and its
    slope says whether the network expects larger logits than it finds on the targets; so the
    interval `LIMITS` is halved, in ln T and float64. The answer of an exit does not depend on the
    temperature, how sure it looks does.
    """
    logits = logits.double()
    found = logits.gather(1, target[:, None]).squeeze(1)
    low, high = map(math.log, LIMITS)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((logits / math.exp(middle)).softmax(dim=-1) * logits).sum(dim=-1)
        if (expected - found).mean() > 0:  # too sure of itself: hotter
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
