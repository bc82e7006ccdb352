"""The parts of a short recipe: a backbone that starts from train images, fixed and frozen weights;
and that a run with all of them resumes to the last bit."""

import dataclasses

import pytest
import torch
from helpers import (
    SIDE,
    TASK,
    ask_to_stop,
    assert_names,
    assert_same_run,
    at_batch,
    few_digits,
    mixed_config,
    refusal,
    resume_run,
    slowly,
    tensors,
)
from torch import nn

from cifar10.resnet import ResNet
from early_exit.config import DataConfig, OptimConfig
from early_exit.model.network import MultiExitNetwork
from early_exit.system import signals
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.phases import Phase
from early_exit.training.steps import set_training_mode


class Centred(ResNet):
    """A ResNet-8 whose stem has a bias that starts from the mean of the first train images, and a
    BatchNorm whose scale stays 1."""

    def __init__(self) -> None:
        super().__init__(1)
        self.conv1.bias = nn.Parameter(torch.zeros(16))
        self.bn1.weight.requires_grad_(False)

    def init_from_images(self, batches) -> None:
        with torch.no_grad():
            self.conv1.bias.fill_(next(iter(batches)).mean())


def build(config, num_classes) -> MultiExitNetwork:
    """`Centred` with the exits of the configuration."""
    backbone = Centred()
    example = torch.zeros(1, 3, SIDE, SIDE)
    return MultiExitNetwork(
        backbone,
        backbone.units(),
        config.model.exits,
        num_classes=num_classes,
        example=example,
        head=config.model.head,
    )


def load(settings: DataConfig):
    """A few digits, flipped, as if a flipped digit were one."""
    flipped = dataclasses.replace(few_digits(0), flip=True)
    return flipped.augmented(settings.flip, settings.pad, settings.pad_mode)


CENTRED = Task(build, load)


def recipe(**run):
    """`mixed_config` with every part of the recipe."""
    config = mixed_config(**run)
    optim = dataclasses.replace(
        config.optim,
        nesterov=True,
        schedule="triangular",
        bias_lr_scale=4.0,
        head_lr_scale=0.5,
        stem_epochs=1,
        label_smoothing=0.2,
        ema=0.9,
    )
    data = dataclasses.replace(config.data, flip="alternating", pad=2, pad_mode="reflect")
    return dataclasses.replace(config, optim=optim, data=data)


@pytest.fixture(scope="module")
def whole_recipe(tmp_path_factory):
    """A run of `recipe`, never stopped: one epoch of the backbone, two of everything, each of
    three steps."""
    return resume_run(tmp_path_factory.mktemp("recipe") / "run", recipe(), CENTRED)


# the first batch of all is the one the backbone starts from
@pytest.mark.parametrize("step", [1, 7, *slowly(2, 4, 5, 8)])
def test_it_resumes_to_the_last_bit(monkeypatch, whole_recipe, tmp_path, step):
    at_batch(monkeypatch, 1 + step, ask_to_stop)
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", recipe(), CENTRED)
    monkeypatch.setattr(Centred, "init_from_images", lambda *_: pytest.fail("called again"))
    resume_run(tmp_path / "run", recipe(), CENTRED)
    assert_same_run(tmp_path / "run", whole_recipe)
    ours, theirs = (
        tensors(checkpoint.load(run)["average"]) for run in (tmp_path / "run", whole_recipe)
    )
    assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_fixed_weight_stays_fixed_in_every_phase(whole_recipe):
    weights = checkpoint.load(whole_recipe)["network"]
    assert torch.equal(weights["backbone.bn1.weight"], torch.ones(16))
    assert not torch.equal(weights["backbone.layer1.0.bn1.weight"], torch.ones(16))


def starts(tmp_path, monkeypatch, config) -> list[float]:
    """The mean of the first images that a run passes to its backbone, for each call."""
    seen = []
    monkeypatch.setattr(
        Centred, "init_from_images", lambda self, batches: seen.append(float(next(batches).mean()))
    )
    resume_run(tmp_path / "run", config, CENTRED)
    return seen


