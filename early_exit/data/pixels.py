"""From RGB images to bytes of the network's size, and from bytes to what a network takes.

Resizing (`fitted`, `centre_crop`, `as_bytes`) needs numpy and Pillow only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

THIN = 32  # how many times as long as wide an image is that is not resized as a whole


def fitted(image: Image.Image, shape: Sequence[int]) -> Image.Image:
    """The centre of an image, cropped to the aspect ratio of a network's images and resized.

    shape: of the network's images, (C, H, W).
    """
    _, height, width = shape
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """The centre square of an image whose shorter side has been resized: the same pixels as by
    torchvision's Resize(resize) and CenterCrop(crop), with which public weights were evaluated.

    resize: the shorter side, in pixels; crop: the side of the square, at most `resize`. Of an image
    that is more than `THIN` times as long as wide, only the square is computed: the rest would take
    gigabytes. Its values can then differ by rounding.
    """
    shorter, longer = min(image.size), max(image.size)
    resized = int(resize * longer / shorter)  # rounded as torchvision does
    width, height = (resize, resized) if image.width <= image.height else (resized, resize)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    if longer <= THIN * shorter:
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        return whole.crop((left, top, left + crop, top + crop))
    first_x, last_x, x, right = _needed(left, crop, width, image.width)
    first_y, last_y, y, bottom = _needed(top, crop, height, image.height)
    part = image.crop((first_x, first_y, last_x, last_y))
    return part.resize((crop, crop), Image.Resampling.BILINEAR, (x, y, right, bottom))


def _needed(start: int, crop: int, whole: int, size: int) -> tuple[int, int, float, float]:
    """Along one side: which pixels of an image are needed to compute a part of the resized image.

    The side has `size` pixels and is resized to `whole`; the part is `crop` pixels from `start` on.
    Returns the first needed pixel and the one after the last, and where in these the part begins
    and ends. (The last two are relative because Pillow keeps them in float32.)"""
    scale = size / whole
    begin, end = start * scale, min((start + crop) * scale, size)
    around = math.ceil(max(scale, 1)) + 1  # what the filter mixes in
    first = max(math.floor(begin) - around, 0)
    return first, min(math.ceil(end) + around, size), begin - first, end - first


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
