"""From image files to bytes, and from bytes to what a network takes.

Decoding and resizing (`as_rgb`, `as_bytes`, `fitted`) need numpy and Pillow only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fitted(image: Image.Image, shape: Sequence[int]) -> Image.Image:
    """The centre of an image, cropped to the aspect ratio of a network's images and resized.

    shape: of the network's images, (C, H, W).
    """
    _, height, width = shape
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode with three channels of bytes; of 16 bits the upper eight.

    Raises ValueError for pixels of neither 8 nor 16 bits, whose white level is unknown.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 and 16 are supported")
    return image.convert("RGB")


def as_bytes(image: Image.Image, channels: int) -> np.ndarray:
    """An image as an array (C, H, W) uint8, grey if C is 1."""
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], layout: torch.memory_format
) -> Tensor:
    """Images (B, 3, H, W) uint8 to float32 in that memory layout, minus `mean` and divided by
    `std`, both for pixels in [0, 1]."""
    offset, scale = _rows(tuple(mean), tuple(std), images.shape[3], images.device, layout)
    # in steps, because an operation on bytes and floats together is not vectorised
    return images.contiguous(memory_format=layout).float().sub_(offset).mul_(scale)


@functools.lru_cache(maxsize=8)  # copying them to a GPU would wait for it
def _rows(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int,
    device: torch.device,
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """What is subtracted and multiplied: a whole row of each number, laid out as the images are.

    With channels last the innermost loop would otherwise run over three channels, which takes
    several times as long on a CPU.
    """
    import torch

    def row(numbers: tuple[float, ...]) -> Tensor:
        values = torch.tensor(numbers).view(1, -1, 1, 1).expand(1, -1, 1, width)
        return values.contiguous(memory_format=layout)

    return row(mean).mul_(255).to(device), row(std).mul_(255).reciprocal_().to(device)
