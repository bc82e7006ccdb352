"""What the gradients of the heads, and of the rest of the network, do to the features between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit.model.features import Features


@dataclass(frozen=True)
class GradientFlow:
    """How the gradients that meet at an exit are scaled or cut off. Values stay as they are, so
    inference is not changed.

    equilibrium: where n exits are still to come, this one included, the gradient of the head is
    scaled by 1 / n and that of the rest by (n - 1) / n (Li et al., ICCV 2019, arXiv:1908.06294).
    detach_heads: the fraction of the channels, from the last, that heads read without a gradient.
    detach_rest: the fraction, from the first, that the rest of the network reads without one; half
    and half divides the channels between both (deep feature surgery, Gong et al., ECCV 2024).
    """

    equilibrium: bool = False
    detach_heads: float = 0.0
    detach_rest: float = 0.0

    def split(self, features: Features, to_come: int) -> tuple[Features, Features]:
        """The features as the head reads them, and as the rest of the network does.

        features: (B, C, H, W), tokens (B, T, C), or a tuple of such tensors; to_come: exits, with
        this one.
        """
        return (
            _each(features, lambda part: self._for_head(part, to_come)),
            _each(features, lambda part: self._for_rest(part, to_come)),
        )

    def _for_head(self, features: Tensor, to_come: int) -> Tensor:
        if self.detach_heads:
            dim = _channels(features)
            cut = features.shape[dim] - round(self.detach_heads * features.shape[dim])
            kept, detached = features.tensor_split([cut], dim)
            features = torch.cat([kept, detached.detach()], dim)
        return scale_gradient(features, 1 / to_come) if self.equilibrium else features

    def _for_rest(self, features: Tensor, to_come: int) -> Tensor:
        if self.detach_rest:
            dim = _channels(features)
            cut = round(self.detach_rest * features.shape[dim])
            detached, kept = features.tensor_split([cut], dim)
            features = torch.cat([detached.detach(), kept], dim)
        return scale_gradient(features, 1 - 1 / to_come) if self.equilibrium else features


def _channels(features: Tensor) -> int:
    """The dimension of the channels: the last of tokens (B, T, C), else the second."""
    return 2 if features.ndim == 3 else 1


def scale_gradient(features: Tensor, factor: float) -> Tensor:
    """The features as they are; their gradient is multiplied by `factor`."""
    return _ScaledGradient.apply(features, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(features: Tensor, factor: float) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _each(features: Features, function: Any) -> Features:
    """`function` of the features, or of each tensor of a tuple."""
    return tuple(map(function, features)) if isinstance(features, tuple) else function(features)
