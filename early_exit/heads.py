"""Exit heads: features to logits.

Every head is built from the number of channels at its place and the number of classes, and maps
features (B, C, H, W) to logits (B, K).
"""

import torch
from torch import Tensor, nn

from early_exit.errors import UserError

GRID = 4  # Shallow-Deep Networks pool every feature map down to 4x4


class LinearHead(nn.Sequential):
    """Average pooling to a grid of 4x4 and one linear layer, as in CDL (arXiv:1509.08971), whose
    linear classifiers see features with their places: an early stage has few channels, and their
    global averages alone say little."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), nn.Linear(channels * GRID**2, num_classes)
        )


class ConvHead(nn.Sequential):
    """A 3x3 convolution, then pooling and one linear layer, as the branches of BranchyNet
    (Teerapittayanon et al., arXiv:1709.01686).

    The convolution keeps the width and has stride 2: a quarter of the multiply-adds of one of the
    backbone's own convolutions there, 1.5 % of a ResNet-20 and less of anything deeper.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )


class MixedPoolHead(nn.Module):
    """A learned mixture of max and average pooling, then one linear layer, as the internal
    classifiers of Shallow-Deep Networks (Kaya, Hong, Dumitras, ICML 2019, section 3.2)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(channels * GRID**2, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        largest = nn.functional.adaptive_max_pool2d(features, GRID)
        average = nn.functional.adaptive_avg_pool2d(features, GRID)
        pooled = self.mix * largest + (1 - self.mix) * average  # (B, C, 4, 4)
        return self.linear(pooled.flatten(1))


HEADS = {"conv": ConvHead, "linear": LinearHead, "mixed_pool": MixedPoolHead}


def build_head(kind: str, channels: int, num_classes: int) -> nn.Module:
    """The head called `kind`: conv, linear or mixed_pool."""
    if kind not in HEADS:
        raise UserError(f"no head is called {kind!r}; choose one of {', '.join(HEADS)}")
    return HEADS[kind](channels, num_classes)
