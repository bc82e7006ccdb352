"""The multi-exit network: a backbone, untouched, with heads between its blocks."""

import copy

import pytest
import torch
from helpers import assert_close, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cifar10.networks import build_backbone, build_network
from early_exit.model.heads import HEADS
from early_exit.model.network import (
    MultiExitNetwork,
    convert_sync_batchnorm,
    head_kinds,
    resolve_places,
)

BLOCKS = [f"layer{layer}.{block}" for layer in (1, 2, 3) for block in range(3)]  # of a ResNet-20
UNITS = ["stem", *BLOCKS, "classifier"]
# The terms that are added up along the longest path, for `assert_close`: at most so many layers of
# 64 channels, and what comes after each of them.
RESNET20, RESNET8 = (layers * (64 * 9 + 4) for layers in (20, 8))


def words(message):
    """The words and numbers of a message, without punctuation."""
    return [word.strip("',;:()?") for word in message.split()]


@pytest.fixture(scope="module")
def resnet20():
    """A plain ResNet-20 in eval mode, whose BatchNorms change the features."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet20")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return backbone.eval()


@pytest.fixture(scope="module")
def exact_resnet20(resnet20):
    """`resnet20` in float64."""
    return copy.deepcopy(resnet20).double()


@pytest.fixture(scope="module")
def pictures():
    """Four images, (4, 3, 32, 32), in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)


class TestKinds:
    def test_one_kind_for_all_or_one_each(self):
        assert head_kinds("conv", ["a", "b"]) == {"a": "conv", "b": "conv"}
        assert head_kinds(["conv"], ["a", "b"]) == {"a": "conv", "b": "conv"}
        assert head_kinds(["conv", "linear"], ["b", "a"]) == {"b": "conv", "a": "linear"}

    def test_the_plain_network_needs_none(self):
        assert head_kinds(["conv", "linear"], []) == {}

    def test_another_number_is_refused(self):
        message = refusal(head_kinds, ["conv", "linear"], ["a", "b", "c"])
        assert {"2", "3"} <= set(words(message))

    def test_each_place_gets_its_own_whatever_the_order(self):
        heads = build_network("resnet20", ["layer2", "layer1"], ["linear", "conv"]).heads
        assert type(heads["layer1"]) is HEADS["conv"]
        assert type(heads["layer2"]) is HEADS["linear"]


def with_exits(backbone, places, head="linear"):
    """A copy of `backbone` with exits at `places`, in float64."""
    backbone = copy.deepcopy(backbone)
    return (
        MultiExitNetwork(
            backbone,
            backbone.units(),
            places,
            num_classes=10,
            example=torch.zeros(1, 3, 32, 32),
            head=head,
        )
        .double()
        .eval()
    )


def test_every_exit_gives_logits_for_every_image(make_net):
    net = make_net(("stem", "layer1", "layer2"), num_classes=5)
    logits = net(torch.randn(6, 3, 16, 16))
    assert net.exit_names == ("stem", "layer1", "layer2", "final")
    assert net.num_exits == 4
    assert [tuple(part.shape) for part in logits] == [(6, 5)] * 4


@settings(max_examples=25)
@given(places=st.sets(st.sampled_from(["stem", *BLOCKS])))
def test_exits_may_follow_any_blocks_and_do_not_change_the_final_logits(
    resnet20, exact_resnet20, pictures, places
):
    network = with_exits(resnet20, sorted(places, reverse=True))
    with torch.no_grad():
        logits = network(pictures)
        assert network.exit_names == (*(name for name in UNITS if name in places), "final")
        assert len(logits) == len(network.stages) == len(places) + 1
        assert_close(logits[-1], exact_resnet20(pictures), RESNET20)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 4])
def test_final_logits_equal_the_plain_networks(tiny_net, images, memory_format, batch):
    net = tiny_net.double().to(memory_format=memory_format)
    some = images[:batch].double().to(memory_format=memory_format)
    with torch.no_grad():
        assert_close(net(some)[-1], net.backbone(some), RESNET8)


