"""How far apart two correct computations may lie, worked out from the arithmetic."""

import functools

import pytest
import torch
from torch import Tensor


def bound(dtype: torch.dtype, terms: int) -> float:
    """The relative error of a result that `terms` numbers were added up for, one after the other.

    Every addition, multiplication or rounded function of it is off by at most half of the dtype's
    epsilon, so a chain of n of them by at most about n epsilon (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), whatever their order. For a network count the terms of the
    sums along its longest path: a 3x3 convolution of 16 channels adds 144, and BatchNorm and ReLU
    count one each.
    """
    return terms * torch.finfo(dtype).eps


def assert_close(found: Tensor, expected: Tensor, terms: int) -> None:
    """The same value by two ways, each a chain of at most `terms` additions and products.

    The error is relative to the largest entry: a small one may be what large ones leave when they
    cancel.
    """
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    limit = bound(found.dtype, terms) * float(expected.detach().abs().max())
    assert float((found - expected).detach().abs().max()) <= limit


@functools.cache
def missing(dtype: torch.dtype) -> str | None:
    """Why this processor cannot convolve and multiply in `dtype`, or None where it can: tried, not
    asked by name."""
    images = torch.ones(1, 1, 4, 4, dtype=dtype, requires_grad=True)
    kernel = torch.ones(1, 1, 3, 3, dtype=dtype, requires_grad=True)
    try:
        made = torch.nn.functional.conv2d(images, kernel).flatten(1)
        made = torch.nn.functional.linear(made, torch.ones(2, 4, dtype=dtype))
        made.float().sum().backward()
    except RuntimeError as error:
        return f"no {dtype} on this processor: {error}"
    # 4 * 9, and twice each of 4 pixels; perturbed outputs may be off, garbage is far away
    right = ((made - 36).abs() < 18).all() and ((kernel.grad - 8).abs() < 4).all()
    return None if right else f"{dtype} gives wrong results on this processor"


def skip_without(dtype: torch.dtype) -> None:
    """Skips the test on a processor without `dtype`, and says so."""
    if missing(dtype):
        pytest.skip(missing(dtype))
