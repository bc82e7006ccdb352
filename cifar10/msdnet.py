"""The multi-scale DenseNet (MSDNet) of Huang et al. (arXiv:1703.09844) for small images.

Features are a tuple of maps at several scales, finest first, each of half the side of the one
before. A layer appends channels to every map: half of them computed from that map, half from the
next finer one. So the coarsest map, which all heads read, is there from the start. After each third
of the layers the finest map is dropped and the number of channels halved.

Layers are in blocks, and an exit follows a block. The places for exits are the layers, `block1.0`,
`block2.0`, `block2.1` and so on; `block2` is the last layer of the second block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from early_exit.model.heads import MSDNetHead, SelectMap

LAYERS = {
    "msdnet6": (1, 2, 3),
    "msdnet9": (1, 3, 5),
    "msdnet10": (1, 2, 3, 4),
    "msdnet15": (1, 2, 3, 4, 5),
}
"""Layers in each block; a network is named after their sum. Blocks grow by one layer, in `msdnet9`
by two: the public code calls it `lin_grow` (github.com/kalviny/MSDNet-PyTorch)."""
WIDTHS = (1, 2, 4)
"""Channels of each scale, new ones too, as multiples of the finest scale's."""
BOTTLENECKS = (1, 2, 4)
"""The most channels after the 1x1 convolution that reads a scale, as multiples of those that the
3x3 convolution after it gives."""
SCALES = len(WIDTHS)


class MSDNet(nn.Module):
    """An MSDNet of three scales.

    Maps images (B, C, H, W) to logits (B, K). The settings are those of the paper for CIFAR.

    layers: in each block; shape: of an image, (C, H, W); channels: of the finest map of the stem;
    growth: channels that a layer appends to it.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 10,
        shape: Sequence[int] = (3, 32, 32),
        *,
        channels: int = 16,
        growth: int = 6,
    ) -> None:
        super().__init__()
        self.stem = Stem(shape[0], channels)
        self.block_names = [f"block{number}" for number in range(1, len(layers) + 1)]
        self.default_exits = tuple(self.block_names[:-1])
        total, number, start = sum(layers), 0, 0  # start: the finest scale so far
        for name, count in zip(self.block_names, layers, strict=True):
            block = nn.Sequential()
            for _ in range(count):
                finest = max(third(number, total), finest_needed(number, total))
                layer: nn.Module = Layer(channels, growth, start, finest)
                channels += growth
                if third(number, total) > third(number - 1, total):
                    layer = nn.Sequential(layer, Transition(channels, channels // 2, finest))
                    channels //= 2
                block.append(layer)
                number, start = number + 1, finest
            self.add_module(name, block)
        self.classifier = MSDNetHead(channels * WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for name in self.block_names:
            maps = getattr(self, name)(maps)
        return self.classifier(maps[-1])

    def units(self) -> dict[str, nn.Module]:
        """The layers in order, by name. Applied one after the other they equal `forward`."""
        units: dict[str, nn.Module] = {"stem": self.stem}
        for name in self.block_names:
            for index, layer in enumerate(getattr(self, name)):
                units[f"{name}.{index}"] = layer
        units["classifier"] = nn.Sequential(SelectMap(-1), self.classifier)
        return units


def third(number: int, total: int) -> int:
    """The third of the network that layer `number` of `total` is in, 0 to 2; layers count from 0.

    It is the finest scale that the layer computes in the paper: the first third computes all.
    """
    return max(number, 0) // -(-total // SCALES)


def finest_needed(number: int, total: int) -> int:
    """The finest scale after layer `number` of `total` that the classifier depends on: each layer
    reads one scale further up."""
    return max(0, SCALES - (total - number))


class Stem(nn.Module):
    """Images (B, C, H, W) to the first maps, one a scale, each from the one before."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        widths = [in_channels, *(channels * width for width in WIDTHS)]
        self.convs = nn.ModuleList(
            _conv(widths[scale], widths[scale + 1], 3, stride=2 if scale else 1)
            for scale in range(SCALES)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps, features = [], images
        for conv in self.convs:
            features = conv(features)
            maps.append(features)
        return tuple(maps)


class Layer(nn.Module):
    """Appends channels to the maps, without those finer than `finest`, which are dropped.

    channels, growth: before and new, of a map of scale 0; other scales have `WIDTHS` times as many.
    start: the scale of the first map. Maps tuples to tuples; shapes stay, but for the channels.
    """

    def __init__(self, channels: int, growth: int, start: int, finest: int) -> None:
        super().__init__()
        self.dropped = finest - start
        self.scales = nn.ModuleList(
            Growth(channels, growth, scale, has_finer=scale > start)
            for scale in range(finest, SCALES)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        finer = (None, *maps)[self.dropped :]  # of each map that is kept, the one before it
        kept = maps[self.dropped :]
        return tuple(
            scale(features, before)
            for scale, features, before in zip(self.scales, kept, finer, strict=False)
        )


class Growth(nn.Module):
    """Appends channels to the map of one scale: from itself and, if there is one, the next finer
    map, half of them from each."""

    def __init__(self, channels: int, growth: int, scale: int, has_finer: bool) -> None:
        super().__init__()
        new = growth * WIDTHS[scale] // (2 if has_finer else 1)
        self.down = _bottleneck(channels, new, scale - 1, stride=2) if has_finer else None
        self.same = _bottleneck(channels, new, scale, stride=1)

    def forward(self, features: Tensor, finer: Tensor | None) -> Tensor:
        """features: (B, C, H, W); finer: (B, C', 2 H, 2 W)."""
        parts = [features]
        if self.down is not None:
            parts.append(self.down(finer))
        return torch.cat([*parts, self.same(features)], dim=1)


class Transition(nn.Module):
    """Other numbers of channels for the maps of the scales from `finest` on; `channels` and
    `new_channels` are those of scale 0."""

    def __init__(self, channels: int, new_channels: int, finest: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            _conv(channels * width, new_channels * width, 1) for width in WIDTHS[finest:]
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(scale(features) for scale, features in zip(self.scales, maps, strict=True))


def _bottleneck(channels: int, new: int, scale: int, stride: int) -> nn.Sequential:
    """A 1x1 and a 3x3 convolution, from the map of a scale to `new` channels. channels: of scale
    0."""
    inputs = channels * WIDTHS[scale]
    width = min(inputs, new * BOTTLENECKS[scale])
    return nn.Sequential(_conv(inputs, width, 1), _conv(width, new, 3, stride))


def _conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the side, but for the stride, with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
