"""Small networks for MNIST: the LeNet of BranchyNet, and those of Conditional Deep Learning.

The places for exits in LeNet are `conv1`, directly after a convolution, `pool1`, after pooling and
ReLU, and so on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """Three 5x5 convolutions and two linear layers, with the widths of BranchyNet's public code
    (arXiv:1709.01686).

    Maps images (B, C, H, W) of 28x28 or 32x32 pixels to logits (B, K).

    shape: of an image, (C, H, W).
    """

    default_exits = ("conv1",)

    def __init__(self, num_classes: int = 10, shape: Sequence[int] = (1, 28, 28)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 5, 5, padding=3)
        self.conv2 = nn.Conv2d(5, 10, 5, padding=3)
        self.conv3 = nn.Conv2d(10, 20, 5, padding=3)
        self.fc1 = nn.Linear(20 * 6 * 6, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for conv in (self.conv1, self.conv2, self.conv3):
            features = pooled(conv(features))
        return self.fc2(F.relu(self.fc1(features.flatten(1))))

    def units(self) -> dict[str, nn.Module]:
        """The blocks in order, by name. Applied one after the other they equal `forward`."""
        units: dict[str, nn.Module] = {}
        for number, conv in enumerate((self.conv1, self.conv2, self.conv3), 1):
            units |= {f"conv{number}": conv, f"pool{number}": Pool()}
        return units | {"classifier": nn.Sequential(nn.Flatten(), self.fc1, nn.ReLU(), self.fc2)}


def pooled(features: Tensor) -> Tensor:
    """2x2 max pooling, then ReLU."""
    return F.relu(F.max_pool2d(features, 2, ceil_mode=True))


class Pool(nn.Module):
    """`pooled` as a module."""

    def forward(self, features: Tensor) -> Tensor:
        return pooled(features)


class MnistCNN(nn.Module):
    """Convolutions without padding, each with pooling and ReLU, and one linear layer, as in
    Conditional Deep Learning (arXiv:1509.08971).

    Maps images (B, C, H, W) to logits (B, K). The places for exits, `conv1` and so on, are after
    the pooling.

    maps, kernels: output channels and kernel side of each convolution. shape: of an image, (C, H,
    W).
    """

    default_exits = ("conv1",)

    def __init__(
        self,
        maps: Sequence[int],
        kernels: Sequence[int],
        num_classes: int = 10,
        shape: Sequence[int] = (1, 28, 28),
    ) -> None:
        super().__init__()
        widths = [shape[0], *maps]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel)
            for before, after, kernel in zip(widths, maps, kernels, strict=False)
        )
        with torch.no_grad():
            width = self.features(torch.zeros(1, *shape)).shape[1]
        self.fc = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The input of the linear layer, (B, features), for images (B, C, H, W)."""
        for conv in self.convs:
            images = pooled(conv(images))
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))

    def units(self) -> dict[str, nn.Module]:
        """The blocks in order, by name. Applied one after the other they equal `forward`."""
        units: dict[str, nn.Module] = {
            f"conv{number}": nn.Sequential(conv, Pool())
            for number, conv in enumerate(self.convs, 1)
        }
        return units | {"classifier": nn.Sequential(nn.Flatten(), self.fc)}
