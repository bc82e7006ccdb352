"""A trained run that teaches another one."""

import dataclasses

import pytest
import torch
from helpers import (
    TASK,
    ask_to_stop,
    assert_names,
    assert_same_run,
    at_batch,
    refusal,
    resume_run,
)

from cifar10.resnet import ResNet
from early_exit.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from early_exit.errors import UserError
from early_exit.system import signals
from early_exit.training import checkpoint
from early_exit.training.train import train


def config(**loss) -> Config:
    """Two epochs of three steps with one early exit."""
    return Config(
        data=DataConfig(dataset="digits"),
        model=ModelConfig(arch="resnet20", exits=("layer1",)),
        optim=OptimConfig(epochs=2, batch_size=16, lr=0.05, schedule="cosine"),
        loss=LossConfig(**loss),
        run=RunConfig(amp="off", device="cpu", threads=1),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The run that teaches."""
    directory = tmp_path_factory.mktemp("teacher") / "run"
    return train(config(), TASK, runs=directory, run_dir=directory)


def test_it_is_learnt_from_and_resumed_to_the_last_bit(teacher, tmp_path, monkeypatch):
    taught = config(teacher=str(teacher / checkpoint.NAME), teacher_weight=0.5)
    whole = train(taught, TASK, runs=tmp_path, run_dir=tmp_path / "whole")
    alone = checkpoint.load(teacher)["network"]
    assert any(
        not torch.equal(value, alone[name])
        for name, value in checkpoint.load(whole)["network"].items()
    )
    with monkeypatch.context() as patch:
        at_batch(patch, 4, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "part", taught)
    resumed = resume_run(tmp_path / "part", taught)
    assert_same_run(resumed, whole)


def test_a_trained_run_no_longer_needs_it(teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    moved = tmp_path / "moved.pt"
    moved.write_bytes((teacher / checkpoint.NAME).read_bytes())
    taught = config(teacher=str(moved))
    resume_run(tmp_path / "run", taught)
    moved.unlink()
    caplog.clear()
    resume_run(tmp_path / "run", taught)
    assert "already trained" in caplog.text


def test_its_exits_are_those_that_it_has(tmp_path, monkeypatch):
    """Whatever the default places are since it was trained."""
    default = dataclasses.replace(config(), model=ModelConfig(arch="resnet20"))
    directory = train(default, TASK, runs=tmp_path, run_dir=tmp_path / "teacher")
    monkeypatch.setattr(ResNet, "default_exits", ("layer2",))
    taught = config(teacher=str(directory))
    train(taught, TASK, runs=tmp_path, run_dir=tmp_path / "run")


def test_what_the_teacher_has_seen_the_run_has_seen(teacher, tmp_path):
    """A teacher from another split learnt some labels of val, and passes them on."""
    own = checkpoint.load(teacher)["unseen_val"]
    taught = {}
    for name, unseen in (("same", own), ("other", "0" * 16), ("unknown", None)):
        path = tmp_path / f"{name}.pt"
        torch.save({**checkpoint.load(teacher), "unseen_val": unseen}, path)
        run = train(config(teacher=str(path)), TASK, runs=tmp_path, run_dir=tmp_path / name)
        taught[name] = checkpoint.load(run)["unseen_val"]
    assert taught == {"same": own, "other": None, "unknown": None}


def test_other_classes_are_refused(teacher, tmp_path):
    state = checkpoint.load(teacher)
    path = tmp_path / "other.pt"
    torch.save({**state, "classes": ["a", "b"]}, path)
    message = refusal(train, config(teacher=str(path)), TASK, runs=tmp_path, run_dir=tmp_path / "r")
    assert "2" in message
    assert "classes" in message
    assert not (tmp_path / "r" / "config.yaml").exists()  # it can be corrected and started again


def test_one_that_is_not_finished_is_told(teacher, tmp_path, caplog):
    path = tmp_path / "half.pt"
    torch.save({**checkpoint.load(teacher), "position": {"phase": 0, "epoch": 1, "step": 0}}, path)
    for taught in (config(teacher=str(path)), config(teacher=str(teacher))):
        train(taught, TASK, runs=tmp_path, run_dir=tmp_path / "r", check=True)
    told = [message for message in caplog.messages if "not finished" in message]
    assert len(told) == 1
    assert_names(told[0], path, "epoch 1 of 2")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AssertionError("Wrong image height!"), UserError),  # of a vision transformer
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
    ids=["size", "memory"],
)
def test_images_of_another_size_are_refused_before_training(
    teacher, tmp_path, monkeypatch, error, told
):

    forward = ResNet.forward

    def refuse(self, images):
        if not any(weight.requires_grad for weight in self.parameters()):  # the teacher's
            raise error
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward", refuse)
    run = tmp_path / "r"
    with pytest.raises(told) as caught:
        train(config(teacher=str(teacher)), TASK, runs=tmp_path, run_dir=run)
    if told is UserError:
        assert_names(str(caught.value), teacher, error, 16)
    assert not (run / "config.yaml").exists()
