"""The cost of an exit. Every number here is worked out by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar10.networks import build_network
from cifar10.resnet import DEPTHS
from early_exit.errors import UserError
from early_exit.model.cost import Cost, count_macs, network_cost
from early_exit.model.energy import estimate

# One 3x3 convolution inside layer1 has 16 * 16 * 9 weights and 32 * 32 outputs: 2,359,296 MACs.
# Halving the side and doubling both widths leaves that number as it is in layer2 and layer3.
CONV = 16 * 16 * 9 * 32 * 32
STEM = 3 * 16 * 9 * 32 * 32  # 442,368
ENTRY = CONV // 2  # the first convolution of layer2 and layer3: half as many input channels
CLASSIFIER = 64 * 10
# A 3x3 convolution of stride 2 from 16 to 16 channels onto 16x16, and a linear layer
HEAD = 16 * 16 * 9 * 16 * 16 + 16 * 10  # 589,984


def plain_macs(blocks):
    """Of a CIFAR ResNet with so many blocks in each of its three layers."""
    convs = 2 * blocks
    return STEM + convs * CONV + 2 * (ENTRY + (convs - 1) * CONV) + CLASSIFIER


@pytest.fixture(scope="module")
def cost20():
    """ResNet-20 with the default head after layer1 and layer2."""
    return network_cost(build_network("resnet20", ("layer1", "layer2")))


def test_a_convolution_by_hand():
    # 3 to 8 channels, 3x3, onto 4x4: 3 * 8 * 9 * 16
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert count_macs(conv, torch.zeros(1, 3, 4, 4)) == 3456


def test_a_strided_grouped_convolution_by_hand():
    # every one of 6 outputs sees 2 of 4 channels, 3x3, onto 2x2: 6 * 2 * 9 * 4
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    assert count_macs(conv, torch.zeros(1, 4, 4, 4)) == 432


def test_a_linear_layer_by_hand():
    assert count_macs(nn.Linear(10, 5), torch.zeros(1, 10)) == 50


def test_macs_grow_with_the_batch():
    assert count_macs(nn.Linear(10, 5), torch.zeros(7, 10)) == 350


def test_only_products_are_counted():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert count_macs(module.eval(), torch.zeros(1, 3, 8, 8)) == 0


@pytest.mark.parametrize(
    "arch, blocks, macs",
    # 442,368 + 6n * 2,359,296 - 2 * 1,179,648 + 640
    [
        ("resnet20", 3, 40_551_040),
        ("resnet32", 5, 68_862_592),
        ("resnet44", 7, 97_174_144),
        ("resnet56", 9, 125_485_696),
        ("resnet110", 18, 252_887_680),
    ],
)
def test_macs_of_the_plain_networks_by_hand(arch, blocks, macs):
    assert plain_macs(blocks) == macs
    assert network_cost(build_network(arch, ())).plain_macs == macs


def test_macs_of_every_stage_and_head_by_hand(cost20):
    assert cost20.exit_names == ("layer1", "layer2", "final")
    layer = ENTRY + 5 * CONV
    assert cost20.stage_macs == (STEM + 6 * CONV, layer, layer + CLASSIFIER)
    # at layer2 the head has 32 * 32 * 9 weights, 8 * 8 outputs and 32 * 10 in its linear layer
    assert cost20.head_macs == (HEAD, 32 * 32 * 9 * 64 + 320, 0)


def test_exits_do_not_change_the_plain_networks_macs(cost20):
    assert cost20.plain_macs == plain_macs(3)


def test_parameters_by_hand(cost20):
    # every convolution is followed by a BatchNorm of two numbers a channel
    layer1 = 6 * (16 * 16 * 9 + 32)
    layer2 = (16 * 32 * 9 + 64) + 5 * (32 * 32 * 9 + 64)
    layer3 = (32 * 64 * 9 + 128) + 5 * (64 * 64 * 9 + 128)
    stem, linear = 3 * 16 * 9 + 32, 64 * 10 + 10
    assert stem + layer1 + layer2 + layer3 + linear == 269_722
    assert cost20.backbone_params == 269_722
    head1 = 16 * 16 * 9 + 32 + 16 * 10 + 10
    head2 = 32 * 32 * 9 + 64 + 32 * 10 + 10
    assert cost20.head_params == (head1, head2, 0)


@pytest.mark.parametrize(
    "kind, macs, params",
    [
        # 16 channels: averages of 8x8 cells, maxima of 4x4, deviations of 2x2; a normalisation
        ("linear", 16 * 84 * 10, 16 * 84 * 10 + 10 + 2 * 16 * 84),
        # 16 channels of 4x4 cells, and the mixture's one number
        ("mixed_pool", 16 * 16 * 10, 16 * 16 * 10 + 10 + 1),
    ],
)
def test_the_other_heads_by_hand(kind, macs, params):
    cost = network_cost(build_network("resnet20", ("layer1",), head=kind))
    assert cost.head_macs == (macs, 0)
    assert cost.head_params == (params, 0)


HAND = Cost(
    exit_names=("a", "b", "final"),
    stage_macs=(100, 200, 700),
    head_macs=(10, 20, 0),
    backbone_params=1,
    head_params=(1, 1, 0),
)


@pytest.mark.parametrize(
    "enabled, cumulative",
    [
        ((), (110, 330, 1030)),
        ((True, True), (110, 330, 1030)),
        ((False, True), (100, 320, 1020)),
        ((True, False), (110, 310, 1010)),
        ((False, False), (100, 300, 1000)),
    ],
)
def test_an_exit_costs_all_stages_so_far_and_the_enabled_heads(enabled, cumulative):
    assert HAND.cumulative(enabled) == cumulative


def test_shares_are_of_the_plain_networks_macs():
    assert HAND.plain_macs == 1000
    assert HAND.shares() == (0.11, 0.33, 1.03)
    assert HAND.shares((False, True)) == (0.1, 0.32, 1.02)


def test_the_final_exit_costs_more_than_the_plain_network(cost20):
    assert cost20.shares()[-1] > 1
    assert cost20.shares((False, False))[-1] == 1


def test_the_plain_network_costs_all_of_itself():
    cost = network_cost(build_network("resnet20", ()))
    assert cost.cumulative() == (cost.plain_macs,)
    assert cost.shares() == (1.0,)


def test_a_wrong_number_of_flags_is_an_error():
    with pytest.raises(ValueError):
        HAND.cumulative((True,))


@pytest.mark.parametrize("place", ["layer1", "layer2"])
@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=[pytest.mark.slow] * (arch == "resnet1202")) for arch in DEPTHS],
)
def test_the_default_head_costs_at_most_two_percent(arch, place):
    cost = network_cost(build_network(arch, (place,)))
    assert 0 < cost.head_macs[0] / cost.plain_macs <= 0.02


@pytest.mark.parametrize(
    "arch, place",
    # a ResNet-20's last block; of a ResNet-110 the last but one: 1 - 4,718,592 / 252,887,680 is
    # 98.1 %, and the head is on top
    [("resnet20", "layer3"), ("resnet110", "layer3.16")],
)
def test_a_place_that_saves_nothing_is_refused_in_one_line(arch, place):
    with pytest.raises(UserError, match=f"{place} .*%") as error:
        network_cost(build_network(arch, (place,)))
    assert "\n" not in str(error.value)


def test_a_place_that_saves_something_is_accepted():
    # the last but one block of a ResNet-20: two convolutions and the classifier are saved
    cost = network_cost(build_network("resnet20", ("layer3.1",), head="linear"))
    assert cost.stage_macs == (plain_macs(3) - 2 * CONV - CLASSIFIER, 2 * CONV + CLASSIFIER)


def test_counting_does_not_change_the_network(tiny_net):
    tiny_net.train()
    before = copy.deepcopy(tiny_net.state_dict())
    network_cost(tiny_net)
    assert tiny_net.training
    after = tiny_net.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert {value.device.type for value in after.values()} == {"cpu"}


def test_counting_computes_nothing(tiny_net):
    devices = set()

    def spy(module, inputs):
        devices.update(tensor.device.type for tensor in inputs)

    handle = nn.modules.module.register_module_forward_pre_hook(spy)
    try:
        network_cost(tiny_net)
    finally:
        handle.remove()
    assert devices == {"meta"}


class Outputs(TorchDispatchMode):
    """The devices of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.devices.add(tensor.device.type)
        return found


@pytest.mark.parametrize("count", [network_cost, lambda net: estimate(net, network_cost(net))])
def test_counting_copies_no_weight(tiny_net, count):
    with Outputs() as outputs:
        count(tiny_net)
    assert outputs.devices == {"meta"}


def test_a_copy_of_a_weight_would_be_seen(tiny_net):
    with Outputs() as outputs:
        copy.deepcopy(tiny_net)
    assert outputs.devices == {"cpu"}
