"""The shallow wide network of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU"
(arXiv:2404.00498), which learns in about ten epochs.

The places for exits are `whiten` and `group1.0` .. `group3.1`; `group1` is the end of the first
group.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = 5000  # that the patches for whitening are taken from, as there
EPS = 5e-4  # added to the eigenvalues, as there
SCALE = 1 / 9  # of the logits, as there


class Airbench(nn.Module):
    """A whitening 2x2 convolution and three groups of two 3x3 convolutions: 32x32 images.

    Maps images (B, C, H, W) of 32x32 or 28x28 pixels to logits (B, K). The filters of the first
    convolution are never trained: `init_from_images` computes them from train images.

    shape: of an image, (C, H, W). widths: output channels of the groups.
    """

    default_exits = ("group1", "group2.0", "group2")

    def __init__(
        self,
        num_classes: int = 10,
        shape: Sequence[int] = (3, 32, 32),
        widths: Sequence[int] = (64, 256, 256),
    ) -> None:
        super().__init__()
        self.whiten = whitening(shape[0])
        self.group1 = conv_group(self.whiten.out_channels, widths[0])
        self.group2 = conv_group(widths[0], widths[1])
        self.group3 = conv_group(widths[1], widths[2])
        self.pool = nn.MaxPool2d(3)
        self.linear = nn.Linear(widths[2], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = F.gelu(self.whiten(images))
        features = self.group3(self.group2(self.group1(features)))
        return self.linear(self.pool(features).flatten(1)) * SCALE

    def units(self) -> dict[str, nn.Module]:
        """The blocks in order, by name. Applied one after the other they equal `forward`."""
        units: dict[str, nn.Module] = {"whiten": nn.Sequential(self.whiten, nn.GELU())}
        for group in ("group1", "group2", "group3"):
            for index, block in enumerate(getattr(self, group)):
                units[f"{group}.{index}"] = block
        return units | {
            "classifier": nn.Sequential(self.pool, nn.Flatten(), self.linear, ScaleLogits())
        }

    def init_from_images(self, batches: Iterable[Tensor]) -> None:
        """Sets the filters of the first convolution from normalised images (`set_whitening`)."""
        set_whitening(self.whiten, batches)


def whitening(channels: int) -> nn.Conv2d:
    """The first convolution, whose filters are never trained; `set_whitening` computes them."""
    patch = channels * 2 * 2  # values in a patch; each eigenvector gives two filters
    conv = nn.Conv2d(channels, 2 * patch, 2)
    conv.weight.requires_grad_(False)
    nn.init.zeros_(conv.bias)
    return conv


@torch.no_grad()
def set_whitening(conv: nn.Conv2d, batches: Iterable[Tensor]) -> None:
    """Sets the filters of a convolution so that they whiten 2x2 patches.

    They are the eigenvectors of the patches' second moment (the covariance, as the images are
    normalised), each divided by the root of its eigenvalue plus `EPS`, and their negatives.

    batches: normalised images (B, C, H, W); the first 5,000 or a little more are used.
    """
    weight = conv.weight
    size = weight[0].numel()
    moment = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    images_read = patches_read = 0
    for images in batches:
        patches = F.unfold(images.double(), 2)  # (B, C * 2 * 2, patches of an image)
        moment += (patches @ patches.mT).sum(dim=0)
        images_read += len(images)
        patches_read += len(images) * patches.shape[2]
        if images_read >= IMAGES:
            break
    eigenvalues, eigenvectors = torch.linalg.eigh(moment / patches_read)  # rising; columns
    filters = (eigenvectors / (eigenvalues + EPS).sqrt()).T.flip(0).reshape(-1, *weight[0].shape)
    weight.copy_(torch.cat([filters, -filters]))


class ScaleLogits(nn.Module):
    """Logits times `SCALE`."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits * SCALE


def conv_group(in_channels: int, channels: int) -> nn.Sequential:
    """Two blocks, the first of which halves the resolution."""
    return nn.Sequential(
        nn.Sequential(_conv(in_channels, channels), nn.MaxPool2d(2), _norm(channels), nn.GELU()),
        nn.Sequential(_conv(channels, channels), _norm(channels), nn.GELU()),
    )


def _conv(in_channels: int, channels: int) -> nn.Conv2d:
    """A 3x3 convolution whose first output channels are its input channels."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with a scale of 1 and fast statistics."""
    norm = nn.BatchNorm2d(channels, momentum=0.4)  # the paper's 0.6 is the share that is kept
    norm.weight.requires_grad_(False)
    return norm
