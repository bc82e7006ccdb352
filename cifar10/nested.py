"""The shallow wide network in two parts: a narrow network, and one that widens it.

The first part is an `Airbench` of few channels; its exits, in its middle and at its end, answer
most images. Those that remain do not begin anew: at the start of each group the second part also
reads the first one's features, as the larger sub-networks of RANet do (Yang et al.,
arXiv:2003.07326). Together they are a network whose weights from the second part's channels to the
first one's are zero, so that it can be computed in order of width (Any-Width Networks, Vu et al.,
arXiv:2012.03153).

The places for exits are `first.group1.0` .. `second.group3.0`; `first.group3` is the end of the
first part. Features are a tuple of the maps that are still to be read, the newest last; during the
first part the images are its first. The second part computes the first convolution again, which is
0.4 % of all multiply-adds: its 24 maps would be seven times as much to hand on as the images.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar10.airbench import SCALE, ScaleLogits, conv_group, set_whitening, whitening
from early_exit.model.features import Features

GROUPS = ("group1", "group2", "group3")


class NestedAirbench(nn.Module):
    """A whitening 2x2 convolution and two parts of three groups: 32x32 images.

    Maps images (B, C, H, W) of 32x32 or 28x28 pixels to logits (B, K). The filters of the first
    convolution are never trained: `init_from_images` computes them from train images.

    shape: of an image, (C, H, W). first, second: output channels of the groups of each part.
    """

    default_exits = ("first.group2.0", "first.group2", "first.group3")

    def __init__(
        self,
        num_classes: int = 10,
        shape: Sequence[int] = (3, 32, 32),
        first: Sequence[int] = (16, 128, 128),
        second: Sequence[int] = (48, 128, 128),
    ) -> None:
        super().__init__()
        self.whiten = whitening(shape[0])
        stem = self.whiten.out_channels
        self.first = _part((stem, first[0], first[1]), first)
        self.second = _part((stem, second[0] + first[0], second[1] + first[1]), second)
        self.pool = nn.MaxPool2d(3)
        self.linear = nn.Linear(first[-1] + second[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features, maps = F.gelu(self.whiten(images)), []
        for name in GROUPS:
            features = self.first[name](features)
            maps.append(features)
        features = self.second["group1"](F.gelu(self.whiten(images)))
        features = self.second["group2"](torch.cat([features, maps[0]], dim=1))
        features = self.second["group3"](torch.cat([features, maps[1]], dim=1))
        features = torch.cat([features, maps[2]], dim=1)
        return self.linear(self.pool(features).flatten(1)) * SCALE

    def units(self) -> dict[str, nn.Module]:
        """The blocks in order, by name. Applied one after the other they equal `forward`."""
        stem = nn.Sequential(self.whiten, nn.GELU())
        units: dict[str, nn.Module] = {"whiten": Step(stem, [0], keep=True)}
        for name in GROUPS:
            opening, closing = self.first[name]
            # the second part reads the end of each group, and starts from the images
            units[f"first.{name}.0"] = Step(opening, [-1], keep=name != "group1")
            units[f"first.{name}.1"] = Step(closing, [-1])
        for name in GROUPS:
            opening, closing = self.second[name]
            units[f"second.{name}.0"] = (
                Step(nn.Sequential(stem, opening), [0])
                if name == "group1"
                else Step(opening, [-1, 0])
            )
            units[f"second.{name}.1"] = Step(closing, [-1])
        classifier = nn.Sequential(self.pool, nn.Flatten(), self.linear, ScaleLogits())
        return units | {"classifier": Step(classifier, [-1, 0])}

    def init_from_images(self, batches: Iterable[Tensor]) -> None:
        """Sets the filters of the first convolution from normalised images (`set_whitening`)."""
        set_whitening(self.whiten, batches)


class Step(nn.Module):
    """One block of a network whose features are several maps: it reads some of them, which are then
    dropped, and adds its own as the newest.

    reads: indices of the maps whose channels, one after the other, are the block's input. keep:
    whether the maps that it reads stay. Features with a single map are a tensor, not a tuple.
    """

    def __init__(self, block: nn.Module, reads: Sequence[int], keep: bool = False) -> None:
        super().__init__()
        self.block, self.reads, self.keep = block, tuple(reads), keep

    def forward(self, features: Features) -> Features:
        maps = features if isinstance(features, tuple) else (features,)
        read = [index % len(maps) for index in self.reads]
        inputs = [maps[index] for index in read]
        new = self.block(torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0])
        kept = [part for index, part in enumerate(maps) if self.keep or index not in read]
        return (*kept, new) if kept else new


def _part(inputs: Sequence[int], widths: Sequence[int]) -> nn.ModuleDict:
    """Three groups. inputs: the channels that each reads; widths: that each gives."""
    return nn.ModuleDict(
        {
            name: conv_group(channels, width)
            for name, channels, width in zip(GROUPS, inputs, widths, strict=True)
        }
    )
