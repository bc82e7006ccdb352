"""Every preset parses, builds its network, and opens with the command that runs it."""

import shlex

import pytest
import torch
from helpers import ROOT

from cifar10 import trainer
from early_exit import config as configs
from early_exit.cli import settings
from early_exit.config import Config
from early_exit.data.folders import FolderRun
from early_exit.model.cost import network_cost
from early_exit.model.losses import joint_loss, weights_at
from early_exit.model.network import MultiExitNetwork
from early_exit.training.optimizer import make_optimizer
from early_exit.training.phases import plan_phases
from early_exit.training.steps import set_training_mode
from imagenet import main

PRESETS = sorted(ROOT.glob("*/configs/*.yaml"))
pytestmark = pytest.mark.parametrize(
    "path", PRESETS, ids=lambda path: "-".join([path.parts[-3], path.stem])
)


def config_class(path) -> type[Config]:
    """What the preset is a part of."""
    return FolderRun if path.parts[-3] == "imagenet" else Config


def configured(path) -> Config:
    """The configuration that the preset's first line asks for, run in the repository."""
    marker, *words = shlex.split(path.read_text().splitlines()[0])
    assert marker == "#"
    folders = path.parts[-3] == "imagenet"
    front, script = (main, "imagenet/main.py") if folders else (trainer, "cifar10/trainer.py")
    at = words.index(script)
    assert words[:at] in (["python"], ["torchrun", "--nproc-per-node", "8"])
    args = front.parser().parse_args(words[at + 1 :])
    assert ROOT / args.config == path
    args.config = ROOT / args.config
    own = main.CLASSIC if front is main else trainer.script_defaults(args)
    return settings.resolve_config(args, None, own, config_class(path))


def built(path) -> MultiExitNetwork:
    """The preset's network, without numbers."""
    front = main if path.parts[-3] == "imagenet" else trainer
    with torch.device("meta"):
        return front.build_network(configured(path), 10)


def test_it_is_a_configuration_without_flags(path):
    assert isinstance(configs.build(config_class(path), configs.load_preset(path)), Config)


def test_its_first_line_is_a_command_that_the_trainer_accepts(path):
    assert isinstance(configured(path), Config)


def test_its_values_survive_its_own_command(path):
    """What the preset sets and its command does not is what the run gets."""
    config = configs.to_dict(configured(path))
    for section, values in configs.load_preset(path).items():
        expected = configs.to_dict(configs.build(config_class(path), {section: values}))[section]
        for name in values:
            assert config[section][name] == expected[name], f"{section}.{name}"


def test_its_second_line_says_what_it_is(path):
    assert path.read_text().splitlines()[1].startswith("# ")


def test_its_network_builds_and_its_exits_save_work(path):
    network = built(path)
    shares = network_cost(network).shares()
    assert all(share < 0.98 for share in shares[:-1])


def test_every_phase_trains_for_a_step(path):
    """On noise, small where the network takes any size: a finite loss, and what is to learn moves
    while the rest does not."""
    torch.manual_seed(0)
    config = configured(path)
    folders = path.parts[-3] == "imagenet"
    classes = 10
    network = (main if folders else trainer).build_network(config, classes)
    side = 64 if folders else network.image_shape[-1]
    images = torch.randn(2, network.image_shape[0], side, side)
    target = torch.tensor([1, 7])
    for phase in plan_phases(config, network.num_exits):
        set_training_mode(network, phase.backbone_frozen)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        part = network.backbone if phase.backbone_only else network
        weights = weights_at(phase.weights, config.loss.start, 0.5)
        logits = [part(images)] if phase.backbone_only else part(images)
        optimizer = make_optimizer(part, phase.optim)
        loss = joint_loss(logits, target, weights, phase.optim.label_smoothing)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        moved = {
            name
            for name, value in network.state_dict().items()
            if not torch.equal(value, before[name])
        }
        heads = {name for name in moved if name.startswith("heads.")}
        assert bool(heads) is not phase.backbone_only
        assert bool(moved - heads) is not phase.backbone_frozen


def test_its_phases_can_be_planned(path):
    config, network = configured(path), built(path)
    phases = plan_phases(config, network.num_exits)
    assert phases[-1].optim == config.optim
