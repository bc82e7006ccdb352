"""Temperature scaling (Guo et al., arXiv:1706.04599): one number per exit, fitted on val."""

import math

from torch import Tensor

from early_exit.metrics import in_chunks

LIMITS = (0.05, 20.0)  # a val set without an error would drive the temperature to 0
PRECISION = 1e-7  # of ln T


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of logits / T.

    logits: (B, K) of one exit on val; target: (B,). The cross-entropy is convex in 1 / T, and its
    slope says whether the network expects larger logits than it finds on the targets; so its root
    is enclosed within `LIMITS`, in ln T. Each step looks where a straight line between
    the two ends would cross zero (regula falsi), the end that stays having half its weight so that
    it moves too (the Illinois rule; Dowell and Jarratt 1971). The answer of an exit does not depend
    on the temperature, how sure it looks does.
    """
    low, high = map(math.log, LIMITS)
    below, above = (_excess(logits, target, limit) for limit in LIMITS)
    if max(abs(below), abs(above)) <= 1e-6 * float(logits.abs().max()):
        return 1.0  # no temperature is better than another, as where all logits are alike
    if below <= 0 or above >= 0:  # the best lies at a limit, or beyond it
        return LIMITS[0] if below <= 0 else LIMITS[1]
    enough, kept = PRECISION * max(1.0, below), None
    while high - low > PRECISION:
        at = (low * above - high * below) / (above - below)
        excess = _excess(logits, target, math.exp(at))
        if abs(excess) < enough:
            return math.exp(at)
        if excess > 0:  # too sure of itself: hotter
            low, below = at, excess
            above, kept = above / 2 if kept == "high" else above, "high"
        else:
            high, above = at, excess
            below, kept = below / 2 if kept == "low" else below, "low"
    return math.exp((low + high) / 2)


def _excess(logits: Tensor, target: Tensor, temperature: float) -> float:
    """By how much the logit that the network expects at this temperature exceeds the target's."""
    total = 0.0
    for some, their in in_chunks(logits, target):
        expected = ((some / temperature).softmax(dim=-1) * some).sum(dim=-1)
        total += float((expected - some.gather(1, their[:, None]).squeeze(1)).double().sum())
    return total / len(target)
