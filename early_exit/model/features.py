"""Features between stages: one tensor, or a tuple of tensors (multi-scale networks), rows first.

Needs no torch: it works on torch and numpy arrays alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Size, Tensor

Features: TypeAlias = "Tensor | tuple[Tensor, ...]"
Shape: TypeAlias = "Size | tuple[Size, ...]"


def select_rows(features: Any, rows: Any) -> Any:
    """The given rows of features, in every tensor of a tuple.

    rows: indices, a slice or a mask, as the array type takes them.
    """
    if isinstance(features, tuple):
        return tuple(part[rows] for part in features)
    return features[rows]  # indexing keeps channels_last, index_select does not


def num_rows(features: Any) -> int:
    """The number of rows."""
    return len(features[0] if isinstance(features, tuple) else features)


def concatenate(parts: Sequence[Any], join: Callable[[list[Any]], Any]) -> Any:
    """The rows of several features one after the other; of tuples, in every tensor.

    join: concatenates tensors along the rows. In torch the memory format is kept.
    """
    if isinstance(parts[0], tuple):
        return tuple(join(list(tensors)) for tensors in zip(*parts, strict=True))
    return join(list(parts))


def shape_of(features: Any) -> Any:
    """The shape of features; of a tuple, the tuple of its shapes."""
    if isinstance(features, tuple):
        return tuple(part.shape for part in features)
    return features.shape


def describe_shape(features: Any) -> str:
    """The shape in words, for messages; of anything else, its type."""
    if isinstance(features, tuple):
        return f"({', '.join(map(describe_shape, features))})"
    return str(tuple(features.shape)) if hasattr(features, "shape") else type(features).__name__
