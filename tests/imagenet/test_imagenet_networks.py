"""torchvision's networks: the same numbers, with exits."""

import functools

import pytest
import torch
from helpers import assert_close, refusal
from torchvision import models

from early_exit.config import ModelConfig
from early_exit.data.folders import FolderConfig, FolderRun
from early_exit.model.cost import network_cost
from early_exit.training.steps import set_training_mode
from imagenet import main, networks

SMALL = (
    "resnet18",
    "vgg11_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
    "vit_b_32",
)
# Added up along the longest path: 200 layers of at most 4,096 channels, or of 512 with 3x3 kernels.
TERMS = 200 * 512 * 9


def torchvisions(arch, num_classes=7, side=64):
    """torchvision's own network in eval mode and float64, its BatchNorm statistics no longer those
    of a fresh one, and two images."""
    torch.manual_seed(0)
    side = 56 if arch == "vit_h_14" else side  # whole patches
    own = {"image_size": side} if arch.startswith("vit") else {}
    net = models.get_model(arch, weights=None, num_classes=num_classes, **own)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        net.train()(images)
    return net.double().eval(), images.double()


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.slow) if arch in ("vgg11_bn", "vit_b_32") else arch
        for arch in SMALL
    ],
)
def test_final_exit_equals_torchvision(arch):
    net, images = torchvisions(arch)
    ours = networks.build_network(arch, num_classes=7, image_size=64).double().eval()
    ours.backbone.load_state_dict(net.state_dict(), strict=True)
    assert ours.num_exits == 3
    with torch.no_grad():
        found = ours(images)
        assert_close(found[-1], net(images), TERMS)
    assert [tuple(logits.shape) for logits in found] == [(2, 7)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("arch", networks.list_archs())
def test_units_one_after_the_other_are_the_network(arch):
    net, images = torchvisions(arch)
    units = networks.units_of(arch, net)
    with torch.no_grad():
        chained = functools.reduce(lambda features, unit: unit(features), units.values(), images)
        assert_close(chained, net(images), TERMS)


def default_cost(arch):
    """What `arch` with its default exits costs at 224 pixels and 1000 classes."""
    try:
        with torch.device("meta"):
            return network_cost(networks.build_network(arch))
    except NotImplementedError:
        return network_cost(networks.build_network(arch))


@pytest.mark.parametrize(
    "arch",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v3_small",
        "vit_b_16",
        "densenet121",
        *(
            pytest.param(arch, marks=pytest.mark.slow)
            for arch in networks.list_archs()
            if arch not in ("resnet18", "resnet50", "mobilenet_v3_small", "vit_b_16", "densenet121")
        ),
    ],
)
def test_default_exits_are_cheap_and_counted_as_torchvision_counts(arch):
    cost = default_cost(arch)
    assert len(cost.exit_names) == 3
    assert max(cost.head_macs) <= 0.02 * cost.plain_macs
    # a million is 512 channels into 1000 classes and 1024 mixed into them; the giants have wider
    assert max(cost.head_params) < max(1_000_000, 0.03 * cost.backbone_params)
    weights = list(models.get_model_weights(arch))
    assert cost.backbone_params in [each.meta["num_params"] for each in weights]
    at_224 = [each.meta["_ops"] for each in weights if each.transforms().crop_size == [224]]
    if at_224:
        assert cost.plain_macs / 1e9 == pytest.approx(at_224[0], rel=0.01)


def test_resnet50_exits_after_layer1_and_layer2():
    assert networks.default_places("resnet50") == ("layer1", "layer2")
    shares = networks.place_shares("resnet50")
    # conv1: 3 * 64 * 49 * 112**2 multiply-adds; layer1: 64 * 64 + 64 * 64 * 9 + 64 * 256 in each
    # block on 56**2 pixels, 64 * 256 of its shortcut, and 192 * 64 more where 256 come in
    layer1 = 3 * (64 * 64 * 9 + 64 * 256) + 64 * 64 + 2 * 256 * 64 + 64 * 256
    assert shares["layer1"] * 4_089_184_256 == pytest.approx(3 * 64 * 49 * 112**2 + layer1 * 56**2)
    assert 0.43 < shares["layer2"] < 0.45
    assert "layer1.2" not in shares and "layer3.0" in shares


def test_heads_of_resnet50_by_hand():
    cost = default_cost("resnet50")
    # depthwise 9, pointwise 256 and 512 a channel; 28**2 and 14**2 pixels; a thousand classes
    first = 28**2 * (256 * 9 + 256 * 256) + 256 * 1000
    second = 14**2 * (512 * 9 + 512 * 512) + 512 * 1000
    assert cost.head_macs == (first, second, 0)
    assert cost.head_params[0] == 256 * 9 + 256 * 256 + 4 * 256 + 256 * 1000 + 1000


def test_unsupported_network_is_refused_with_the_nearest_named():
    message = refusal(networks.build_network, "resnet51")
    assert "'resnet51'" in message and "resnet50" in message
    message = refusal(networks.build_network, "alexnet")
    assert "'alexnet'" in message and "--list-archs" in message


def test_unknown_place_is_refused_with_the_nearest_named():
    message = refusal(networks.build_network, "resnet18", ("layer5",))
    assert "'layer5'" in message and "layer4" in message


def test_the_first_block_of_a_vit_has_all_that_it_computes_with():
    """So that `optim.stem_epochs` freezes it whole."""
    with torch.device("meta"):
        network = networks.build_network("vit_b_32", ("encoder.0",))
    set_training_mode(network, backbone_frozen=False, stem_frozen=True)
    fixed = {name for name, value in network.backbone.named_parameters() if not value.requires_grad}
    assert fixed == {
        *("class_token", "encoder.pos_embedding"),
        *("conv_proj.weight", "conv_proj.bias"),
    }


@pytest.mark.parametrize("arch", ["regnet_y_400mf", "resnet18"])
def test_the_weights_of_a_seed_do_not_depend_on_what_was_asked_before(arch):
    """RegNet is built for the shares of its places, too."""
    drawn = []
    networks.place_shares.cache_clear()
    for _ in range(2):
        torch.manual_seed(0)
        networks.place_shares(arch)
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1]


def test_vit_takes_images_of_another_size():
    network = networks.build_network("vit_b_32", ("encoder.0",), num_classes=3, image_size=96)
    assert network.image_shape == (3, 96, 96)
    assert [
        tuple(exit_logits.shape) for exit_logits in network.eval()(torch.zeros(2, 3, 96, 96))
    ] == [(2, 3)] * 2


@pytest.mark.parametrize(
    ("settings", "num_classes", "count"),
    [
        ({}, 1000, 4),
        ({}, 10, 0),
        ({"dataset": "flowers"}, 1000, 0),
        ({"val_crop": 112, "val_resize": 128}, 1000, 0),
        ({"val_resize": 232}, 1000, 0),
    ],
)
def test_the_public_networks_that_one_could_use_instead(settings, num_classes, count):
    """Of ImageNet as torchvision reads it, and of nothing else."""
    data = FolderConfig(**{"dataset": "imagenet", **settings})
    config = FolderRun(data=data, model=ModelConfig(arch="resnet50"))
    found = {static.name: static for static in main.TASK.static_networks(config, num_classes)}
    assert len(found) == count
    if count:
        assert set(found) == {"resnet18", "resnet34", "resnet50", "resnext50_32x4d"}
        assert found["resnet50"].accuracy == pytest.approx(0.7613)  # IMAGENET1K_V1
        assert isinstance(found["resnet18"].build(), models.ResNet)
