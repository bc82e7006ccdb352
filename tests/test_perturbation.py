"""The simulated rounding is small, deterministic, and different for other batches."""

import pytest
import torch
from perturbation import perturbed
from torch import nn
from torch.nn import functional

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3), nn.Linear(8, 4)])
def test_every_output_is_off_by_a_few_epsilon(layer, dtype):
    layer = layer.to(dtype)
    shape = (4, 3, 8, 8)[: 4 if isinstance(layer, nn.Conv2d) else 3]
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = layer(given)
    with perturbed(100):
        off = (layer(given) - plain).abs() / plain.abs() / torch.finfo(dtype).eps
    assert 50 < off.max() <= 101
    assert 30 < off.mean() < 70  # evenly spread, where nothing was off before; else a little more


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_has_the_same_noise(dtype):
    layer, images = nn.Conv2d(3, 4, 3).to(dtype), torch.rand(4, 3, 8, 8, dtype=dtype)
    with perturbed(4):
        whole = layer(images)
        assert torch.equal(whole, layer(images))
        assert not torch.equal(whole[:2], layer(images[:2]))


def test_infinity_and_zero_stay():
    values = torch.tensor([[float("inf")], [-float("inf")], [0.0]])
    with perturbed(4):
        assert torch.equal(functional.linear(values, torch.ones(1, 1)), values)


def test_it_ends_with_its_context():
    layer = functional.linear
    with pytest.raises(RuntimeError), perturbed(4):
        assert functional.linear is not layer
        raise RuntimeError
    assert functional.linear is layer
