"""A user's own loss and settings: what training minimises, and what a run keeps."""

import dataclasses
import re

import torch
from helpers import TASK, bound, refusal, tiny_network, tiny_run

from early_exit.config import Config, LossConfig, ModelConfig, OptimConfig, RunConfig
from early_exit.config import build as build_config
from early_exit.model.losses import joint_loss
from early_exit.training import checkpoint
from early_exit.training.train import train

CONFIG = Config(
    model=ModelConfig(exits=("layer1", "layer2")),
    optim=OptimConfig(batch_size=8),
    run=RunConfig(device="cpu", threads=1),
)


class TestLoss:
    def test_it_is_what_training_minimises(self, tmp_path):
        calls = []

        def final_alone(logits, target, weights, **settings):
            calls.append((len(logits), tuple(weights), settings))
            return joint_loss(logits[-1:], target, weights[-1:])

        task = dataclasses.replace(TASK, loss=final_alone)
        run = tiny_run(tmp_path / "run", task)
        assert len(calls) == 2 * (6 + 1)  # steps, and val
        assert {(number, weights) for number, weights, _ in calls} == {(3, (1.0, 1.0, 1.0))}
        # what has no gradient is as it was drawn, but for the decay, which scales it: each step
        # multiplies every weight by the same number, with two roundings
        torch.manual_seed(0)
        drawn = tiny_network(Config(model=ModelConfig(exits=("layer1", "layer2"))), 10).state_dict()
        trained = checkpoint.load(run)["network"]
        for name, scaled in (("heads.layer1.5.weight", True), ("backbone.linear.weight", False)):
            before, after = drawn[name].double(), trained[name].double()
            scale = (before * after).sum() / before.square().sum()
            off = float((after - scale * before).abs().max() / after.abs().max())
            assert (off < bound(torch.float32, 12 * 4)) is scaled

    def test_it_gets_the_settings_that_are_its_own(self, tmp_path):
        seen = set()

        def focal(logits, target, weights, gamma, **settings):
            seen.add((gamma, *sorted(settings)))
            return joint_loss(logits, target, weights)

        config = dataclasses.replace(
            CONFIG, loss=FocalConfig(gamma=3.0), optim=OptimConfig(epochs=1, batch_size=8)
        )
        task = dataclasses.replace(TASK, loss=focal, config=FocalRun)
        run = train(config, task, runs=tmp_path, run_dir=tmp_path / "run")
        training = (3.0, "distill", "distill_temperature", "label_smoothing")
        assert seen == {training, (3.0,)}  # and on val its own alone
        assert checkpoint.load(run)["config"]["loss"]["gamma"] == 3.0

    def test_a_section_of_ones_own_is_fixed(self, tmp_path):
        task = dataclasses.replace(TASK, config=ExtraRun)
        base = vars(CONFIG) | {"optim": OptimConfig(epochs=1, batch_size=8)}
        config = ExtraRun(**base)
        run = train(config, task, runs=tmp_path, run_dir=tmp_path / "run")
        other = dataclasses.replace(config, extra=Extra(which="b"))
        message = refusal(train, other, task, runs=tmp_path, run_dir=run, resume="auto")
        assert re.search(r"extra\.which.*\ba\b.*\bb\b", message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocalConfig(LossConfig):
    """The loss with a setting more."""

    gamma: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FocalRun(Config):
    """A run with that loss."""

    loss: FocalConfig = FocalConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra:
    """A section of a task's own."""

    which: str = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraRun(Config):
    """A run with a section more."""

    extra: Extra = Extra()


def test_a_section_given_in_part_keeps_the_rest_of_its_default():
    short = OptimConfig(epochs=2, batch_size=16)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Short(Config):
        optim: OptimConfig = short

    built = build_config(Short, {"optim": {"lr": "1e-4"}}).optim
    assert (built.epochs, built.batch_size, built.lr) == (2, 16, 1e-4)
    assert build_config(Config, {"optim": {"lr": 0.2}}).optim == OptimConfig(lr=0.2)
