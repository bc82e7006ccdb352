"""Pooling to a grid, by the cheapest operation that gives the result.

The cells of a grid are those of torch's adaptive pooling. Plain pooling computes the same where
they are of equal size or nearly so, and is one operation in every runtime.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def average_pool(features: Tensor, grid: int) -> Tensor:
    """The average in each cell of a grid: (B, C, H, W) to (B, C, grid, grid)."""
    if features.shape[2:] == (grid, grid):
        return features
    windows = _windows(features, grid)
    if windows and grid > 1:
        return F.avg_pool2d(features, *windows, count_include_pad=False)
    if grid > 1 and torch.compiler.is_exporting():
        rows, columns = (_averaging_matrix(size, grid, features) for size in features.shape[2:])
        return rows @ features @ columns.T
    return F.adaptive_avg_pool2d(features, grid)  # on a 1x1 grid the mean, which is faster


def max_pool(features: Tensor, grid: int) -> Tensor:
    """The maximum in each cell of a grid: (B, C, H, W) to (B, C, grid, grid)."""
    if features.shape[2:] == (grid, grid):
        return features
    windows = _windows(features, grid)
    if windows and grid > 1:
        return F.max_pool2d(features, *windows)
    if grid > 1 and torch.compiler.is_exporting():
        return _max_of_rows(_max_of_rows(features, grid).mT, grid).mT
    return F.adaptive_max_pool2d(features, grid)


def has_equal_cells(features: Tensor, grid: int) -> bool:
    """Whether the cells of a grid divide the features evenly."""
    return all(size % grid == 0 for size in features.shape[2:])


class AdaptiveMaxPool(nn.Module):
    """`max_pool` as a module."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, features: Tensor) -> Tensor:
        return max_pool(features, self.grid)


Sides = tuple[int, int]


def _windows(features: Tensor, grid: int) -> tuple[Sides, Sides, Sides] | None:
    """Kernel, stride and padding of the plain pooling whose windows are the cells of a grid; None
    if there is none."""
    found = [_window(size, grid) for size in features.shape[2:]]
    if None in found:
        return None
    kernel, stride, padding = zip(*found, strict=True)
    return kernel, stride, padding


def _window(size: int, grid: int) -> tuple[int, int, int] | None:
    """The same along one dimension.

    Cells of equal size are windows without padding. Of a side that lacks one pixel of that, as 7 or
    15 pixels on a grid of four, cell i is what is inside of [i * stride - 1, (i + 1) * stride).
    """
    missing = -size % grid
    if missing > 1:
        return None
    stride = (size + missing) // grid
    return stride + missing, stride, missing


# ONNX has no adaptive pooling. Where cells overlap or differ in size, torch exports the average as
# a gather of every cell and cannot export the maximum.


def _spans(size: int, grid: int) -> list[tuple[int, int]]:
    """Where each cell begins and ends along one dimension."""
    return [(cell * size // grid, -(-(cell + 1) * size // grid)) for cell in range(grid)]


def _averaging_matrix(size: int, grid: int, like: Tensor) -> Tensor:
    """(grid, size): a row's product with a column of features is the average of a cell."""
    matrix = [
        [(begin <= index < end) / (end - begin) for index in range(size)]
        for begin, end in _spans(size, grid)
    ]
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)


def _max_of_rows(features: Tensor, grid: int) -> Tensor:
    """The maxima of the rows of each cell: (B, C, H, W) to (B, C, grid, W)."""
    spans = _spans(features.shape[2], grid)
    longest = max(end - begin for begin, end in spans)
    # a shorter cell repeats its last row, which does not change the maximum
    rows = [min(begin + step, end - 1) for begin, end in spans for step in range(longest)]
    gathered = features.index_select(2, torch.tensor(rows, device=features.device))
    return gathered.unflatten(2, (grid, longest)).amax(dim=3)  # of (B, C, grid, longest, W)
