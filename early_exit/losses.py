"""The joint loss: every exit is trained, each with its weight."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from early_exit.errors import UserError


def resolve_weights(weights: Sequence[float] | None, num_exits: int) -> tuple[float, ...]:
    """One loss weight per exit, from what the user gave.

    None: 1 for every exit. `num_exits` weights: those, as in BranchyNet (arXiv:1709.01686,
    section III-B). One fewer: those of the early exits, and the final exit gets what is left to 1,
    as in Distiller.
    """
    if weights is None:
        return (1.0,) * num_exits
    weights = tuple(float(weight) for weight in weights)
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise UserError(f"loss weights must be finite and not negative, got {_listed(weights)}")
    if len(weights) == num_exits - 1:
        rest = 1.0 - math.fsum(weights)
        if rest <= 1e-9:
            raise UserError(
                f"{len(weights)} loss weights for {num_exits} exits leave the final exit 1 minus"
                f" their sum, which is {rest:g}; give smaller ones, or one weight per exit"
            )
        return (*weights, rest)
    if len(weights) != num_exits:
        raise UserError(
            f"got {len(weights)} loss weights for {num_exits} exits; give {num_exits}, or"
            f" {num_exits - 1} for the early exits alone (the final one then gets the rest to 1)"
        )
    if not any(weights):
        raise UserError("all loss weights are 0, so nothing would be trained; make one positive")
    return weights


def weights_at(
    weights: Sequence[float], start: float | None, progress: float
) -> tuple[float, ...]:
    """The loss weights at a fraction `progress` of a phase: those of the early exits rise evenly
    from `start`, if one is given (Kaya et al., ICML 2019, section 4.2: from 0.01 to the share of
    the network's cost at which the exit lies)."""
    if start is None:
        return tuple(weights)
    *early, final = weights
    return (*(min(start, full) + progress * (full - min(start, full)) for full in early), final)


def _listed(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


def joint_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    label_smoothing: float = 0.0,
    distill: float = 0.0,
    distill_temperature: float = 3.0,
) -> Tensor:
    """Weighted sum of every exit's cross-entropy (arXiv:1709.01686, equation 1), a scalar.

    logits: N tensors (B, K), shallowest exit first; target: (B,) class indices.
    `distill` > 0 adds, for every early exit, `weight * distill` times the distance to what the
    final exit says, both softened by `distill_temperature` (Hinton et al., arXiv:1503.02531; from
    the network's own last exit, Zhang et al., arXiv:1905.08094). The teacher gets no gradient.
    """
    loss = sum(
        weight * F.cross_entropy(exit_logits.float(), target, label_smoothing=label_smoothing)
        for weight, exit_logits in zip(weights, logits, strict=True)
        if weight
    )
    if distill:
        soft = distill_temperature
        teacher = F.log_softmax(logits[-1].detach().float() / soft, dim=-1)
        for weight, exit_logits in zip(weights[:-1], logits[:-1], strict=True):
            student = F.log_softmax(exit_logits.float() / soft, dim=-1)
            distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            loss = loss + weight * distill * soft**2 * distance
    return loss
