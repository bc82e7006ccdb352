"""The optimiser: learning rates by hand, and which parameters get which rate and decay."""

import math

import pytest
import torch
from torch import nn

from early_exit.config import OptimConfig
from early_exit.training.optimizer import lr_at, make_optimizer


def optim(**changes):
    """Settings without warm-up."""
    return OptimConfig(**{"epochs": 100, "lr": 0.8, "warmup_epochs": 0, **changes})


@pytest.mark.parametrize(
    "epoch, lr", [(0, 0.8), (49.99, 0.8), (50, 0.08), (74.99, 0.08), (75, 0.008), (99.99, 0.008)]
)
def test_step_schedule_divides_by_ten_at_every_milestone(epoch, lr):
    settings = optim(schedule="step", milestones=(0.5, 0.75))
    assert lr_at(settings, epoch) == pytest.approx(lr)


@pytest.mark.parametrize(
    # half a cosine: 1, (1 + sqrt 1/2) / 2, 1/2, 0
    "epoch, share",
    [(0, 1), (25, (1 + math.sqrt(0.5)) / 2), (50, 0.5), (100, 0)],
)
def test_cosine_schedule_falls_to_nothing(epoch, share):
    assert lr_at(optim(schedule="cosine"), epoch) == pytest.approx(0.8 * share)


@pytest.mark.parametrize("epoch, share", [(0, 0.1), (2.5, 0.55), (4.99, 0.9982), (5, 1), (20, 1)])
def test_warmup_rises_from_a_tenth(epoch, share):
    settings = optim(schedule="step", milestones=(0.5,), warmup_epochs=5)
    assert lr_at(settings, epoch) == pytest.approx(0.8 * share)


def test_warmup_takes_a_tenth_of_a_short_phase():
    settings = optim(epochs=10, schedule="step", milestones=(0.5,), warmup_epochs=5)
    assert lr_at(settings, 0.5) == pytest.approx(0.8 * 0.55)  # half of one epoch
    assert lr_at(settings, 1) == pytest.approx(0.8)


def test_cosine_begins_where_warmup_ends():
    settings = optim(schedule="cosine", warmup_epochs=10)
    assert lr_at(settings, 10) == pytest.approx(0.8)
    assert lr_at(settings, 55) == pytest.approx(0.4)  # halfway from 10 to 100
    assert lr_at(settings, 100) == pytest.approx(0)


TRIANGLE = {"schedule": "triangular", "start_factor": 0.2, "peak": 0.25, "end_factor": 0.05}


@pytest.mark.parametrize(
    # up by 0.8 in 25 epochs, then down by 0.95 in 75
    "epoch, share",
    [(0, 0.2), (12.5, 0.6), (25, 1), (50, 1 - 0.95 / 3), (62.5, 0.525), (100, 0.05)],
)
def test_triangular_schedule_rises_and_falls_linearly(epoch, share):
    settings = optim(**TRIANGLE, warmup_epochs=50)  # which it does not use
    assert lr_at(settings, epoch) == pytest.approx(0.8 * share)


@pytest.fixture
def small():
    """A convolution, a BatchNorm and a linear layer."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def decays(optimizer):
    """The weight decay of every parameter, by identity."""
    return {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_all_parameters_decay_if_asked(small):
    found = decays(make_optimizer(small, optim(weight_decay=0.01, decay_norm=True)))
    assert found == {id(parameter): 0.01 for parameter in small.parameters()}


def test_norms_and_biases_are_spared_if_asked(small):
    found = decays(make_optimizer(small, optim(weight_decay=0.01, decay_norm=False)))
    decayed = {id(small[0].weight), id(small[3].weight)}
    assert found == {
        id(parameter): 0.01 if id(parameter) in decayed else 0.0 for parameter in small.parameters()
    }


def test_frozen_parameters_are_in_no_group(small):
    small[0].requires_grad_(False)
    found = decays(make_optimizer(small, optim()))
    assert set(found) == {id(p) for p in [*small[1].parameters(), *small[3].parameters()]}


def test_the_optimizer_is_as_configured(small):
    optimizer = make_optimizer(small, optim(momentum=0.7, nesterov=True, lr=0.3))
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.7, True)


def test_without_factors_there_is_one_group(small):
    (group,) = make_optimizer(small, optim()).param_groups
    assert group["params"] == list(small.parameters())
    assert (group["lr"], group["lr_scale"], group["weight_decay"]) == (0.8, 1.0, 1e-4)


def factors(optimizer):
    """The factor on the rate, and the weight decay, of every parameter, by identity."""
    return {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_norm_biases_get_a_rate_of_their_own_and_decay_as_the_others(small):
    optimizer = make_optimizer(small, optim(bias_lr_scale=64, weight_decay=0.64))
    found = factors(optimizer)
    assert found.pop(id(small[1].bias)) == (64, 0.01)
    assert set(found.values()) == {(1, 0.64)} and len(found) == 5  # other biases too
    assert {group["lr"] for group in optimizer.param_groups} == {0.8, 64 * 0.8}


def test_spared_norm_biases_are_neither_merged_nor_decayed(small):
    settings = optim(bias_lr_scale=4, weight_decay=0.5, decay_norm=False)
    found = factors(make_optimizer(small, settings))
    assert found[id(small[1].bias)] == (4, 0.0)
    assert found[id(small[1].weight)] == (1, 0.0)
    assert found[id(small[0].weight)] == (1, 0.5)


def test_heads_get_a_rate_of_their_own(make_net):
    net = make_net(head="pooled")
    settings = optim(head_lr_scale=0.5, bias_lr_scale=8, weight_decay=1.0)
    found = factors(make_optimizer(net, settings))
    for head in net.heads.values():
        assert found[id(head.linear.weight)] == (0.5, 1.0)
        assert found[id(head.norm.bias)] == (4, 0.125)  # both factors
    assert found[id(net.backbone.linear.weight)] == (1, 1.0)
    assert found[id(net.backbone.bn1.bias)] == (8, 0.125)


def test_a_backbone_of_its_own_has_no_heads():
    """torchvision's ViTs call their classifier `heads`."""
    backbone = nn.ModuleDict({"heads": nn.Linear(2, 2)})
    (group,) = make_optimizer(backbone, optim(head_lr_scale=0.5)).param_groups
    assert group["lr_scale"] == 1