def test_the_backbone_starts_from_the_first_epochs_images_once(tmp_path, monkeypatch):
    config = recipe()
    images, _ = next(load(config.data).train_batches(16, 0, 0))
    assert starts(tmp_path, monkeypatch, config) == [float(images.mean())]


def test_a_backbone_with_trained_weights_does_not_start_again(tmp_path, monkeypatch, whole_recipe):
    config = recipe(regime="frozen")
    model = dataclasses.replace(config.model, backbone=str(whole_recipe))
    assert starts(tmp_path, monkeypatch, dataclasses.replace(config, model=model)) == []
    weights = checkpoint.load(tmp_path / "run")["network"]
    reported = checkpoint.reported(checkpoint.load(whole_recipe))
    assert torch.equal(weights["backbone.conv1.bias"], reported["backbone.conv1.bias"])


def learning(network: MultiExitNetwork) -> set[str]:
    """The names of the parameters of the backbone that require a gradient."""
    return {name for name, p in network.backbone.named_parameters() if p.requires_grad}


def test_what_is_trained_in_which_mode():
    network = build(recipe(), 10)
    names = {name for name, _ in network.backbone.named_parameters()}
    stem = {"conv1.weight", "conv1.bias", "bn1.bias"}
    for frozen, stem_frozen, expected in (
        (True, False, set()),
        (False, False, names - {"bn1.weight"}),
        (False, True, names - {"bn1.weight"} - stem),
        (False, False, names - {"bn1.weight"}),
    ):
        set_training_mode(network, frozen, stem_frozen)
        assert learning(network) == expected


def test_a_stem_that_is_no_longer_trained_does_not_move(tmp_path, monkeypatch):
    """It stops after the first of two joint epochs; the layer behind it does not."""
    config = recipe(regime="joint")
    at_batch(monkeypatch, 1 + 3, ask_to_stop)  # within the second epoch
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", config, CENTRED)
    first = checkpoint.load(tmp_path / "run")["network"]
    resume_run(tmp_path / "run", config, CENTRED)
    last = checkpoint.load(tmp_path / "run")["network"]
    for name in ("conv1.weight", "conv1.bias", "bn1.bias"):
        assert torch.equal(first[f"backbone.{name}"], last[f"backbone.{name}"])
    changed = "backbone.layer1.0.conv1.weight"
    assert not torch.equal(first[changed], last[changed])


@pytest.mark.parametrize(
    ("name", "weights", "stem_epochs", "expected"),
    [
        ("joint", (1.0, 1.0), 0, False),
        ("joint", (1.0, 1.0), 1, True),
        ("joint", (1.0, 1.0), 2, False),  # of two epochs
        ("joint", (0.0, 1.0), 0, True),
        ("joint", (1.0, 0.0), 0, True),
        ("backbone", (1.0,), 1, True),
        ("heads", (1.0, 0.0), 1, False),
        ("heads", (0.0, 1.0, 0.0), 0, True),
    ],
)
def test_where_a_parameter_may_get_no_gradient(name, weights, stem_epochs, expected):
    phase = Phase(name, OptimConfig(epochs=2, stem_epochs=stem_epochs), weights)
    assert phase.may_leave_unused == expected


@pytest.mark.parametrize("setting", ["bias_lr_scale", "head_lr_scale"])
def test_another_grouping_of_the_parameters_is_refused_on_resume(tmp_path, monkeypatch, setting):
    at_batch(monkeypatch, 2, ask_to_stop)
    config = mixed_config()
    with pytest.raises(signals.Stopped):
        resume_run(tmp_path / "run", config)
    optim = dataclasses.replace(config.optim, **{setting: 2.0})
    changed = dataclasses.replace(config, optim=optim)
    message = refusal(resume_run, tmp_path / "run", changed, TASK)
    assert_names(message, f"optim.{setting}", 1.0, 2.0)
