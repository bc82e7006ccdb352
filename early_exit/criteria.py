"""Exit criteria: what the exits have said so far -> an answer and how sure it is.

`criterion(logits, state) -> answer, score, state`: logits (B, K), already divided by the exit's
temperature; answer (B, K), logits too; score (B,), higher is surer; state a tensor of one row per
image, or None. A criterion sees no label, no other image of the batch and no model.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from early_exit.errors import UserError

Criterion = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def max_prob(logits: Tensor, state: None = None) -> tuple[Tensor, Tensor, None]:
    """The probability of the best class, in (0, 1]."""
    # 1 / sum exp(logit - best): the softmax's largest entry without its other ones.
    best = logits.amax(dim=-1, keepdim=True)
    return logits, (logits - best).exp().sum(dim=-1).reciprocal(), None


def entropy(logits: Tensor, state: None = None) -> tuple[Tensor, Tensor, None]:
    """Minus the entropy in nats, in [-ln K, 0].

    BranchyNet (arXiv:1709.01686, section III-C) leaves where the entropy is below T: that is a
    score of at least -T, so its thresholds keep their value but for the sign.
    """
    log_probs = logits.log_softmax(dim=-1)
    return logits, (log_probs.exp() * log_probs).sum(dim=-1), None


def margin(logits: Tensor, state: None = None) -> tuple[Tensor, Tensor, None]:
    """How far the best class is ahead of the second, in [0, 1] (Scheffer et al. 2001)."""
    best, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return logits, best - second, None


def patience(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """How many exits in a row have repeated the answer before them (PABEE, arXiv:2006.04152).

    state: (B, 2) int64, the last exit's class and the count. The first exit scores 0, so a
    threshold of p waits for p agreements, and at least two early exits are needed.
    """
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
"""By name. Another one is put in under its own, before a policy asks for it."""


def get_criterion(name: str) -> Criterion:
    """The criterion called `name`."""
    if name not in CRITERIA:
        raise UserError(f"no criterion is called {name!r}; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
