"""The small networks beside the ResNets: their blocks, and their price worked out by hand."""

import pytest
import torch
from helpers import assert_close, refusal

from cifar10 import data, trainer
from cifar10.networks import BACKBONES, build_backbone, build_network, places
from early_exit import config as configs
from early_exit.config import Config, DataConfig, ModelConfig
from early_exit.model.cost import count_macs, network_cost, place_shares, with_every_exit

SMALL = ["alexnet", "lenet", "mnist_2c", "mnist_3c"]
GREY, COLOUR = data.SHAPES["mnist"], data.SHAPES["cifar10"]


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("arch", [*SMALL, "airbench", "airbench_nested_wide", "resnet20"])
def test_the_blocks_one_after_the_other_are_the_network(arch, shape):
    torch.manual_seed(0)
    backbone = build_backbone(arch, 10, shape).double().eval()
    features = images = torch.randn(3, *shape, dtype=torch.float64)
    for unit in backbone.units().values():
        features = unit(features)
    # at most 20 layers that add up 64 channels of 3x3 pixels, or five of 96, or four of 256
    assert_close(features, backbone(images), terms=20 * 64 * 9)
    assert features.shape == (3, 10)


@pytest.mark.parametrize(
    ("arch", "shape", "layers"),
    [
        # outputs x (kernel^2 x inputs) for a convolution; inputs x outputs for a linear layer
        (
            "lenet",
            GREY,
            [5 * 30**2 * 25, 10 * 17**2 * 25 * 5, 20 * 11**2 * 25 * 10, 20 * 36 * 84, 84 * 10],
        ),
        (
            "alexnet",
            COLOUR,
            [
                32 * 32**2 * 25 * 3,
                64 * 16**2 * 25 * 32,
                96 * 8**2 * 9 * 64,
                96 * 8**2 * 9 * 96,
                64 * 8**2 * 9 * 96,
                1024 * 256,
                256 * 128,
                128 * 10,
            ],
        ),
        ("mnist_2c", GREY, [6 * 24**2 * 25, 12 * 8**2 * 25 * 6, 12 * 16 * 10]),
        ("mnist_3c", GREY, [8 * 26**2 * 9, 16 * 11**2 * 9 * 8, 32 * 4**2 * 9 * 16, 32 * 4 * 10]),
    ],
)
def test_multiply_adds_by_hand(arch, shape, layers):
    backbone = build_backbone(arch, 10, shape)
    assert count_macs(backbone.to("meta"), torch.empty(1, *shape, device="meta")) == sum(layers)


@pytest.mark.parametrize(
    ("arch", "head", "shape", "head_macs"),
    [
        ("lenet", "branch1", GREY, [15**2 * 9 * 5 * 10 + 640 * 10]),
        (
            "alexnet",
            ["branch2", "branch1"],
            COLOUR,
            [
                8**2 * 9 * (64 + 32) * 32 + 512 * 10,
                4**2 * 9 * 96 * 32 + 128 * 10,
            ],
        ),
    ],
)
def test_the_branches_of_branchynet_by_hand(arch, head, shape, head_macs):
    cost = network_cost(build_network(arch, None, head, shape=shape))
    assert cost.head_macs == (*head_macs, 0)


@pytest.mark.parametrize("arch", [arch for arch in BACKBONES if arch != "resnet1202"])
def test_default_places_are_there_and_save_something(arch):
    shape = GREY if arch in SMALL and arch != "alexnet" else COLOUR
    with torch.device("meta"):
        backbone = build_backbone(arch, 10, shape)
    shares = place_shares(backbone.units(), torch.empty(1, *shape))
    assert set(backbone.default_exits) <= set(shares)
    assert list(shares.values()) == sorted(shares.values())


def test_an_unknown_network_is_named_with_the_known_ones():
    message = refusal(build_backbone, "vgg")
    assert "'vgg'" in message and all(arch in message for arch in BACKBONES)


def test_a_branch_does_not_change_the_features_it_reads():
    """It begins with a ReLU, and the next block reads them too."""
    head = build_network("lenet", None, "branch1", shape=GREY).heads["conv1"]
    features = torch.randn(2, 5, 30, 30)
    before = features.clone()
    head(features)
    assert torch.equal(features, before)


@pytest.mark.parametrize(("arch", "shape"), [("resnet20", COLOUR), ("lenet", GREY)])
def test_every_block_that_saves_something_is_a_candidate(arch, shape):
    """LeNet's conv3 is at 95 % of the MACs, and at 98.3 with the heads up to it."""
    config = configs.build(
        Config,
        {
            "data": {"dataset": "mnist" if shape == GREY else "cifar10"},
            "model": {"arch": arch, "head": "linear"},
            "run": {"regime": "cdl"},
        },
    )
    network = trainer.build_network(config, 10)
    shares = network_cost(network).shares()
    assert max(shares[:-1]) < 0.98
    left_out = [name for name in places(arch, shape) if name not in network.exit_names]
    assert left_out == ([] if arch == "resnet20" else ["conv3", "pool3"])


def test_a_trial_does_not_change_the_weights():
    torch.manual_seed(0)
    tried = with_every_exit(lambda exits: build_network("resnet20", exits, "linear"), ["layer1"])
    torch.manual_seed(0)
    plain = build_network("resnet20", ["layer1"], "linear")
    assert torch.equal(tried.backbone.conv1.weight, plain.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("dataset", "arch", "names"),
    [
        ("cifar10", "resnet20", ["resnet20"]),
        ("cifar10", "resnet56", ["resnet20", "resnet32", "resnet44", "resnet56"]),
        ("cifar10", "alexnet", ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]),
        ("digits", "resnet20", []),
        ("digits", "alexnet", []),
        ("cifar100", "resnet20", []),
    ],
)
def test_the_public_networks_that_one_could_use_instead(dataset, arch, names):
    config = Config(data=DataConfig(dataset=dataset), model=ModelConfig(arch=arch))
    found = trainer.TASK.static_networks(config, 10)
    assert [static.name for static in found] == names
    if names:
        assert (found[0].accuracy, found[0].name) == (0.9173, "resnet20")
        assert count_macs(found[0].build(), torch.empty(1, 3, 32, 32)) == 40_551_040
