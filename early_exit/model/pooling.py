"""Pooling to a grid, by the cheapest operation that gives the result.

The cells of a grid are those of torch's adaptive pooling. Plain pooling computes the same where
they are of equal size, and is one operation in every runtime.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def average_pool(features: Tensor, grid: int) -> Tensor:
    """The average in each cell of a grid: (B, C, H, W) to (B, C, grid, grid)."""
    if features.shape[2:] == (grid, grid):
        return features
    if has_equal_cells(features, grid) and grid > 1:
        return F.avg_pool2d(features, _cell(features, grid))
    if grid > 1 and torch.compiler.is_exporting():
        rows, columns = (_averaging_matrix(size, grid, features) for size in features.shape[2:])
        return rows @ features @ columns.T
    return F.adaptive_avg_pool2d(features, grid)  # on a 1x1 grid the mean, which is faster


def max_pool(features: Tensor, grid: int) -> Tensor:
    """The maximum in each cell of a grid: (B, C, H, W) to (B, C, grid, grid)."""
    if features.shape[2:] == (grid, grid):
        return features
    if has_equal_cells(features, grid) and grid > 1:
        return F.max_pool2d(features, _cell(features, grid))
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


def _cell(features: Tensor, grid: int) -> tuple[int, int]:
    height, width = features.shape[2:]
    return height // grid, width // grid


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
