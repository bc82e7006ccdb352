"""Max pooling to a grid whose cells differ in size, which ONNX has no operator for."""

import torch
from torch import Tensor

MAX_POOL = torch.ops.aten.adaptive_max_pool2d.default


def expand_uneven_pools(traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same operations with each such pooling as maxima of slices. Others stay."""
    uneven = any(
        node.target is MAX_POOL and not _is_even(node.args[0].meta["val"], node.args[1])
        for node in traced.graph.nodes
    )
    return traced.run_decompositions({MAX_POOL: _pool}) if uneven else traced


def _is_even(features: Tensor, grid: list[int]) -> bool:
    """Whether the cells of a grid are equal."""
    return all(side % cells == 0 for side, cells in zip(features.shape[-2:], grid, strict=True))


def _pool(features: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
    """The maximum in each cell; its place, which heads do not use, is -1."""
    if _is_even(features, grid):
        return NotImplemented
    for axis, cells in zip((-2, -1), grid, strict=True):
        side = features.shape[axis]
        maxima = []
        for cell in range(cells):
            start, end = cell * side // cells, -(-(cell + 1) * side // cells)
            maxima.append(features.narrow(axis, start, end - start).amax(dim=axis))
        features = torch.stack(maxima, dim=axis)
    return features, torch.full_like(features, -1, dtype=torch.int64)
