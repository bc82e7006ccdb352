"""Bytes to what a network takes."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


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
