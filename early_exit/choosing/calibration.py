"""Temperature scaling (Guo et al., arXiv:1706.04599): one number per exit, fitted on val."""

import math

from torch import Tensor

from early_exit.metrics import in_chunks

LIMITS = (0.05, 20.0)  # without a limit, the temperature falls to 0 if no val answer is wrong
PRECISION = 1e-7  # of ln T


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T that minimises the mean cross-entropy of logits / T.

    logits: (B, K) of one exit on val; target: (B,). Temperatures do not change an exit's answers,
    only its confidence.

    The cross-entropy is convex in 1 / T, so its minimum within `LIMITS` is at a limit or at the
    only root of its derivative (`_derivative`). The root is bracketed in ln T and found by regula
    falsi: the next T is where the line through the two ends of the bracket crosses zero. If an end
    stays twice in a row, its value is halved, so that it moves too (the Illinois algorithm; Dowell
    and Jarratt 1971).
    """
    low, high = map(math.log, LIMITS)
    at_low, at_high = (_derivative(logits, target, limit) for limit in LIMITS)
    largest = max(float(chunk.abs().max()) for chunk, _ in in_chunks(logits, target))
    if max(abs(at_low), abs(at_high)) <= 1e-6 * largest:
        return 1.0  # every temperature is equally good, for example if all logits are equal
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
