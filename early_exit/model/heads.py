"""Exit heads: features to logits.

A head is built from the shape of the features at its place and the number of classes. It maps
features (B, C, H, W) to logits (B, K).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.model.pooling import AdaptiveMaxPool, average_pool, has_equal_cells, max_pool

MAX_WEIGHTS = 100_000  # of a linear layer on pooled features, unless the grid is 1x1


def finest_grid(channels: int, num_classes: int, finest: int) -> int:
    """The side of the grid that features are pooled to before a linear layer.

    It is `finest`, halved until the layer has at most 100,000 weights. An early stage of a small
    network has few channels, so that global averages carry too little information; with many
    channels they carry enough.
    """
    grid = finest
    while grid > 1 and channels * grid**2 * num_classes > MAX_WEIGHTS:
        grid //= 2
    return grid


class LinearHead(nn.Module):
    """A linear classifier, as in CDL (arXiv:1509.08971), on pooled statistics of every channel:
    averages on a grid of at most 8x8, maxima on a grid of half that side, standard deviations on
    one of a quarter. BatchNorm brings the statistics to the same scale."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        finest = finest_grid(channels, num_classes, finest=8)
        self.grids = finest, max(1, finest // 2), max(1, finest // 4)
        width = channels * sum(grid**2 for grid in self.grids)
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        # a difference of squares loses precision
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        fine, middle, coarse = self.grids
        averages = average_pool(features, fine)
        nested = has_equal_cells(features, fine)  # then coarse averages are averages of fine ones
        deviations = deviation(features, coarse, averages if nested else None)
        pooled = [averages, max_pool(features, middle), deviations]  # (B, C, grid, grid) each
        return self.linear(self.norm(torch.cat([part.flatten(1) for part in pooled], dim=1)))


def deviation(features: Tensor, grid: int, averages: Tensor | None = None) -> Tensor:
    """The standard deviation in each cell of a grid: (B, C, H, W) to (B, C, grid, grid).

    averages: the features pooled to a finer grid whose cells are parts, of equal size, of these;
    default: the features.
    """
    average = average_pool(features if averages is None else averages, grid)
    squares = average_pool(features * features, grid)
    # the small constant keeps the gradient finite in a cell of equal values
    return ((squares - average * average).clamp_min(0) + 1e-5).sqrt()


class PooledHead(nn.Module):
    """A linear classifier on averages and maxima of every channel on a grid of at most 4x4.

    Cheaper than `LinearHead`: it reads the features twice instead of four times, writes no copy of
    them, and exports to a third of the operations.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.grid = finest_grid(2 * channels, num_classes, finest=4)
        width = 2 * channels * self.grid**2
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        pooled = [average_pool(features, self.grid), max_pool(features, self.grid)]
        return self.linear(self.norm(torch.cat(pooled, dim=1).flatten(1)))  # (B, 2 C, grid, grid)


class ConvHead(nn.Sequential):
    """A 3x3 convolution, then pooling and one linear layer, as in the branches of BranchyNet
    (Teerapittayanon et al., arXiv:1709.01686).

    The convolution keeps the number of channels and has stride 2, which needs a quarter of the MACs
    of one of the backbone's own convolutions there: 1.5 % of a ResNet-20, less of a deeper network.
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
    """A conv head for features of many channels: a depthwise 3x3 convolution of stride 2, a 1x1
    convolution to at most 512 channels, then pooling and one linear layer.

    After layer1 and after layer2 of a ResNet-50 it costs 1.3 % of the network; a full 3x3
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


class MSDNetHead(nn.Sequential):
    """Two 3x3 convolutions of stride 2 to 128 channels, then pooling and one linear layer, as in
    the classifiers of MSDNet for CIFAR (Huang et al., arXiv:1703.09844).

    It is expensive: after the first layer of an MSDNet it has half as many MACs as all before it.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        width = 128
        layers: list[nn.Module] = []
        for inputs in (channels, width):
            layers += [
                nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
        super().__init__(*layers)


class MixedPoolHead(nn.Module):
    """A learned mixture of max and average pooling, then one linear layer, as in the internal
    classifiers of Shallow-Deep Networks (Kaya, Hong, Dumitras, ICML 2019, section 3.2), which pool
    every channel to 4x4."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.grid = finest_grid(channels, num_classes, finest=4)
        self.mix = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(channels * self.grid**2, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        largest = max_pool(features, self.grid)
        average = average_pool(features, self.grid)
        pooled = self.mix * largest + (1 - self.mix) * average  # (B, C, grid, grid)
        return self.linear(pooled.flatten(1))


class BranchHead(nn.Sequential):
    """ReLU and pooling, 3x3 convolutions with ReLU, pooling and one linear layer, without
    normalisation, as in the branches of BranchyNet's public code for LeNet and AlexNet
    (arXiv:1709.01686), which follow a convolution without ReLU.

    side: of the maps. convs: the number of convolutions. They have twice the channels of the
    features, at most 32: as there, 10 after LeNet's first convolution and 32 in AlexNet.
    """

    def __init__(self, channels: int, num_classes: int, side: int, convs: int) -> None:
        width = min(2 * channels, 32)
        grid = min((side + 3) // 4, finest_grid(width, num_classes, finest=8))
        layers: list[nn.Module] = [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        for number in range(convs):
            layers += [nn.Conv2d(width if number else channels, width, 3, padding=1), nn.ReLU()]
        super().__init__(
            *layers,
            AdaptiveMaxPool(grid),
            nn.Flatten(),
            nn.Linear(width * grid**2, num_classes),
        )


class TokenMap(nn.Module):
    """Tokens (B, H * H, C), or (B, 1 + H * H, C) with a class token, to maps (B, C, H, H).

    The class token is dropped.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        patches = tokens[:, -side * side :].transpose(1, 2)  # (B, C, H * H)
        return patches.unflatten(2, (side, side))


class SelectMap(nn.Module):
    """Selects one tensor of a tuple, by its index."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return features[self.index]


HEADS: dict[str, Callable[..., nn.Module]] = {
    "conv": ConvHead,
    "separable": SeparableHead,
    "linear": LinearHead,
    "pooled": PooledHead,
    "mixed_pool": MixedPoolHead,
    "msdnet": MSDNetHead,
    "branch1": partial(BranchHead, convs=1),
    "branch2": partial(BranchHead, convs=2),
    "branch3": partial(BranchHead, convs=3),
}
"""Heads by name. Each is called with the number of channels and of classes, and a branch also with
the side of the maps. Add yours to the dictionary under a new key.

If the features are a tuple of tensors, a head reads the last, by convention the coarsest, unless
its class has an attribute `reads` with another index."""
POOLED = ("linear", "pooled", "mixed_pool", "branch1", "branch2", "branch3")
"""The heads that pool to a grid."""

HeadKind = str | Callable[[Any, int], nn.Module]
"""A name in `HEADS`, or a function that makes a head from the shape of one image's features, which
is (1, ...) or a tuple of such shapes, and the number of classes."""


def build_head(kind: HeadKind, features: Any, num_classes: int) -> nn.Module:
    """A head for features of the given shape.

    features: the shape of maps (B, C, H, W) or of tokens, (B, H * H, C) or (B, 1 + H * H, C), or a
    tuple of such shapes. Raises UserError for an unknown name and for other shapes.
    """
    if callable(kind):
        return kind(features, num_classes)
    if kind not in HEADS:
        raise UserError(f"there is no head {kind!r}; choose one of {', '.join(HEADS)}")
    if not isinstance(features[0], int):  # several maps
        made = HEADS[kind]
        index = getattr(getattr(made, "func", made), "reads", -1)  # of a partial its function's
        return nn.Sequential(SelectMap(index), build_head(kind, features[index], num_classes))
    side = math.isqrt(features[1])
    tokens = len(features) == 3 and features[1] - side * side <= 1
    if not tokens and len(features) != 4:
        raise UserError(
            f"the head {kind} reads maps (B, C, H, W) or tokens (B, H * H, C), with or without a"
            f" class token; got features {tuple(features)}: pass a function that builds a head for"
            " them, or choose another place"
        )
    channels, side = (features[2], side) if tokens else features[1:3]
    options = {"side": side} if getattr(HEADS[kind], "func", None) is BranchHead else {}
    head = HEADS[kind](channels, num_classes, **options)
    return nn.Sequential(TokenMap(), head) if tokens else head
