"""Bytes to what a network takes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], layout: torch.memory_format
) -> Tensor:
    """Images (B, 3, H, W) of bytes to float32 of that memory layout, less `mean` and divided by
    `std`, both of pixels in [0, 1]."""
    shape = (1, len(mean), 1, images.shape[3])
    # A whole row of each number, laid out as the images are: with channels last the innermost loop
    # would otherwise be over three channels, which takes several times as long on a CPU.
    rows = [
        torch.tensor(numbers, device=images.device).view(1, -1, 1, 1).expand(shape)
        .contiguous(memory_format=layout)
        for numbers in (mean, std)
    ]
    mean, scale = rows[0].mul_(255), rows[1].mul_(255).reciprocal_()
    return images.contiguous(memory_format=layout).sub(mean).mul_(scale)
