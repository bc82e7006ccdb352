"""Averages of weights: the moving average and Lookahead, by hand."""

import copy

import pytest
import torch
from helpers import assert_close

from early_exit.training.averages import Average, Lookahead


def test_the_average_by_hand():
    net = torch.nn.Linear(1, 1, bias=False)
    average = Average(net, 0.5)
    seen = []
    for value in (1.0, 2.0, 3.0):
        net.weight.data.fill_(value)
        average.update(net)
        seen.append(average.module.weight.item())
    # the first is taken as it is; then decays of min(0.5, 2 / 11) and min(0.5, 3 / 12)
    second = 2 / 11 * 1.0 + 9 / 11 * 2.0
    assert seen == pytest.approx([1.0, second, 0.25 * second + 0.75 * 3.0])


def test_the_average_takes_statistics_too_and_leaves_the_network_alone(make_net):
    net = make_net().double()
    average = Average(net, 0.9)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(4, 3, 16, 16, dtype=torch.float64))
            average.update(net)
    assert net.training and not average.module.training
    names = [name for name, _ in net.named_buffers() if "running_mean" in name]
    assert any(
        not torch.equal(net.get_buffer(name), average.module.get_buffer(name)) for name in names
    )
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    counted = "backbone.bn1.num_batches_tracked"
    assert average.module.get_buffer(counted) == net.get_buffer(counted) == 3
    chained = average.module(images)[-1]  # its stages are views of its own backbone
    # eight layers, of at most 64 channels and 3x3 kernels
    assert_close(chained, average.module.backbone(images), terms=8 * 64 * 9)


def test_lookahead_equals_its_definition(make_net):
    """Twelve steps that add the same noise to a network and to a copy of its numbers."""
    net, every, decay, total = make_net().double(), 5, 0.95, 12
    slow = {name: value.clone() for name, value in net.state_dict().items()}
    fast = {name: value.clone() for name, value in slow.items()}
    lookahead = Lookahead(net, every, decay, total)
    for step in range(1, total + 1):
        for name, value in net.state_dict().items():
            noise = torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
            value += noise
            fast[name] = fast[name] + noise
        lookahead.update(net)
        if step % every == 0:
            kept = decay**every * (step / total) ** 3
            for name, value in fast.items():
                averaged = value.is_floating_point()
                slow[name] = kept * slow[name] + (1 - kept) * value if averaged else value
                fast[name] = slow[name]
        for found, wanted in ((net.state_dict(), fast), (lookahead.module.state_dict(), slow)):
            for name, value in found.items():
                if value.is_floating_point():
                    # a step adds once, and an update multiplies and adds at most thrice by each way
                    assert_close(value, wanted[name], terms=step + 2 * 6)
                else:
                    assert torch.equal(value, wanted[name])
    assert lookahead.steps == total and net.training and not lookahead.module.training


def test_lookahead_leaves_what_is_not_trained_to_the_bit(make_net):
    net = make_net()
    lookahead = Lookahead(net, 2, 0.95, 8, steps=3)  # its next update is after one step
    frozen = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    with torch.no_grad():
        for parameter in net.heads.parameters():
            parameter += 1
    heads = copy.deepcopy(net.heads.state_dict())
    lookahead.update(net)
    for network in (net, lookahead.module):
        for name, value in network.backbone.state_dict().items():
            assert torch.equal(value, frozen[name])
    changed = [
        not torch.equal(value, heads[name]) for name, value in net.heads.state_dict().items()
    ]
    assert any(changed)
