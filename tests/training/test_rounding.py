"""Weights rounded to float16: which they are, to what, and what is refused."""

import pytest
import torch
from helpers import assert_names, refusal
from torch import nn

from early_exit.training.rounding import rounded, to_float16


def test_values_are_rounded_to_nearest_with_ties_to_even():
    """float16 has ten bits after the point: between 1 and 2 its steps are 2^-10."""
    step = 2.0**-10
    weights = {"w": torch.tensor([1 + 0.25 * step, 1 + 0.5 * step, 1 + 1.5 * step, 2.0**-25])}
    found = rounded(weights)["w"]
    assert found.dtype == torch.float32
    assert found.tolist() == [1, 1, 1 + 2 * step, 0]


def test_running_statistics_and_counters_stay():
    norm = nn.BatchNorm2d(1)
    norm.running_var.fill_(1e6)  # more than float16 can hold
    norm.running_mean.fill_(1 / 3)
    nn.init.constant_(norm.weight, 1 / 3)
    found = to_float16({f"layer.{name}": value for name, value in norm.state_dict().items()})
    types = {name: value.dtype for name, value in found.items()}
    assert types == {
        "layer.weight": torch.float16,
        "layer.bias": torch.float16,
        "layer.running_mean": torch.float32,
        "layer.running_var": torch.float32,
        "layer.num_batches_tracked": torch.int64,
    }
    assert found["layer.running_var"].item() == 1e6


def test_rounding_again_changes_nothing():
    weights = {"w": torch.linspace(-3, 3, 101)}
    once = rounded(weights)
    assert torch.equal(rounded(once)["w"], once["w"])
    assert not torch.equal(once["w"], weights["w"])


@pytest.mark.parametrize(("largest", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False)])
def test_a_weight_that_float16_cannot_hold_is_refused(largest, fits):
    """65504 is the largest, and the next step would be at 65536."""
    weights = {"small": torch.ones(2), "large": torch.tensor([-largest, 1.0])}
    if fits:
        assert rounded(weights)["large"].tolist() == [-65504, 1]
    else:
        assert_names(refusal(rounded, weights), "large", 65504, "6.552e+04", "--weights")


def test_a_weight_that_was_infinite_before_is_no_overflow():
    found = to_float16({"w": torch.tensor([torch.inf, 1])})["w"]
    assert found.tolist() == [torch.inf, 1]
