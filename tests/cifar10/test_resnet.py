"""The CIFAR ResNets: names, shapes, shortcuts."""

import pytest
import torch
from helpers import assert_close, refusal
from torch import nn
from torch.nn import functional as F

from cifar10.networks import build_backbone, build_network
from cifar10.resnet import DEPTHS, BasicBlock, ResNet
from early_exit.model.heads import LinearHead

ARCHS = [pytest.param(arch, marks=[pytest.mark.slow] * (arch == "resnet1202")) for arch in DEPTHS]


def akamaster_names(blocks):
    """The state dict's names in akamaster's pytorch_resnet_cifar10, written out."""

    def norm(prefix):
        return [
            f"{prefix}.{name}"
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]

    names = ["conv1.weight", *norm("bn1")]
    for layer in (1, 2, 3):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}"
            names += [f"{prefix}.conv1.weight", *norm(f"{prefix}.bn1")]
            names += [f"{prefix}.conv2.weight", *norm(f"{prefix}.bn2")]
    return [*names, "linear.weight", "linear.bias"]


@pytest.mark.parametrize("arch, blocks", [("resnet20", 3), ("resnet56", 9)])
def test_parameters_are_named_as_in_the_public_checkpoints(arch, blocks):
    assert list(build_backbone(arch).state_dict()) == akamaster_names(blocks)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_network_has_as_many_layers_as_its_name_says(arch):
    layers = [
        module
        for module in build_backbone(arch).modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert f"resnet{len(layers)}" == arch


@pytest.mark.parametrize("arch", ARCHS)
def test_every_network_gets_an_exit_after_its_first_stage(arch):
    network = build_network(arch).eval()
    assert network.exit_names == ("layer1", "final")
    with torch.no_grad():
        logits = network(torch.zeros(2, 3, 32, 32))
    assert [tuple(exit_logits.shape) for exit_logits in logits] == [(2, 10)] * 2


def test_no_exits_build_the_plain_network():
    assert build_network("resnet20", ()).exit_names == ("final",)


def test_named_exits_head_and_classes_are_built():
    network = build_network("resnet20", ("layer1.0", "layer2"), head="linear", num_classes=7).eval()
    assert network.exit_names == ("layer1.0", "layer2", "final")
    assert [exit_logits.shape[1] for exit_logits in network(torch.zeros(1, 3, 32, 32))] == [7] * 3
    assert isinstance(network.heads["layer2"], LinearHead)


def test_unknown_network_is_refused_with_the_known_ones_named():
    message = refusal(build_backbone, "resnet18")
    assert "'resnet18'" in message and all(arch in message for arch in DEPTHS)


@pytest.mark.parametrize("training", [False, True])
def test_units_one_after_the_other_are_the_network(training):
    torch.manual_seed(0)
    backbone = build_backbone("resnet20").double().train(training)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        features = images
        for unit in backbone.units().values():
            features = unit(features)
        # 20 layers of at most 64 channels; in training BatchNorm adds up all pixels of the batch
        assert_close(features, backbone(images), terms=20 * (64 * 9 + 3 * 32 * 32))


def test_units_are_the_blocks_in_order():
    assert list(ResNet(2).units()) == [
        "stem",
        "layer1.0",
        "layer1.1",
        "layer2.0",
        "layer2.1",
        "layer3.0",
        "layer3.1",
        "classifier",
    ]


def test_layers_halve_the_picture_and_double_the_width():
    features, shapes = torch.zeros(1, 3, 32, 32), []
    for name, unit in ResNet(2).eval().units().items():
        features = unit(features)
        shapes.append((name, tuple(features.shape[1:])))
    assert shapes == [
        ("stem", (16, 32, 32)),
        ("layer1.0", (16, 32, 32)),
        ("layer1.1", (16, 32, 32)),
        ("layer2.0", (32, 16, 16)),
        ("layer2.1", (32, 16, 16)),
        ("layer3.0", (64, 8, 8)),
        ("layer3.1", (64, 8, 8)),
        ("classifier", (10,)),
    ]


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [4, 5])
def test_option_a_takes_every_second_pixel_and_pads_with_zeros(side, layout):
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    features = torch.rand(2, 4, side, side)  # not negative, so that the last ReLU does nothing
    features = features.contiguous(memory_format=layout)
    out = block(features)
    half = (side + 1) // 2
    assert out.shape == (2, 8, half, half)
    for image in range(2):
        for channel in range(8):
            for y in range(half):
                for x in range(half):
                    inside = 2 <= channel < 6  # two new channels of zeros on each side
                    expected = features[image, channel - 2, 2 * y, 2 * x] if inside else 0
                    assert out[image, channel, y, x] == expected


def test_a_block_of_the_same_width_adds_its_input_as_it_is():
    block = BasicBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.bn2.weight)
    features = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(features), features)


def slow_norm(bn, features):
    """BatchNorm by its formula, in eval mode."""
    mean, var, weight, bias = (
        values[None, :, None, None]
        for values in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (features - mean) / (var + bn.eps).sqrt() * weight + bias


@pytest.mark.parametrize("in_channels, channels, stride", [(4, 4, 1), (4, 8, 2)])
def test_a_block_is_two_convolutions_and_a_shortcut(in_channels, channels, stride):
    torch.manual_seed(0)
    block = BasicBlock(in_channels, channels, stride).double().eval()
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    features = torch.randn(2, in_channels, 8, 8, dtype=torch.float64)
    out = F.conv2d(features, block.conv1.weight, stride=stride, padding=1)
    out = slow_norm(block.bn1, out).clamp(min=0)
    out = slow_norm(block.bn2, F.conv2d(out, block.conv2.weight, padding=1))
    shortcut = torch.zeros_like(out)
    pad = (channels - in_channels) // 2
    shortcut[:, pad : pad + in_channels] = features[:, :, ::stride, ::stride]
    # two convolutions of at most 8 channels and 3x3 pixels, each with a norm
    assert_close(block(features), (out + shortcut).clamp(min=0), terms=2 * (8 * 9 + 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_layout_of_the_features(layout):
    block = BasicBlock(4, 8, stride=2).to(memory_format=layout)
    features = torch.randn(2, 4, 8, 8).contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(block(features).sum(), features)
    assert gradient.is_contiguous(memory_format=layout)


def test_a_block_does_not_change_its_input():
    features = torch.randn(2, 4, 6, 6)
    before = features.clone()
    BasicBlock(4, 4, stride=1).eval()(features)
    assert torch.equal(features, before)


def test_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(seed)
        return build_backbone("resnet20").state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
