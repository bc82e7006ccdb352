"""A user's own network and heads: what construction refuses, what `check_network` refuses, and that
neither changes anything."""

import dataclasses
import math

import pytest
import torch
from helpers import TASK, assert_close, few_digits, refusal, tiny_network, tiny_run
from torch import Tensor, nn

from early_exit.config import Config, ModelConfig, RunConfig
from early_exit.model import heads
from early_exit.model.checks import check_network
from early_exit.model.network import MultiExitNetwork
from early_exit.task import Task
from early_exit.training.train import adopt


class Cut(nn.Module):
    """A network whose forward adds features between its modules."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        return self.end(features + self.scale * self.body(features))


class Sum(nn.Module):
    """The block of `Cut` that is not a module there."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class Untrained(nn.Module):
    """A network some of whose parts change nothing before they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.zero = Sum(nn.Conv2d(4, 4, 3, padding=1))
        nn.init.zeros_(self.zero.body.weight)
        nn.init.zeros_(self.zero.body.bias)
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.scale = Sum(nn.Linear(5, 5, bias=False))
        nn.init.constant_(self.scale.body.weight, 1e-6)

    def forward(self, images: Tensor) -> Tensor:
        return self.scale(self.end(self.zero(self.norm(self.stem(images)))))


def with_units(backbone: nn.Module, head="linear", places=("stem",), **units) -> MultiExitNetwork:
    """`backbone` as a multi-exit network of `units`, for five classes."""
    return MultiExitNetwork(
        backbone, units, places, head=head, num_classes=5, example=torch.zeros(1, 3, 8, 8)
    )


class TestConstruction:
    """What cannot be a network is refused when it is built."""

    def test_a_unit_may_do_what_the_forward_does(self):
        net = Cut()
        made = with_units(net, stem=net.stem, body=Sum(net.body), end=net.end).double().eval()
        images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        assert_close(made(images)[-1], net(images), terms=3 * 9 + 4 * 9 + 8 * 8 + 4 + 4)

    def test_a_unit_that_does_not_accept_its_input_is_refused(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        message = refusal(with_units, net, stem=net[0], end=net[2])
        assert "unit end " in message and "(1, 4, 6, 6)" in message

    @pytest.mark.parametrize("tuples", [True, False])
    def test_units_that_give_other_than_a_tensor_are_refused(self, tuples):
        class Odd(nn.Module):
            def forward(self, features):
                return (features,) if tuples else None

        net = nn.Sequential(Odd(), nn.Flatten(), nn.Linear(192, 5))
        units = {"stem": net[0], "flat": net[1], "end": net[2]}
        message = refusal(with_units, net, places=(), **units)
        kind = "tuple" if tuples else "NoneType"
        assert "unit flat " in message and kind in message

    def test_features_at_an_exit_are_a_tensor_or_a_tuple(self):
        class Listed(nn.Module):
            def forward(self, features):
                return [features, features]

        class First(nn.Module):
            def forward(self, features):
                return features[0]

        net = nn.Sequential(Listed(), First(), nn.Flatten(), nn.Linear(192, 5))
        units = {"stem": net[0], "first": net[1], "flat": net[2], "end": net[3]}
        message = refusal(with_units, net, **units)
        assert "unit stem" in message and "list" in message and "tuple of tensors" in message
        assert with_units(net, places=("first",), **units)

    def test_another_number_of_classes_is_refused(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 7))
        message = refusal(with_units, net, stem=net[0], flat=net[1], end=net[2])
        assert "backbone" in message and "(1, 7)" in message and "(1, 5)" in message

    def test_units_that_do_not_end_in_logits_are_refused(self):
        net = Cut()
        message = refusal(with_units, net, stem=net.stem, body=Sum(net.body))
        assert "(1, 4, 8, 8)" in message and "(1, 5)" in message

    @pytest.mark.parametrize("name", ["final", "keys"])
    def test_a_name_that_cannot_be_a_key_is_refused(self, name):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        units = {name: net[0], "flat": net[1], "end": net[2]}
        assert name in refusal(with_units, net, places=(name,), **units)

    def test_two_exits_with_one_key_are_refused(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        units = {"a.b": net[0], "a_b": net[1], "flat": net[2], "end": net[3]}
        message = refusal(with_units, net, places=("a.b", "a_b"), **units)
        assert "'a_b'" in message


class TestUnits:
    """What `check_network` asks of the units."""

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_what_an_exit_reads_must_not_be_changed_in_place(self, device):
        """The backward pass of a head that keeps its input would fail in the first step."""
        with torch.device(device):
            layers = (nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))
            net, example = nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)
            units = {"stem": net[0], "relu": net[1], "flat": net[2], "end": net[3]}
            shape = {"head": "linear", "num_classes": 5, "example": example}
            refused, accepted = (
                MultiExitNetwork(net, units, (place,), **shape) for place in ("stem", "relu")
            )
        message = refusal(check_network, refused)
        assert "unit relu" in message and "in place" in message
        check_network(accepted)

    def test_a_step_that_is_in_no_unit_is_refused(self):
        net = Cut()
        message = refusal(check_network, with_units(net, stem=net.stem, body=net.body, end=net.end))
        assert "backbone" in message and "forward" in message

    def test_a_step_that_differs_slightly_is_refused(self):
        net = Cut(scale=1.1)
        message = refusal(
            check_network, with_units(net, stem=net.stem, body=Sum(net.body), end=net.end)
        )
        assert "backbone" in message and "forward" in message

    @pytest.mark.parametrize("omitted", ["norm", "zero", "scale"])
    def test_a_missing_part_that_changes_nothing_yet_is_refused(self, omitted):
        """A fresh BatchNorm in eval mode, a last layer that starts at zero, a tiny layer scale."""
        net = Untrained()
        parts = {"stem": net.stem, "norm": net.norm, "zero": net.zero, "end": net.end}
        check_network(with_units(net, **parts, scale=net.scale))
        units = {**parts, "scale": net.scale}
        del units[omitted]
        message = refusal(check_network, with_units(net, **units))
        assert "backbone" in message and "forward" in message

    def test_units_that_give_nan_are_refused(self):
        net = Cut()

        class Broken(Sum):
            def forward(self, features):
                return super().forward(features) * math.nan

        message = refusal(
            check_network, with_units(net, stem=net.stem, body=Broken(net.body), end=net.end)
        )
        assert "backbone" in message and "forward" in message

    def test_a_unit_may_use_a_parameter_of_the_backbone(self):
        class Shift(nn.Module):
            def __init__(self, shift: nn.Parameter) -> None:
                super().__init__()
                self.shift = shift

            def forward(self, features: Tensor) -> Tensor:
                return features + self.shift

        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shift = nn.Parameter(torch.rand(3, 8, 8))
                self.end = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))

            def forward(self, images: Tensor) -> Tensor:
                return self.end(images + self.shift)

        net = Shifted()
        check_network(with_units(net, stem=Shift(net.shift), end=net.end))

    @pytest.mark.parametrize("where", ["backbone", "head"])
    def test_answers_that_depend_on_the_batch_are_refused(self, where):
        def norm() -> nn.Module:
            return nn.BatchNorm2d(4, track_running_stats=False)

        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        if where == "backbone":
            net[0] = nn.Sequential(net[0], norm())

        def head(shape: torch.Size, num_classes: int) -> nn.Module:
            conv = heads.ConvHead(shape[1], num_classes)
            return nn.Sequential(norm(), conv) if where == "head" else conv

        network = with_units(net, head, stem=net[0], flat=net[1], end=net[2])
        message = refusal(check_network, network)
        assert "track_running_stats=False" in message
        assert ("backbone.0" if where == "backbone" else "heads.stem") in message

    @pytest.mark.parametrize(
        "foreign", [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Dropout2d(0.5)]
    )
    def test_a_module_outside_the_backbone_is_refused(self, foreign):
        net = Cut()
        stem = nn.Sequential(net.stem, foreign)
        network = with_units(net, stem=stem, body=Sum(net.body), end=net.end)
        message = refusal(check_network, network)
        name = type(foreign).__name__
        assert "unit stem " in message and f" {name} " in message

    def test_a_module_without_values_may_be_outside(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
        end = nn.Sequential(nn.Flatten(), net[2])
        check_network(with_units(net, stem=net[0], end=end))


class TestHeads:
    def test_a_function_of_the_features_shape(self):
        net, shapes = Cut(), []

        def head(features: torch.Size, num_classes: int) -> nn.Module:
            shapes.append(features)
            size = features[1:].numel()
            return nn.Sequential(nn.Flatten(), nn.Linear(size, num_classes))

        made = with_units(net, head, stem=net.stem, body=Sum(net.body), end=net.end).eval()
        assert shapes == [torch.Size((1, 4, 8, 8))]
        assert [logits.shape for logits in made(torch.rand(2, 3, 8, 8))] == [(2, 5), (2, 5)]

    def test_one_for_each_place_some_by_name(self):
        net = Cut()
        kinds = ["conv", lambda features, classes: heads.LinearHead(features[1], classes)]
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        made = with_units(net, kinds, ("stem", "body"), **units)
        assert [type(head) for head in made.heads.values()] == [heads.ConvHead, heads.LinearHead]

    @pytest.mark.parametrize(
        ("head", "made"),
        [
            (lambda shape, classes: nn.Flatten(), "(1, 256)"),
            (lambda shape, classes: nn.Conv2d(4, classes, 1), "(1, 5, 8, 8)"),
            (lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(256, 7)), "(1, 7)"),
        ],
    )
    def test_one_that_gives_no_logits_is_refused(self, head, made):
        net = Cut()
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        message = refusal(check_network, with_units(net, head, **units))
        assert "stem" in message and all(
            shape in message for shape in (made, "(1, 4, 8, 8)", "(1, 5)")
        )

    def test_one_that_changes_the_features_in_place_is_refused(self):
        net = Cut()
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}

        def head(shape: torch.Size, classes: int) -> nn.Module:
            return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, classes))

        message = refusal(check_network, with_units(net, head, **units))
        assert "head of stem" in message and "in place" in message

    def test_one_that_does_not_accept_the_features_is_refused(self):
        net = Cut()
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        network = with_units(net, lambda shape, classes: nn.Linear(9, classes), **units)
        message = refusal(check_network, network)
        assert "head" in message and "stem" in message and "(1, 4, 8, 8)" in message


def values_of(module: nn.Module) -> list[tuple[Tensor, int, Tensor]]:
    """Every parameter and buffer, where its values lie, and a copy of them."""
    tensors = (*module.parameters(), *module.buffers())
    return [(tensor, tensor.data_ptr(), tensor.detach().clone()) for tensor in tensors]


def assert_unchanged(values: list[tuple[Tensor, int, Tensor]], module: nn.Module) -> None:
    """The module has the same tensors, at the same place, with the same values."""
    tensors = (*module.parameters(), *module.buffers())
    assert len(tensors) == len(values)
    for now, (tensor, place, value) in zip(tensors, values, strict=True):
        assert now is tensor and now.data_ptr() == place and torch.equal(now, value)


class Mixed(Cut):
    """With BatchNorm, and a part in eval mode, as of a partly frozen network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.train()
        self.body.eval()


