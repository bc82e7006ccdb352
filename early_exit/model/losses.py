"""The joint loss: a weighted sum over the exits."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from early_exit.errors import UserError


def resolve_weights(weights: Sequence[float] | None, num_exits: int) -> tuple[float, ...]:
    """One loss weight per exit, from the weights in the configuration.

    None gives every exit the weight 1. `num_exits` weights are taken as they are, as in BranchyNet
    (arXiv:1709.01686, section III-B). With one fewer, they are those of the early exits, and the
    final exit gets 1 minus their sum, as in Distiller. Raises UserError for other numbers of
    weights, and if a weight is negative, not finite, or all are 0.
    """
    if weights is None:
        return (1.0,) * num_exits
    weights = tuple(float(weight) for weight in weights)
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise UserError(f"loss weights must be finite and not negative, got {_join(weights)}")
    if len(weights) == num_exits - 1:
        final = 1.0 - math.fsum(weights)
        if final <= 1e-9:
            raise UserError(
                f"{len(weights)} loss weights for {num_exits} exits give the final exit 1 minus"
                f" their sum, which is {final:g}; give smaller ones, or one weight per exit"
            )
        return (*weights, final)
    if len(weights) != num_exits:
        raise UserError(
            f"got {len(weights)} loss weights for {num_exits} exits; give {num_exits}, or"
            f" {num_exits - 1} for the early exits (the final exit then gets 1 minus their sum)"
        )
    if not any(weights):
        raise UserError("all loss weights are 0, so nothing would be trained; make one positive")
    return weights


def weights_at(weights: Sequence[float], start: float | None, progress: float) -> tuple[float, ...]:
    """The loss weights (N,) at a fraction `progress` of a phase.

    With a `start`, those of the early exits rise linearly from it (Kaya et al., ICML 2019, section
    4.2: from 0.01 to the share of the network's cost at the exit). Without, they are constant.
    """
    if start is None:
        return tuple(weights)
    *early, final = weights
    return (*(min(start, full) + progress * (full - min(start, full)) for full in early), final)


def _join(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


def joint_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    label_smoothing: float = 0.0,
    distill: float = 0.0,
    distill_temperature: float = 3.0,
    teacher: Tensor | None = None,
    teacher_weight: float = 1.0,
) -> Tensor:
    """Weighted sum of every exit's cross-entropy (arXiv:1709.01686, equation 1), a scalar.

    logits: N tensors (B, K), shallowest exit first; target: (B,) class indices.
    weights: N. `distill` > 0 adds, for every early exit, `weight * distill * temperature**2` times
    the Kullback-Leibler divergence between its softmax and that of the final exit, both at
    `distill_temperature` (Hinton et al., arXiv:1503.02531; from the network's own final exit, Zhang
    et al., arXiv:1905.08094). The final exit gets no gradient from it. With the logits (B, K) of a
    `teacher`, every exit gets the same from those, times `teacher_weight`.
    """
    sources = [(logits[-1].detach(), distill, len(logits) - 1)] if distill else []
    if teacher is not None:
        sources.append((teacher, teacher_weight, len(logits)))
    loss: Tensor = 0  # type: ignore[assignment]
    for number, (weight, exit_logits) in enumerate(zip(weights, logits, strict=True)):
        if not weight:
            continue
        exit_logits = exit_logits.float()
        losses = F.cross_entropy(
            exit_logits, target, label_smoothing=label_smoothing, reduction="none"
        )
        for source, scale, taught in sources:
            if number < taught:
                losses = losses + scale * divergence(exit_logits, source, distill_temperature)
        loss = loss + weight * losses.mean()
    return loss


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`temperature**2` times the Kullback-Leibler divergence of two softmaxes at `temperature`,
    from logits (B, K) to (B,)."""
    log_probs = F.log_softmax(student.float() / temperature, dim=-1)
    taught = F.log_softmax(teacher.float() / temperature, dim=-1)
    terms = F.kl_div(log_probs, taught, reduction="none", log_target=True)
    return temperature**2 * terms.sum(dim=-1)
