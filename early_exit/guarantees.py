"""Thresholds that come with a guarantee about what leaving early costs.

Both ways compare an early answer with the full network's on the same image, which gives each image
a loss of 0 or 1 (`LOSSES`); the mean of either loss is no less than the accuracy given up. Both go
down a list of policies, from never leaving early to always, that was fixed before the certifying
images were seen, and go as far as those allow:

- `with_confidence`: Learn then Test (Angelopoulos et al., arXiv:2110.01052) by fixed-sequence
  testing. Policy j is accepted if so few losses among n images had a probability of at most 1 -
  confidence, were its risk just above the one allowed: P(Bin(n, risk) <= losses). The walk ends at
  the first one that is not, so all tests together err with that probability at most.
- `on_average`: conformal risk control (Angelopoulos et al., arXiv:2208.02814). The expectation of
  the risk, over certifying images and the next one, is at most the one allowed. A loss counts from
  the first policy on at which it occurs (its running supremum), since it may vanish again further
  down, and the method needs losses that only grow.

Either holds for images drawn as the certifying ones were, and for nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.errors import UserError
from early_exit.policy import Policy
from early_exit.records import Scores

LOSSES = {
    "wrong": "the full network is right and the early answer is wrong",
    "differs": "the early answer differs from the full network's",
}


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What is guaranteed, and on what ground. It travels in the policy's file."""

    risk: float
    """The mean loss is at most this, a fraction."""
    confidence: float | None
    """With this probability over the draw of the certifying images; None: on average over them."""
    loss: str
    """Name of the loss (`LOSSES`)."""
    images: int
    """Certifying images."""
    losses: int
    """How many of them are lost under the policy."""
    data: str
    """The split they come from, and its hash."""

    def __str__(self) -> str:
        how = (
            "on average over the draw of the certifying images"
            if self.confidence is None
            else f"with probability {100 * self.confidence:g} % over the draw of the certifying"
            " images"
        )
        return (
            f"{LOSSES[self.loss]} for at most {100 * self.risk:g} % of images drawn as the"
            f" {self.images:,} certifying ones ({self.data}), {how};"
            " void for images of another kind"
        )


def losses_of(scored: Scores, policies: Sequence[Policy], loss: str) -> np.ndarray:
    """Which images each policy loses, (policies, images) bool.

    The policies share the criterion, temperatures and switches that `scored` was made with.
    """
    kept, rows = as_kept(scored, loss).right, np.arange(len(scored.targets))
    return np.array([~kept[rows, scored.exit_index(policy)] for policy in policies])


def as_kept(scored: Scores, loss: str) -> Scores:
    """The same scores, where an exit is right that does not lose the image."""
    full = scored.answers[:, -1:]
    counts = full == scored.targets[:, None] if loss == "wrong" else np.ones_like(full, bool)
    lost = counts & (scored.answers != full)
    answers, targets = (~lost).astype(np.int64), np.ones_like(scored.targets)
    return Scores(scored.scores, answers, targets, remembers=scored.remembers)


def with_confidence(lost: np.ndarray, risk: float, confidence: float) -> int:
    """How far down the list of policies the walk goes; the index of the last that is accepted.

    lost: (policies, images) bool. Raises UserError where there are too few images to accept even a
    policy that loses none.
    """
    images = lost.shape[1]
    if tail(images, 0, risk) > 1 - confidence:
        raise UserError(
            f"{images} certifying images are too few for a risk of {100 * risk:g} % with a"
            f" confidence of {100 * confidence:g} %: that takes"
            f" {images_needed(risk, confidence):,} without a loss; ask for less, or hold out more"
        )
    accepted = -1
    for number in lost.sum(axis=1).tolist():
        if tail(images, number, risk) > 1 - confidence:
            break
        accepted += 1
    return _at_least_one(accepted)


def on_average(lost: np.ndarray, risk: float) -> int:
    """As `with_confidence`, in expectation (arXiv:2208.02814, equation 4, losses of at most 1)."""
    images = lost.shape[1]
    if 1 / (images + 1) > risk:
        raise UserError(
            f"{images} certifying images are too few for a risk of {100 * risk:g} % on average:"
            f" that takes {math.ceil(1 / risk) - 1:,}; ask for less, or hold out more"
        )
    ever = np.logical_or.accumulate(lost, axis=0).sum(axis=1)
    return _at_least_one(int(((ever + 1) / (images + 1) <= risk).sum()) - 1)


def _at_least_one(accepted: int) -> int:
    if accepted < 0:
        raise ValueError("the list of policies must begin with one that loses nothing")
    return accepted


def tail(images: int, losses: int, risk: float) -> float:
    """P(Bin(images, risk) <= losses), exact but for rounding."""
    if losses >= images:
        return 1.0
    ways = [
        math.lgamma(images + 1) - math.lgamma(number + 1) - math.lgamma(images - number + 1)
        + number * math.log(risk) + (images - number) * math.log1p(-risk)
        for number in range(losses + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, ways)))


def images_needed(risk: float, confidence: float) -> int:
    """How many images without a loss certify a risk."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-risk))
