"""The moving average of weights, by hand."""

import pytest
import torch
from helpers import assert_close

from early_exit.training.averages import Average


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
