"""Weights rounded to float16, which halves their file.

The running statistics of BatchNorm stay as they are: a variance may be larger or smaller than
float16 can hold. Computing is not changed: the rounded values are used in the network's own type.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from early_exit.errors import UserError
from early_exit.system.text import first_few

FLOAT16 = "float16"
ROUNDINGS = (FLOAT16,)
"""What weights can be rounded to."""
STATISTICS = ("running_mean", "running_var")  # torch's names, of BatchNorm and InstanceNorm


def to_float16(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state dict in float16, but running statistics and integers as they are.

    Raises UserError if a finite weight is too large for float16.
    """
    found = {
        name: value.half() if _is_rounded(name, value) else value for name, value in weights.items()
    }
    large = [
        f"{name}, up to {float(weights[name].abs().max()):.4g}"
        for name, value in found.items()
        if value.dtype == torch.float16
        if bool((value.isinf() & weights[name].isfinite()).any())
    ]
    if large:
        limit = torch.finfo(torch.float16).max
        raise UserError(
            f"weights are larger than float16 can hold, which is {limit:.0f}: {first_few(large)};"
            " use them as they are, without --weights float16"
        )
    return found


def rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state dict rounded to float16, in their own types.

    Errors: as for `to_float16`.
    """
    half = to_float16(weights)
    return {name: half[name].to(value.dtype) for name, value in weights.items()}


def _is_rounded(name: str, value: Tensor) -> bool:
    return value.is_floating_point() and name.rpartition(".")[2] not in STATISTICS
