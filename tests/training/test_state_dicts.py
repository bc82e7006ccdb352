"""Weights from elsewhere: found in what people have, brought to our names, and loaded strictly."""

import argparse
import copy
import datetime
import logging
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_names, refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from early_exit.training import checkpoint
from early_exit.training.state_dicts import check_finite, find_weights, load_into


def small_net(width: int = 4, classes: int = 2) -> nn.Module:
    """A convolution, BatchNorm and a classifier in two parts, with names of two levels."""
    layers = [("conv", nn.Conv2d(3, width, 3)), ("norm", nn.BatchNorm2d(width))]
    parts = [("features", nn.Sequential(OrderedDict(layers))), ("fc", nn.Linear(width, classes))]
    return nn.Sequential(OrderedDict(parts))


@pytest.fixture
def net():
    """The network that the files were made of."""
    torch.manual_seed(1)
    net = small_net()
    net.features.norm.running_mean.fill_(3.0)
    return net


@pytest.fixture
def weights(net):
    """Its state dict."""
    return dict(net.state_dict())


def zeros(weights: dict) -> dict:
    """Other weights of the same names and shapes."""
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def prefixed(prefix: str, weights: dict) -> dict:
    """The weights with a prefix before each name."""
    return {f"{prefix}{name}": value for name, value in weights.items()}


def same(found: dict, expected: dict) -> bool:
    """Whether two state dicts are equal."""
    return set(found) == set(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def arrives(tmp_path, weights):
    """Saves an object and loads it as a backbone; whether it has the network's weights then."""

    def arrives(content, **options) -> bool:
        torch.save(content, tmp_path / "file.pt", **options)
        target = small_net()
        found, meta = checkpoint.load_backbone(tmp_path / "file.pt", target.state_dict())
        load_into(target, found, tmp_path / "file.pt")
        return same(target.state_dict(), weights) and meta == {}

    return arrives


class Attributes(dict):
    """Stands for the dictionary classes of training libraries."""


class TestWhatPeopleHave:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda net: net,
            nn.DataParallel,
            pytest.param(torch.compile, marks=pytest.mark.slow),
            pytest.param(lambda net: torch.compile(nn.DataParallel(net)), marks=pytest.mark.slow),
            AveragedModel,
            lambda net: AveragedModel(nn.DataParallel(net)),
            lambda net: nn.ModuleDict({"encoder_q": net}),
        ],
    )
    def test_a_wrapped_network(self, arrives, net, wrap):
        assert arrives(wrap(net).state_dict())

    def test_a_part_that_is_wrapped(self, arrives, net):
        net.features = nn.DataParallel(net.features)  # as in torch's ImageNet example
        assert any(".module." in name for name in net.state_dict())
        assert arrives(net.state_dict())

    @given(
        parts=st.lists(st.sampled_from(["module", "_orig_mod", "model", "backbone", "net", "x"])),
        keys=st.lists(st.sampled_from(["net", "model", "state_dict", "weights"]), max_size=3),
    )
    def test_any_prefix_in_any_dictionary(self, parts, keys):
        weights = dict(small_net().state_dict())
        content = prefixed("".join(f"{part}." for part in parts), weights)
        for key in keys:
            content = {"epoch": 3, key: content, "best": torch.tensor(0.5)}
        assert same(find_weights(content, weights, Path("file.pt")), weights)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_whole_training_state(self, arrives, net, legacy):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        content = {
            "epoch": 3,
            "model": nn.DataParallel(net).state_dict(),
            "optimizer": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1, output=Path("out"), at=datetime.date(2020, 1, 1)),
            "best_acc": np.float64(91.7),
            "history": defaultdict(list, loss=[np.ones(2)]),
            "hyper_parameters": Attributes(lr=0.1),
        }
        assert arrives(content, _use_new_zipfile_serialization=not legacy)

    def test_another_pickle_protocol(self, arrives, weights):
        assert arrives({"net": weights, "acc": np.float32(91)}, pickle_protocol=4)

    def test_a_list(self, arrives, net, weights):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        assert arrives([3, weights, optimizer.state_dict()])
        assert arrives({"models": [weights], "epoch": 3})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_another_precision(self, tmp_path, weights, dtype):
        stored = {n: v.to(dtype) if v.is_floating_point() else v for n, v in weights.items()}
        target = small_net()
        load_into(target, stored, tmp_path)
        for name, value in target.state_dict().items():
            assert value.dtype == weights[name].dtype
            assert torch.equal(value, stored[name].to(value.dtype))

    def test_what_a_training_library_adds_is_left_out_and_said(self, arrives, weights, caplog):
        content = {"state_dict": {**prefixed("model.", weights), "loss.weight": torch.ones(2)}}
        with caplog.at_level(logging.INFO):
            assert arrives(content)
        (line,) = caplog.messages
        assert_names(line, "loss.weight")

    @pytest.mark.parametrize("counter", ["total_ops", "features.total_params", "n_averaged"])
    def test_counters_of_others(self, arrives, weights, counter, caplog):
        with caplog.at_level(logging.INFO):
            assert arrives({**weights, counter: torch.zeros(1)})
        assert not caplog.messages

    def test_no_counters_of_batch_norm(self, arrives, weights):
        del weights["features.norm.num_batches_tracked"]
        target = small_net()
        load_into(target, weights, Path("file.pt"))
        assert torch.equal(target.fc.weight, weights["fc.weight"])

    @pytest.mark.parametrize(
        ("one", "other"),
        [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema"), ("a", "swa_b")],
    )
    def test_of_several_the_average_is_taken_and_said(self, arrives, weights, caplog, one, other):
        for content in (
            {one: zeros(weights), other: weights},
            {other: weights, one: zeros(weights)},
            {
                "state_dict": {
                    **prefixed(f"{one}.", zeros(weights)),
                    **prefixed(f"{other}.", weights),
                }
            },
        ):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                assert arrives(content)
            (line,) = caplog.messages
            assert_names(line, one, other)

    def test_of_several_without_an_average_the_first_is_taken_and_said(
        self, arrives, weights, caplog
    ):
        schema = zeros(weights)  # not an average, though "ema" is in the word
        with caplog.at_level(logging.INFO):
            assert arrives({"student": weights, "schema": schema})
        (line,) = caplog.messages
        assert_names(line, "student", "schema")

    def test_another_network_beside_it_is_not_taken(self, arrives, weights):
        assert arrives({"teacher_ema": dict(small_net(8).state_dict()), "student": weights})

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("block1.denselayer2.norm.1.weight", "block1.denselayer2.norm1.weight"),
            ("encoder.layers.layer_0.mlp.linear_2.bias", "encoder.layers.layer_0.mlp.3.bias"),
        ],
    )
    def test_older_names_of_torchvision(self, old, new):
        own = {new: torch.ones(1), "fc.weight": torch.zeros(1)}
        content = {f"module.{old}": own[new], "module.fc.weight": own["fc.weight"]}
        assert same(find_weights(content, own, Path("file.pt")), own)