class TestNothingChanges:
    def test_construction_changes_no_value_and_no_mode(self):
        net = Mixed()
        values, modes = values_of(net), [module.training for module in net.modules()]
        with_units(net, stem=net.stem, body=Sum(net.body), end=net.end)
        assert_unchanged(values, net)
        assert [module.training for module in net.modules()] == modes
        assert True in modes and False in modes

    def test_construction_copies_no_weight(self, monkeypatch):
        net = Mixed()
        units = {"stem": net.stem, "body": Sum(net.body), "end": net.end}
        head = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))

        def copied(*_, **__):
            pytest.fail("a tensor was copied")

        for name in ("clone", "copy_", "__deepcopy__"):
            monkeypatch.setattr(Tensor, name, copied)
        network = with_units(net, lambda shape, num_classes: head, **units)
        assert network.backbone is net and network.heads["stem"] is head

    def test_only_the_heads_draw_random_numbers(self):
        net = Cut()
        torch.manual_seed(0)
        with_units(net, stem=net.stem, body=Sum(net.body), end=net.end)
        drawn = torch.rand(1)
        torch.manual_seed(0)
        heads.LinearHead(4, 5)
        assert torch.equal(drawn, torch.rand(1))

    @pytest.mark.parametrize("train", [True, False])
    def test_a_check_changes_no_value_no_mode_and_no_random_state(self, train):
        net = Mixed()
        network = with_units(net, stem=net.stem, body=Sum(net.body), end=net.end).train(train)
        net.body.train(not train)
        values, modes = values_of(network), [module.training for module in network.modules()]
        state = torch.get_rng_state()
        check_network(network)
        assert_unchanged(values, network)
        assert [module.training for module in network.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_check_that_fails_changes_nothing(self):
        net = Mixed()
        network = with_units(net, stem=net.stem, body=net.body, end=net.end)
        values, modes = values_of(network), [module.training for module in network.modules()]
        refusal(check_network, network)
        assert_unchanged(values, network)
        assert [module.training for module in network.modules()] == modes


class TestMeta:
    def test_shapes_alone_are_compared_on_the_meta_device(self):
        with torch.device("meta"):
            net = Cut()
            network = MultiExitNetwork(
                net,
                {"stem": net.stem, "body": net.body, "end": net.end},
                ["stem"],
                num_classes=5,
                example=torch.zeros(1, 3, 8, 8),
            )
        check_network(network)  # the units differ from the backbone, but not in shape
        assert {value.device.type for value in network.state_dict().values()} == {"meta"}


class TestCallers:
    """Who trains or keeps a network checks it first."""

    @pytest.fixture
    def task(self) -> Task:
        """A task whose units are not its backbone."""

        def build(config: Config, num_classes: int) -> MultiExitNetwork:
            network = tiny_network(config, num_classes)
            network.units["layer1.0"] = nn.Sequential(network.units["layer1.0"], nn.Softplus())
            return network

        return dataclasses.replace(TASK, build_network=build)

    def test_training_does(self, task, tmp_path):
        message = refusal(tiny_run, tmp_path / "run", task)
        assert "backbone" in message and "forward" in message

    def test_adopting_does(self, task, tmp_path):
        config = Config(
            model=ModelConfig(exits=("layer1", "layer2")), run=RunConfig(device="cpu", threads=1)
        )
        network = task.build_network(config, 10)
        message = refusal(adopt, network, TASK, config, few_digits(0), tmp_path / "run")
        assert "backbone" in message and "forward" in message
        assert not (tmp_path / "run").exists()
