"""The CIFAR ResNets of He et al. (arXiv:1512.03385, section 4.2), shortcut option A.

Parameter names are those of akamaster's pytorch_resnet_cifar10, so its checkpoints load unchanged.
The places for exits are the blocks `layer1.0` .. `layer3.8` (in ResNet-56); `layer1` is the last
block of the first group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEPTHS = {
    "resnet20": 3,
    "resnet32": 5,
    "resnet44": 7,
    "resnet56": 9,
    "resnet110": 18,
    "resnet1202": 200,
}
"""Blocks per group."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters.

    Option A: if the block halves the resolution, the shortcut takes every second pixel and pads the
    new channels with zeros, half of them on each side.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.pad = (channels - in_channels) // 2

    def forward(self, features: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(features)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            features = subsample(features, self.stride)
        if self.pad:
            features = F.pad(features, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out.add_(features), inplace=True)


class ResNet(nn.Module):
    """A CIFAR ResNet of 6n + 2 layers: 32x32 images, widths 16, 32 and 64.

    Maps images (B, C, H, W) to logits (B, K).

    shape: of an image, (C, H, W).
    """

    default_exits = ("layer1",)

    def __init__(
        self, blocks_per_group: int, num_classes: int = 10, shape: Sequence[int] = (3, 32, 32)
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _layer(16, 16, blocks_per_group, stride=1)
        self.layer2 = _layer(16, 32, blocks_per_group, stride=2)
        self.layer3 = _layer(32, 64, blocks_per_group, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1(images)), inplace=True)
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.linear(features.mean(dim=(2, 3)))

    def units(self) -> dict[str, nn.Module]:
        """The blocks in order, by name. Applied one after the other they equal `forward`."""
        units: dict[str, nn.Module] = {
            "stem": nn.Sequential(self.conv1, self.bn1, nn.ReLU(inplace=True))
        }
        for group in ("layer1", "layer2", "layer3"):
            for index, block in enumerate(getattr(self, group)):
                units[f"{group}.{index}"] = block
        units["classifier"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.linear)
        return units


def subsample(features: Tensor, stride: int) -> Tensor:
    """Every `stride`-th pixel: (B, C, H, W) to (B, C, H / stride, W / stride).

    The gradient of a slice is contiguous in the order of the dimensions that are sliced. For
    channels_last they must be (B, H, W, C); otherwise the next kernels run many times slower.
    """
    if features.is_contiguous(memory_format=torch.channels_last):
        return features.permute(0, 2, 3, 1)[:, ::stride, ::stride].permute(0, 3, 1, 2)
    return features[:, :, ::stride, ::stride]


def _layer(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))
