"""Bytes to what a network takes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class ImageData:
    """What every data set does alike; its dataclass has these fields, and `size`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: torch.memory_format

    def normalised_by(self, normalisation: dict | None) -> Self:
        """The same data with a checkpoint's {"mean": [...], "std": [...]}; None: its own."""
        if not normalisation:
            return self
        mean, std = tuple(normalisation["mean"]), tuple(normalisation["std"])
        return dataclasses.replace(self, mean=mean, std=std)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in train; a rest is left out, another one in every epoch."""
        return max(1, self.size("train") // batch_size)

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) to float32 with the set's mean and deviation."""
        return normalise(images, self.mean, self.std, self.layout)


def fitted(image: Image.Image, shape: Sequence[int]) -> Image.Image:
    """The centre of an image, of the form of a network's images (C, H, W) and resized to them."""
    _, height, width = shape
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind with three channels of bytes; of 16 bits the upper eight.

    Raises ValueError for pixels that are not of 8 or 16 bits: nobody knows what is white there.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 or 16 are known")
    return image.convert("RGB")


def as_bytes(image: Image.Image, channels: int) -> Tensor:
    """An image as a tensor (C, H, W) uint8, grey where C is 1."""
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], layout: torch.memory_format
) -> Tensor:
    """Images (B, 3, H, W) of bytes to float32 of that memory layout, less `mean` and divided by
    `std`, both of pixels in [0, 1]."""
    mean, scale = _rows(tuple(mean), tuple(std), images.shape[3], images.device, layout)
    # in steps, because an operation on bytes and floats together is not vectorised
    return images.contiguous(memory_format=layout).float().sub_(mean).mul_(scale)


@functools.lru_cache(maxsize=8)  # sending them to a GPU would wait for it
def _rows(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device,
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """What is subtracted and multiplied with: a whole row of each number, laid out as the images
    are. With channels last the innermost loop would otherwise be over three channels, which takes
    several times as long on a CPU."""
    rows = (
        torch.tensor(numbers).view(1, -1, 1, 1).expand(1, -1, 1, width).contiguous(
            memory_format=layout
        )
        for numbers in (mean, std)
    )
    mean, std = rows
    return mean.mul_(255).to(device), std.mul_(255).reciprocal_().to(device)
