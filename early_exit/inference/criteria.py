"""Exit criteria: from the logits of the exits so far to an answer and how sure it is.

`criterion(logits, state) -> answer, score, state`: logits (B, K), already divided by the exit's
temperature; answer (B, K), logits too; score (B,), higher is surer; state a tensor with one row per
image, or None. A criterion sees no label, no other image of the batch and no model.

A criterion declares its special properties with `@declare(...)`; no code depends on its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from early_exit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    Criterion = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]

Bound = float | Callable[[float, float], float]
"""A number, or a function of the number of classes and the number of enabled early exits. Where one
of the two is not known, it is infinity."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The properties of a criterion that other code depends on."""

    lowest: Bound = -math.inf
    """No score is below this."""
    highest: Bound = math.inf
    """No score is above this."""
    min_early_exits: int = 1
    """Early exits it needs."""
    keeps_state: bool = False
    """Whether an exit's score or answer depends on the exits before it."""
    counts: bool = False
    """Whether scores are whole numbers, which rounding does not change."""
    unit: str = ""
    """What a score is, if the criterion's name does not tell."""

    def range(
        self, num_classes: float = math.inf, early_exits: float = math.inf
    ) -> tuple[float, float]:
        """The lowest and the highest score."""
        low, high = (
            bound(num_classes, early_exits) if callable(bound) else bound
            for bound in (self.lowest, self.highest)
        )
        return low, high


def declare(**traits: Any) -> Callable[[Criterion], Criterion]:
    """Declares the special properties of a criterion: fields of `Traits`. One that declares nothing
    has their defaults."""

    def attach(criterion: Criterion) -> Criterion:
        setattr(criterion, "traits", Traits(**traits))  # noqa: B010
        return criterion

    return attach


@declare(lowest=lambda classes, _: 1 / classes, highest=1.0)
def max_prob(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
    """The probability of the best class, in [1/K, 1]."""
    # 1 / sum exp(logit - best): the largest entry of the softmax without the other ones
    best = logits.amax(dim=-1, keepdim=True)
    return logits, (logits - best).exp().sum(dim=-1).reciprocal(), None


@declare(
    lowest=lambda classes, _: -math.log(classes), highest=0.0, unit="minus the entropy in nats"
)
def entropy(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
    """Minus the entropy in nats, in [-ln K, 0].

    In BranchyNet (arXiv:1709.01686, section III-C) a sample exits if the entropy is below T. That
    is a score of at least -T, so its thresholds carry over with the opposite sign.
    """
    log_probs = logits.log_softmax(dim=-1)
    return logits, (log_probs.exp() * log_probs).sum(dim=-1), None


@declare(lowest=0.0, highest=1.0)
def margin(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
    """How far the best class is ahead of the second, in [0, 1] (Scheffer et al. 2001)."""
    best, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return logits, best - second, None


@declare(
    lowest=0.0,
    highest=lambda _, early_exits: early_exits - 1,
    min_early_exits=2,
    keeps_state=True,
    counts=True,
)
def patience(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """How many exits in a row have repeated the answer before them (PABEE, arXiv:2006.04152).

    state: (B, 2) int64, the class of the last exit and the count. The first exit scores 0, so a
    threshold of p waits for p agreements.
    """
    import torch  # needed to run the criterion, not to declare it

    best = logits.argmax(dim=-1)
    if state is None:
        count = torch.zeros_like(best)
    else:
        count = torch.where(best == state[:, 0], state[:, 1] + 1, 0)
    return logits, count.float(), torch.stack([best, count], dim=-1)


CRITERIA: dict[str, Criterion] = {
    "max_prob": max_prob,
    "entropy": entropy,
    "margin": margin,
    "patience": patience,
}
"""Criteria by name. Add yours to the dictionary under a new key before a policy uses it."""


def get_criterion(name: str) -> Criterion:
    """The criterion called `name`."""
    if not isinstance(name, str) or name not in CRITERIA:
        raise UserError(f"there is no criterion {name!r}; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]


def get_traits(name: str) -> Traits:
    """What the criterion called `name` declares."""
    return getattr(get_criterion(name), "traits", Traits())


def check_threshold(
    name: str,
    threshold: float,
    owner: str,
    num_classes: float = math.inf,
    early_exits: float = math.inf,
    slack: float = 0.0,
) -> None:
    """Raises UserError for a threshold that no score can reach or that every score reaches.

    Infinity is accepted: it means that no image exits. owner: the flag or what else the threshold
    belongs to. slack: a threshold that is at most this far beyond the range is accepted too; 0: one
    that equals the lowest score is not.
    """
    traits = get_traits(name)
    low, high = traits.range(num_classes, early_exits)
    if math.isnan(threshold) or threshold == -math.inf:
        value = "nan" if math.isnan(threshold) else "minus infinity"
        raise UserError(f"{owner} {value} is not a threshold; expected a score of {name}")
    never = high + slack < threshold < math.inf
    if not never and (threshold >= low - slack if slack else threshold > low):
        return
    unit = f" ({traits.unit})" if traits.unit else ""
    meant = None
    if high == 1 and not traits.counts and 2 <= threshold <= 100:  # a percentage
        meant = threshold / 100
    elif never and high <= 0 and low < -threshold:  # an entropy instead of a score
        meant = -threshold
    flag = f"{owner}=" if owner.startswith("--") else ""
    hint = "" if meant is None else f"; try {flag}{meant:g}"
    span = f"{low:g} to {high:g}"
    if math.inf in (-low, high):
        span = f"at most {high:g}" if high < math.inf else f"at least {low:g}"
    raise UserError(
        f"{owner} {threshold:g} is out of range: {'no' if never else 'every'} score reaches it;"
        f" scores of {name}{unit} are {span}{hint}"
    )


def apply_criterion(
    name: str, logits: Tensor, temperature: float, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Answer, score and new state of one exit.

    logits: (B, K), not yet divided by the temperature. Everything is float32, whatever the network
    ran in. Raises UserError for an answer or score of another shape, and for a state that the
    criterion does not declare.
    """
    logits = logits.float() / temperature
    answer, score, state = get_criterion(name)(logits, state)
    if answer.shape != logits.shape or score.shape != logits.shape[:1]:
        raise UserError(
            f"the criterion {name} returned an answer {tuple(answer.shape)} and a score"
            f" {tuple(score.shape)} for logits {tuple(logits.shape)}; expected an answer (B, K) and"
            " a score (B,)"
        )
    if state is not None and not get_traits(name).keeps_state:
        raise UserError(
            f"the criterion {name} returned a state without declaring it; put"
            " @declare(keeps_state=True) above it"
        )
    return answer, score, state
