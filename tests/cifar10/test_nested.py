"""The shallow wide network in two parts: it is a wide network with weights of zero, and the first
part is independent of the second."""

import pytest
import torch
from helpers import assert_close
from torch import nn

from cifar10.airbench import Airbench
from cifar10.nested import GROUPS, NestedAirbench
from cifar10.networks import build_network
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.table import find_runtime
from early_exit.model.checks import check_network
from early_exit.model.cost import network_cost
from early_exit.model.network import MultiExitNetwork

FIRST, SECOND = (4, 12, 8), (6, 10, 16)


@pytest.fixture
def nested() -> NestedAirbench:
    """Narrow parts with statistics of BatchNorm that change something, in float64 and eval mode."""
    torch.manual_seed(0)
    network = NestedAirbench(first=FIRST, second=SECOND).double().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return network


def widened(nested: NestedAirbench) -> Airbench:
    """The plain network of both parts' channels, the second part's first, with the same weights and
    zeros wherever a part does not read the other."""
    widths = [own + other for own, other in zip(SECOND, FIRST, strict=True)]
    wide = Airbench(widths=widths).double().eval()
    wide.whiten.load_state_dict(nested.whiten.state_dict())
    wide.linear.load_state_dict(nested.linear.state_dict())
    for group, name in enumerate(GROUPS):
        for index in (0, 1):
            block = getattr(wide, name)[index]
            ours, theirs = nested.second[name][index], nested.first[name][index]
            split = SECOND[group]
            # the stem is the same for both; what a closing block reads is its own part
            both = group == 0 and index == 0
            begin = 0 if both else SECOND[group - 1 + index]
            with torch.no_grad():
                block[0].weight.zero_()
                block[0].weight[:split, : ours[0].in_channels] = ours[0].weight
                block[0].weight[split:, begin:] = theirs[0].weight
            for own, first, second in zip(block, theirs, ours, strict=True):
                if isinstance(own, nn.BatchNorm2d):
                    for key in ("weight", "bias", "running_mean", "running_var"):
                        joined = torch.cat([getattr(second, key), getattr(first, key)])
                        getattr(own, key).data.copy_(joined)
    return wide


def test_it_is_the_wide_network_with_weights_of_zero(nested):
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_close(nested(images), widened(nested)(images), terms=6 * 9 * 30)


def test_the_first_part_is_independent_of_the_second(nested):
    """And the second one depends on the first."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    units = list(nested.units().items())

    def first_maps() -> torch.Tensor:
        features = images
        for name, unit in units:
            if name.startswith("second"):
                break
            features = unit(features)
        return features[-1]

    with torch.no_grad():
        before, answer = first_maps(), nested(images)
        for parameter in nested.second.parameters():
            parameter.add_(0.1)
        assert torch.equal(first_maps(), before)
        changed = nested(images)
        assert not torch.equal(changed, answer)
        for parameter in nested.first.parameters():
            parameter.add_(0.1)
        assert not torch.equal(nested(images), changed)


def test_features_are_the_maps_that_are_still_to_be_read(nested):
    """The newest last. A map that nothing reads would be copied at every exit."""
    shapes, features = {}, torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    for name, unit in nested.units().items():
        features = unit(features)
        if isinstance(features, tuple):
            shapes[name] = [tuple(part.shape[1:]) for part in features]
    images, first, second = (
        (3, 32, 32),
        [(4, 15, 15), (12, 7, 7), (8, 3, 3)],
        [(6, 15, 15), (10, 7, 7), (16, 3, 3)],
    )
    assert shapes == {
        "whiten": [images, (24, 31, 31)],
        "first.group1.0": [images, first[0]],
        "first.group1.1": [images, first[0]],
        "first.group2.0": [images, *first[:2]],
        "first.group2.1": [images, *first[:2]],
        "first.group3.0": [images, *first],
        "first.group3.1": [images, *first],
        "second.group1.0": [*first, second[0]],
        "second.group1.1": [*first, second[0]],
        "second.group2.0": [*first[1:], second[1]],
        "second.group2.1": [*first[1:], second[1]],
        "second.group3.0": [first[2], second[2]],
        "second.group3.1": [first[2], second[2]],
    }
    assert features.shape == (1, 10)


@pytest.mark.parametrize(
    ("arch", "wide"), [("airbench_nested", 128), ("airbench_nested_wide", 192)]
)
def test_what_its_exits_cost(arch, wide):
    """The first part is an `airbench_slim`; the second computes the filters of the stem again.

    wide: the channels of the second part's last two groups.
    """
    cost = network_cost(build_network(arch, head="pooled"))
    slim = network_cost(build_network("airbench_slim", ("group2.0", "group2"), head="pooled"))
    assert cost.exit_names == ("first.group2.0", "first.group2", "first.group3", "final")
    assert cost.stage_macs[:2] == slim.stage_macs[:2]
    assert cost.stage_macs[2] == slim.stage_macs[2] - 128 * 10  # without the classifier
    second = (
        31 * 31 * (24 * 12 + 48 * 24 * 9)
        + 15 * 15 * (48 * 48 * 9 + wide * (48 + 16) * 9)
        + 7 * 7 * (wide * wide * 9 + wide * (wide + 128) * 9)
        + 3 * 3 * wide * wide * 9
        + (wide + 128) * 10
    )
    assert cost.stage_macs[3] == second
    assert cost.head_macs == (2 * 128 * 16 * 10,) * 3 + (0,)


def test_what_is_fixed():
    """As in the airbench: the whitening, and the scales of BatchNorm."""
    network = build_network("airbench_nested", ())
    scales = {
        f"{part}.group{group}.{block}.{2 - block}.weight"
        for part in ("first", "second")
        for group in (1, 2, 3)
        for block in (0, 1)
    }
    assert network.fixed == {"whiten.weight", *scales}


def test_its_whitening_is_that_of_the_airbench(nested):
    images = torch.randn(40, 3, 32, 32, dtype=torch.float64)
    airbench = Airbench(widths=(4, 4, 4)).double()
    for network in (nested, airbench):
        network.init_from_images(iter([images]))
    assert torch.equal(nested.whiten.weight, airbench.whiten.weight)


def test_a_convolution_passes_its_own_part_on(nested):
    """Of the maps that the second part joins, its own come first, and the convolution of 16 outputs
    starts as the identity on them and then on the first part's."""
    conv = nested.second["group3"][0][0]
    images = torch.randn(2, SECOND[1] + FIRST[1], 7, 7, dtype=torch.float64)
    with torch.no_grad():
        assert_close(conv(images), images[:, : SECOND[2]], terms=9 * 22)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_map_that_a_segment_only_passes_on_reaches_the_next(nested, name):
    """The images are an input and, unchanged, an output of the segments of the first part."""
    for package in ("onnxscript", name):
        pytest.importorskip(package)
    nested = nested.float()
    places = ("first.group1", *nested.default_exits, "second.group2")
    example = torch.randn(4, 3, 32, 32)
    network = MultiExitNetwork(
        nested, nested.units(), places, num_classes=10, example=example[:1], head="pooled"
    ).eval()
    check_network(network)
    running = RuntimeNetwork(network, find_runtime(name, threads=1), example)
    with torch.no_grad():
        expected = network(example)
    for found, logits in zip(running(example), expected, strict=True):
        assert_close(torch.as_tensor(found), logits, terms=6 * 9 * 30)
