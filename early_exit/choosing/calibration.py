"""Temperature scaling (Guo et al., arXiv:1706.04599): one number per exit, fitted on val."""

import math

from torch import Tensor

from early_exit.metrics import in_chunks

LIMITS = (0.05, 20.0)  # without a limit, the temperature falls to 0 if no val answer is wrong
# How far ahead the best logit may be after the division. Its class then has a probability of
# 1 - e^-16, two steps of float32 below 1, or without an error on val 1 - e^-10, 760 steps below 1.
FURTHEST, FURTHEST_WITHOUT_ERROR = 16.0, 10.0
PRECISION = 1e-7  # of ln T


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T that minimises the mean cross-entropy of logits / T, and keeps the scores
    of the most confident images distinct in float32.

    logits: (B, K) of one exit on val; target: (B,). Temperatures do not change an exit's answers,
    only its confidence.

    A low temperature rounds the probabilities of many images to 1 in float32, and then no threshold
    separates them. Therefore T falls below 1 only as far as float32 resolves the image whose best
    logit is furthest ahead (`FURTHEST`). If no answer is wrong, the cross-entropy has no minimum:
    it falls with T. Then T is set by that image alone, above 1 or below.
    """
    best_two = (chunk.topk(2, dim=-1).values for chunk, _ in in_chunks(logits, target))
    margin = max(float((two[:, 0] - two[:, 1]).max()) for two in best_two)
    fitted, (low, high) = _minimise(logits, target, margin), LIMITS
    if fitted == low:
        return min(max(low, margin / FURTHEST_WITHOUT_ERROR), high)
    return max(fitted, min(1.0, margin / FURTHEST))


def _minimise(logits: Tensor, target: Tensor, margin: float) -> float:
    """The temperature within `LIMITS` that minimises the mean cross-entropy.

    margin: the largest distance between the best logit of an image and the second.

    The cross-entropy is convex in 1 / T, so its minimum within `LIMITS` is at a limit or at the
    only root of its derivative (`_derivative`). The root is bracketed in ln T and found by regula
    falsi: the next T is where the line through the two ends of the bracket crosses zero. If an end
    stays twice in a row, its value is halved, so that it moves too (the Illinois algorithm; Dowell
    and Jarratt 1971).
    """
    low, high = map(math.log, LIMITS)
    at_low, at_high = (_derivative(logits, target, limit) for limit in LIMITS)
    largest = max(float(chunk.abs().max()) for chunk, _ in in_chunks(logits, target))
    if max(abs(at_low), abs(at_high), margin) <= 1e-6 * largest:
        return 1.0  # every temperature is equally good, as when all logits are equal
    if at_low <= 0 or at_high >= 0:  # the minimum is at a limit or beyond it
        return LIMITS[0] if at_low <= 0 else LIMITS[1]
    tolerance = PRECISION * max(1.0, at_low)
    last_moved = None
    while high - low > PRECISION:
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        value = _derivative(logits, target, math.exp(middle))
        if abs(value) < tolerance:
            return math.exp(middle)
        if value > 0:  # overconfident: T must be higher
            low, at_low = middle, value
            at_high = at_high / 2 if last_moved == "low" else at_high
            last_moved = "low"
        else:
            high, at_high = middle, value
            at_low = at_low / 2 if last_moved == "high" else at_low
            last_moved = "high"
    return math.exp((low + high) / 2)


def _derivative(logits: Tensor, target: Tensor, temperature: float) -> float:
    """The derivative of the mean cross-entropy by 1 / T: the mean of the expected logit under the
    probabilities at this temperature, minus the target's logit. Positive if overconfident."""
    total = 0.0
    for logits_chunk, target_chunk in in_chunks(logits, target):
        probs = (logits_chunk / temperature).softmax(dim=-1)
        expected = (probs * logits_chunk).sum(dim=-1)
        target_logits = logits_chunk.gather(1, target_chunk[:, None]).squeeze(1)
        total += float((expected - target_logits).double().sum())
    return total / len(target)