def test_final_logits_equal_the_plain_networks_in_training_mode(tiny_net, images):
    net, some = tiny_net.double().train(), images[:8].double()
    plain = copy.deepcopy(net.backbone)
    # BatchNorm's statistics add up the pixels of 8 images
    assert_close(net(some)[-1], plain(some), RESNET8 + 7 * 8 * 16 * 16)


def test_early_logits_are_the_head_on_the_features_of_its_block(resnet20, exact_resnet20, pictures):
    network, plain = with_exits(resnet20, ["layer2.0"], head="conv"), exact_resnet20
    with torch.no_grad():
        features = torch.relu(plain.bn1(plain.conv1(pictures)))
        features = plain.layer2[0](plain.layer1(features))
        assert_close(network(pictures)[0], network.heads["layer2_0"](features), RESNET20)


def test_a_disabled_exit_does_not_change_the_features(tiny_net, images):
    stage, some = tiny_net.double().stages[0], images[:2].double()
    with torch.no_grad():
        with_head, logits = stage(some)
        without_head, no_logits = stage(some, False)
    assert no_logits is None
    assert logits.shape == (2, 4)
    assert_close(with_head, without_head, terms=3 * 9)


def test_state_dict_holds_the_plain_names_and_the_heads_alone(resnet20):
    network = with_exits(resnet20, ["layer1", "layer2.1"])
    names = list(network.state_dict())
    plain = [name.removeprefix("backbone.") for name in names if name.startswith("backbone.")]
    assert plain == list(resnet20.state_dict())
    assert {name.split(".")[1] for name in names if not name.startswith("backbone.")} == {
        "layer1",
        "layer2_1",
    }
    assert all(name.startswith(("backbone.", "heads.")) for name in names)


def test_plain_weights_load_strictly_into_the_backbone(resnet20):
    network = build_network("resnet20", ("layer1", "layer2"))
    network.backbone.load_state_dict(resnet20.state_dict(), strict=True)
    assert torch.equal(network.backbone.layer3[2].conv2.weight, resnet20.layer3[2].conv2.weight)


def test_every_parameter_is_counted_once(resnet20):
    network = with_exits(resnet20, ["layer1"])
    # a linear head on 64 + 16 + 4 cells of 16 channels has 2 * 1344 + 1344 * 10 + 10 parameters
    assert sum(p.numel() for p in network.parameters()) == 16_138 + sum(
        p.numel() for p in resnet20.parameters()
    )


def test_no_exits_make_the_plain_network(resnet20, exact_resnet20, pictures):
    network = with_exits(resnet20, [])
    assert network.exit_names == ("final",)
    with torch.no_grad():
        (logits,) = network(pictures)
        assert_close(logits, exact_resnet20(pictures), RESNET20)


def test_a_stage_name_stands_for_its_last_block():
    # units are the stem, nine blocks and the classifier; layer1.2 is number 3, layer3.2 number 9
    assert resolve_places(["layer1", "layer3"], UNITS) == {"layer1": 3, "layer3": 9}


def test_places_are_sorted_into_network_order():
    places = resolve_places(["layer3.0", "stem", "layer2", "layer1.1"], UNITS)
    assert list(places.items()) == [("stem", 0), ("layer1.1", 2), ("layer2", 6), ("layer3.0", 7)]


def test_a_blocks_name_does_not_stand_for_longer_ones():
    assert resolve_places(["layer1.1"], ["stem", "layer1.1", "layer1.10", "end"]) == {"layer1.1": 1}


@pytest.mark.parametrize("order", [("layer1", "layer1.2"), ("layer1.2", "layer1")])
def test_one_place_under_two_names_is_refused_in_one_line(order):
    found = words(refusal(resolve_places, order, UNITS))
    assert {"--exits", "layer1", "layer1.2"} <= set(found)