class TestOurs:
    def test_of_a_checkpoint_of_ours_the_backbone_is_taken(self, tmp_path, weights):
        network = prefixed("backbone.", weights)
        network["heads.layer1.0.weight"] = torch.zeros(1)
        meta = {"format": checkpoint.FORMAT, "val_hash": "abc", "unseen_val": None}
        torch.save({**meta, "network": network}, tmp_path / "file.pt")
        found, rest = checkpoint.load_backbone(tmp_path / "file.pt", weights)
        assert same(found, weights) and rest == meta


class TestWhatDoesNotFit:
    def refused(self, weights: dict, target: nn.Module | None = None) -> str:
        return refusal(load_into, target or small_net(), weights, Path("file.pt"))

    def test_a_missing_name(self, weights):
        del weights["fc.bias"]
        assert_names(self.refused(weights), "file.pt", "only here", "fc.bias")

    def test_an_extra_name(self, weights):
        message = self.refused({**weights, "fc2.weight": torch.zeros(1)})
        assert_names(message, "file.pt", "only there", "fc2.weight")

    def test_another_shape(self, weights):
        message = self.refused(weights, small_net(classes=5))
        assert_names(message, "file.pt", f"fc.weight is {(2, 4)} there and {(5, 4)} here")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
    def test_another_kind_of_number(self, weights, dtype):
        message = self.refused({**weights, "fc.bias": weights["fc.bias"].to(dtype)})
        assert_names(message, "file.pt", "fc.bias", str(dtype).removeprefix("torch."))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
    def test_a_weight_that_is_not_finite(self, weights, value):
        target = small_net()
        bias = torch.full((2,), value, dtype=torch.float64)
        load_into(target, {**weights, "fc.bias": bias}, Path("file.pt"))
        assert_names(refusal(check_finite, target, Path("file.pt")), "file.pt", "fc.bias")

    def test_names_of_both_sides_and_how_many_more(self, weights):
        message = self.refused({f"unit{i}.w": torch.zeros(1) for i in range(9)})
        assert_names(message, "unit0.w", "unit1.w", 6, "features.conv.weight", "features.conv.bias")

    def test_the_owner_is_named(self, weights):
        message = refusal(load_into, small_net(classes=3), weights, Path("f"), "one of 3 classes")
        assert_names(message, "one of 3 classes")

    def test_no_message_guesses_flags(self, weights):
        del weights["fc.bias"]
        assert "--" not in self.refused(weights)

    def test_another_network_in_a_file(self, tmp_path, weights):
        torch.save({"net": prefixed("module.", dict(small_net(8).state_dict()))}, tmp_path / "f.pt")
        found, _ = checkpoint.load_backbone(tmp_path / "f.pt", weights)
        assert_names(self.refused(found), f"features.conv.bias is {(8,)} there and {(4,)} here")

    def test_a_larger_network_under_a_prefix(self, weights):
        content = prefixed("model.", {**weights, "fc2.weight": torch.zeros(1)})
        assert_names(self.refused(find_weights(content, weights, Path("f"))), "fc2.weight")

    def test_a_misfit_changes_nothing(self, weights):
        target = small_net()
        before = copy.deepcopy(target.state_dict())
        self.refused({**weights, "fc2.weight": torch.zeros(1)}, target)
        assert same(target.state_dict(), before)

    def test_a_network_with_a_part_called_module_keeps_it(self):
        own = nn.ModuleDict({"module": small_net()}).state_dict()
        assert same(find_weights(prefixed("model.", dict(own)), own, Path("file.pt")), dict(own))

    @pytest.mark.parametrize(
        "content",
        [3, [torch.zeros(1)], {"epoch": 3}, {"state_dict": {"weight": 3}}, {7: torch.ones(1)}],
    )
    def test_what_holds_no_state_dict(self, tmp_path, weights, content):
        path = tmp_path / "file.pt"
        torch.save(content, path)
        message = refusal(checkpoint.load_backbone, path, weights)
        assert_names(message, path, "--backbone")

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net, "epoch": 3}])
    @pytest.mark.filterwarnings("error")
    def test_a_pickled_network_is_named(self, tmp_path, net, weights, wrap, legacy):
        path = tmp_path / "file.pt"
        torch.save(wrap(net), path, _use_new_zipfile_serialization=not legacy)
        message = refusal(checkpoint.load_backbone, path, weights)
        assert_names(message, path, "torch.nn.modules.container.Sequential")
