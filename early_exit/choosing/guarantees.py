"""Thresholds with a guarantee about what early exits cost.

Both methods compare the early answer with the full network's on the same image. That gives each
image a loss of 0 or 1 (`LOSSES`); the mean of either loss is at least the accuracy given up. Both
go through a list of policies, from no exit taken to all taken, that was fixed before the certifying
images were seen, and return the last policy that these images support:

- `with_confidence`: Learn then Test (Angelopoulos et al., arXiv:2110.01052) by fixed-sequence
  testing. A policy is accepted if so few losses among n images would have a probability of at most
  1 - confidence if its true risk were just above `risk`: P(Bin(n, risk) <= losses). The tests stop
  at the first policy that is not accepted, so all tests together err with at most that probability.
- `on_average`: conformal risk control (Angelopoulos et al., arXiv:2208.02814). The expected risk,
  over the certifying images and the next one, is at most `risk`. The method needs losses that never
  fall along the list, but an image's loss may vanish again at a later policy. So it counts from the
  first policy at which it occurs (the running maximum).

Either guarantee holds only for images from the same distribution as the certifying ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.choosing.record import Scores
from early_exit.errors import UserError
from early_exit.inference.policy import Policy

LOSSES = {
    "wrong": "the full network is right and the early answer is wrong",
    "differs": "the early answer differs from the full network's",
}


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What is guaranteed, and from which images. It is stored in the policy's file."""

    risk: float
    """The mean loss is at most this, a fraction."""
    confidence: float | None
    """The probability of that, over the draw of the certifying images; None: the guarantee is on
    average over them."""
    loss: str
    """Name of the loss (`LOSSES`)."""
    images: int
    """Number of certifying images."""
    losses: int
    """Number of them with a loss under the policy."""
    data: str
    """The split of the certifying images, and its hash."""

    def __str__(self) -> str:
        how = "on average"
        if self.confidence is not None:
            how = f"with probability {100 * self.confidence:g} %"
        return (
            f"{LOSSES[self.loss]} for at most {100 * self.risk:g} % of images from the same"
            f" distribution as the {self.images:,} certifying ones ({self.data}), {how} over the"
            " draw of the certifying images; this does not hold for other images"
        )


def losses_of(scored: Scores, policies: Sequence[Policy], loss: str) -> np.ndarray:
    """Which images each policy loses, (policies, images) bool.

    scored: made with the criterion, temperatures and enabled exits that all policies share; loss: a
    name in `LOSSES`.
    """
    lost = ~with_losses_as_errors(scored, loss).correct  # (images, exits)
    images = np.arange(len(scored.targets))
    return np.array([lost[images, scored.exit_index(policy)] for policy in policies])


def with_losses_as_errors(scored: Scores, loss: str) -> Scores:
    """The same scores, with an exit counted as correct for the images that it does not lose."""
    full = scored.answers[:, -1:]
    can_be_lost = full == scored.targets[:, None] if loss == "wrong" else np.ones_like(full, bool)
    lost = can_be_lost & (scored.answers != full)
    answers, targets = (~lost).astype(np.int64), np.ones_like(scored.targets)
    return Scores(scored.scores, answers, targets)


def with_confidence(lost: np.ndarray, risk: float, confidence: float) -> int:
    """The index of the last policy whose risk is at most `risk` with probability `confidence`.

    lost: (policies, images) bool. Raises UserError if there are too few images to accept even a
    policy without a loss.
    """
    images = lost.shape[1]
    if binomial_cdf(images, 0, risk) > 1 - confidence:
        raise UserError(
            f"{images} certifying images are too few for a risk of {100 * risk:g} % with a"
            f" confidence of {100 * confidence:g} %: that takes"
            f" {images_needed(risk, confidence):,} without a loss; allow more risk, or hold out"
            " more val images"
        )
    accepted = 0
    for losses in lost.sum(axis=1).tolist():
        if binomial_cdf(images, losses, risk) > 1 - confidence:
            break
        accepted += 1
    return _last_index(accepted)


def on_average(lost: np.ndarray, risk: float) -> int:
    """The index of the last policy whose expected risk is at most `risk` (arXiv:2208.02814,
    equation 4, for losses of at most 1).

    lost: (policies, images) bool. Raises UserError if there are too few images.
    """
    images = lost.shape[1]
    if 1 / (images + 1) > risk:
        raise UserError(
            f"{images} certifying images are too few for a risk of {100 * risk:g} % on average:"
            f" that takes {math.ceil(1 / risk) - 1:,}; allow more risk, or hold out more val images"
        )
    losses = np.logical_or.accumulate(lost, axis=0).sum(axis=1)
    return _last_index(int(((losses + 1) / (images + 1) <= risk).sum()))


def _last_index(accepted: int) -> int:
    if accepted == 0:
        raise ValueError("the list of policies must begin with one that loses nothing")
    return accepted - 1


def binomial_cdf(images: int, losses: int, risk: float) -> float:
    """P(Bin(images, risk) <= losses), exact except for rounding. risk: between 0 and 1."""
    if losses >= images:
        return 1.0
    log_probabilities = [
        math.lgamma(images + 1)
        - math.lgamma(number + 1)
        - math.lgamma(images - number + 1)
        + number * math.log(risk)
        + (images - number) * math.log1p(-risk)
        for number in range(losses + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, log_probabilities)))


def images_needed(risk: float, confidence: float) -> int:
    """The smallest number of images that certify a risk if none of them has a loss."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-risk))