def test_a_place_named_twice_is_refused():
    found = words(refusal(resolve_places, ["layer2", "layer2"], UNITS))
    assert {"--exits", "layer2", "layer2.2"} <= set(found)


@pytest.mark.parametrize(
    "place, nearest", [("layr1", "layer1"), ("layer2.1.0", "layer2.1"), ("Stem", "stem")]
)
def test_an_unknown_place_names_the_nearest_in_one_line(place, nearest):
    found = words(refusal(resolve_places, [place], UNITS))
    assert place in found
    # named on its own, before the list of all
    assert found.count(nearest) == 2


def test_a_place_unlike_any_other_lists_them_all():
    found = words(refusal(resolve_places, ["xyz"], UNITS))
    assert "xyz" in found
    listed = ["stem", "layer1", "layer2", "layer3", *BLOCKS]
    assert [word for word in found if word in listed] == listed  # each once: none is nearer


@pytest.mark.parametrize("place", ["classifier", "", "layer1."])
def test_a_unit_that_no_exit_can_follow_is_refused(place):
    assert repr(place) in refusal(resolve_places, [place], UNITS)


def test_the_dry_run_changes_no_buffer_and_restores_modes(resnet20):
    backbone = copy.deepcopy(resnet20).train()
    backbone.layer2.eval()  # a mixture, as of a partly frozen network
    modes = [module.training for module in backbone.modules()]
    before = copy.deepcopy(backbone.state_dict())
    MultiExitNetwork(
        backbone, backbone.units(), ["layer3.1"], num_classes=10, example=torch.ones(1, 3, 32, 32)
    )
    assert [module.training for module in backbone.modules()] == modes
    assert True in modes and False in modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_heads_get_the_width_of_their_block(make_net):
    net = make_net(("stem", "layer2", "layer3"), head="conv")
    widths = [head[-1].in_features for head in net.heads.values()]
    assert widths == [16, 32, 64]


def test_a_copys_stages_consist_of_the_copys_modules(tiny_net, images):
    twin = copy.deepcopy(tiny_net)
    assert twin.stages[0].body[0][0] is twin.backbone.conv1
    assert twin.stages[1].head is twin.heads["layer1"]
    with torch.no_grad():
        before = [parameter.clone() for parameter in tiny_net.parameters()]
        for parameter in twin.parameters():
            parameter.zero_()
        assert all(not logits.any() for logits in twin(images[:2]))
        assert all(map(torch.equal, tiny_net.parameters(), before))


def test_a_change_of_dtype_reaches_the_stages(tiny_net, images):
    net = tiny_net.to(torch.float64)
    with torch.no_grad():
        logits = net(images[:2].double())
    assert {part.dtype for part in logits} == {torch.float64}


def test_loaded_weights_reach_the_stages(tiny_net, make_net, images):
    net, some = make_net(seed=5).double().eval(), images[:2].double()
    net.load_state_dict(tiny_net.double().state_dict())
    with torch.no_grad():
        for found, expected in zip(net(some), tiny_net(some), strict=True):
            assert_close(found, expected, RESNET8)


def test_synchronised_norms_share_every_tensor_with_the_backbone(make_net):
    net = make_net().double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = [logits.detach() for logits in copy.deepcopy(net)(images)]
    convert_sync_batchnorm(net)
    modules = [module for part in (net, *net.stages) for module in part.modules()]
    kinds = {type(m) for m in modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm}
    assert list(net.state_dict()) == list(before)
    for found, wanted in zip(net(images), expected, strict=True):
        # one process: its own images are all
        assert_close(found, wanted, RESNET8 + 7 * 4 * 16 * 16)
    updated = net.backbone.bn1.running_mean
    assert not torch.equal(updated, before["backbone.bn1.running_mean"])
    net.eval()
    assert_close(net(images)[-1], net.backbone(images), RESNET8)
