"""Exit heads: features to logits.

Every head is built from the shape of the features at its place and the number of classes, and maps
features (B, C, H, W) to logits (B, K).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from early_exit.errors import UserError

MOST_WEIGHTS = 100_000  # of a linear layer on pooled features, if a coarser grid can help it


def finest_grid(channels: int, num_classes: int, finest: int) -> int:
    """The side of the grid that features are pooled to before a linear layer: `finest`, or half of
    it as often as the layer would have more than 100,000 weights. An early stage of a small network
    has few channels, and their global averages alone say little; where there are many channels and
    classes, the averages do."""
    grid = finest
    while grid > 1 and channels * grid**2 * num_classes > MOST_WEIGHTS:
        grid //= 2
    return grid


class LinearHead(nn.Module):
    """A linear classifier, as in CDL (arXiv:1509.08971), on statistics of grids laid over every
    channel: averages on a grid of at most 8x8, maxima on one half as fine, standard deviations on
    one a quarter as fine. The normalisation before it scales what it learns from."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        finest = finest_grid(channels, num_classes, finest=8)
        self.grids = finest, max(1, finest // 2), max(1, finest // 4)
        width = channels * sum(grid**2 for grid in self.grids)
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        fine, middle, coarse = self.grids
        average = nn.functional.adaptive_avg_pool2d(features, fine)
        largest = nn.functional.adaptive_max_pool2d(features, middle)
        pooled = [average, largest, deviation(features, coarse)]  # (B, C, grid, grid) each
        return self.linear(self.norm(torch.cat([part.flatten(1) for part in pooled], dim=1)))


def deviation(features: Tensor, grid: int) -> Tensor:
    """Standard deviations within the cells of a grid: (B, C, H, W) to (B, C, grid, grid)."""
    features = features.float()  # a difference of squares needs the digits
    average = nn.functional.adaptive_avg_pool2d(features, grid)
    squares = nn.functional.adaptive_avg_pool2d(features.square(), grid)
    # the little that is added keeps the root's slope finite where a cell is even
    return ((squares - average.square()).clamp_min(0) + 1e-5).sqrt()


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


class SeparableHead(nn.Sequential):
    """A conv head for wide features: a depthwise 3x3 convolution of stride 2, a 1x1 convolution to
    at most 512 channels, then pooling and one linear layer.

    After a ResNet-50's layer1 and layer2 it costs 1.3 % of the network each, where a full 3x3
    convolution of stride 2 would cost 11 %.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        width = min(channels, 512)
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


class MixedPoolHead(nn.Module):
    """A learned mixture of max and average pooling, then one linear layer, as the internal
    classifiers of Shallow-Deep Networks (Kaya, Hong, Dumitras, ICML 2019, section 3.2), which pool
    every feature map to 4x4."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.grid = finest_grid(channels, num_classes, finest=4)
        self.mix = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(channels * self.grid**2, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        largest = nn.functional.adaptive_max_pool2d(features, self.grid)
        average = nn.functional.adaptive_avg_pool2d(features, self.grid)
        pooled = self.mix * largest + (1 - self.mix) * average  # (B, C, grid, grid)
        return self.linear(pooled.flatten(1))


class BranchHead(nn.Sequential):
    """ReLU and pooling, 3x3 convolutions with ReLU, pooling and one linear layer, without
    normalisation: the branches of BranchyNet's public code for LeNet and AlexNet
    (arXiv:1709.01686), which follow a bare convolution.

    convs: how many convolutions. They have twice the features' channels, at most 32: 10 after
    LeNet's first convolution and 32 in AlexNet, as there.
    """

    def __init__(self, channels: int, num_classes: int, side: int, convs: int) -> None:
        width = min(2 * channels, 32)
        grid = min((side + 3) // 4, finest_grid(width, num_classes, finest=8))
        layers: list[nn.Module] = [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        for number in range(convs):
            layers += [nn.Conv2d(width if number else channels, width, 3, padding=1), nn.ReLU()]
        super().__init__(
            *layers,
            nn.AdaptiveMaxPool2d(grid),
            nn.Flatten(),
            nn.Linear(width * grid**2, num_classes),
        )


class TokenMap(nn.Module):
    """Tokens (B, H * H, C), or (B, 1 + H * H, C) as a ViT's, to the map of the patches (B, C, H,
    H). A class token is left out."""

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        patches = tokens[:, -side * side :].transpose(1, 2)  # (B, C, H * H)
        return patches.unflatten(2, (side, side))


HEADS = {
    "conv": ConvHead, "separable": SeparableHead, "linear": LinearHead, "mixed_pool": MixedPoolHead,
    "branch1": partial(BranchHead, convs=1),
    "branch2": partial(BranchHead, convs=2),
    "branch3": partial(BranchHead, convs=3),
}
"""By name, each called with the features' channels and the number of classes, a branch also with
their side. Another kind is put in under its own name, before a configuration asks for it."""
POOLED = ("linear", "mixed_pool", "branch1", "branch2", "branch3")  # to a grid

HeadKind = str | Callable[[torch.Size, int], nn.Module]
"""The name of a kind, or a function from the features' shape (1, ...) and the number of classes."""


def build_head(kind: HeadKind, features: torch.Size, num_classes: int) -> nn.Module:
    """The head of that kind for features of that shape: maps (B, C, H, W), or tokens (B, H * H, C)
    or (B, 1 + H * H, C). Raises UserError for a name that is not known, and for other features."""
    if callable(kind):
        return kind(features, num_classes)
    if kind not in HEADS:
        raise UserError(f"no head is called {kind!r}; choose one of {', '.join(HEADS)}")
    side = math.isqrt(features[1])
    tokens = len(features) == 3 and features[1] - side * side <= 1
    if not tokens and len(features) != 4:
        raise UserError(
            f"the head {kind} takes maps (B, C, H, W) or a square of tokens (B, H * H, C), with or"
            f" without a class token; the features here are {tuple(features)}: pass a function that"
            " makes a head for them, or put the exit elsewhere"
        )
    channels, side = (features[2], side) if tokens else features[1:3]
    sized = {"side": side} if getattr(HEADS[kind], "func", None) is BranchHead else {}
    head = HEADS[kind](channels, num_classes, **sized)
    return nn.Sequential(TokenMap(), head) if tokens else head
