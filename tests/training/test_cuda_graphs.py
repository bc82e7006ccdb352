"""Training with CUDA graphs: what is refused, what recording must leave alone, and real graphs
where there is a GPU."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TASK,
    assert_same_run,
    comparable_journal,
    refusal,
    require_precision,
    resume_run,
)

from early_exit.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from early_exit.data.folders import FolderConfig
from early_exit.system.distributed import Group
from early_exit.training import cuda_graphs
from early_exit.training.phases import plan_phases
from early_exit.training.train import train

ALONE = Group()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def config(device="cpu", amp="off", accumulate=1, weights=None, **run) -> Config:
    """Two epochs of the plain network, and two of three steps with one early exit."""
    return Config(
        data=DataConfig(dataset="digits"),
        model=ModelConfig(arch="resnet20", exits=("layer1",)),
        optim=OptimConfig(
            epochs=2, batch_size=16, accumulate=accumulate, lr=0.05, schedule="cosine", ema=0.9
        ),
        loss=LossConfig(weights=weights),
        run=RunConfig(regime="mixed", amp=amp, device=device, threads=1, **run),
    )


def run_at(directory, settings):
    return train(settings, TASK, runs=directory.parent, run_dir=directory)


def recorded(module, images, allow_unused_input):
    """Runs a module on the sample a few times, as recording does; returns it without a graph."""
    for _ in range(3):
        module(*images)
    return module


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_recording_changes_nothing_that_is_trained(tmp_path, monkeypatch, amp):
    if amp != "off":
        require_precision(amp)
    plain = run_at(tmp_path / "plain", config(amp=amp))
    monkeypatch.setattr("early_exit.training.train.check_can_replay", lambda run: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    replayed = run_at(tmp_path / "replayed", config(amp=amp, cuda_graphs=True))
    assert_same_run(replayed, plain)


def test_a_trained_run_is_recognised_without_a_gpu(tmp_path, monkeypatch, caplog):
    """With the setting that the refusal names."""
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr("early_exit.training.train.check_can_replay", lambda run: None)
        patch.setattr(torch.cuda, "make_graphed_callables", recorded)
        run_at(tmp_path / "run", config(cuda_graphs=True))
    message = refusal(resume_run, tmp_path / "run", config(cuda_graphs=True))
    assert "run.cuda_graphs=false" in message
    resume_run(tmp_path / "run", config(cuda_graphs=False))
    assert "already trained" in caplog.text


class TestRefused:
    def test_on_a_cpu(self, tmp_path):
        settings = config(cuda_graphs=True)
        message = refusal(train, settings, TASK, runs=tmp_path, run_dir=tmp_path / "run")
        assert "--cuda-graphs" in message and "cpu" in message
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("settings", "world", "named"),
        [
            (config(cuda_graphs=True), 2, "torchrun"),
            (config(cuda_graphs=True, compile=True), 1, "--compile"),
            (config(cuda_graphs=True, accumulate=2), 1, "--accumulate"),
            (config(cuda_graphs=True, weights=(0.0, 1.0)), 1, "loss weights"),
        ],
    )
    def test_together_with(self, settings, world, named):
        assert named in refused(settings, Group(world=world))

    def test_crops_of_two_sizes(self):
        data = FolderConfig(train_crop=32, val_crop=64)
        message = refused(dataclasses.replace(config(cuda_graphs=True), data=data))
        assert "--train-crop" in message and "run.cuda_graphs=false" in message


def refused(settings, group=ALONE) -> str:
    """Why a run on a GPU with images of side 64 is refused."""
    run = SimpleNamespace(
        config=settings,
        device=torch.device("cuda"),
        group=group,
        phases=plan_phases(settings, 2),
        network=SimpleNamespace(image_shape=(3, 64, 64)),
    )
    return refusal(cuda_graphs.check_can_replay, run)


@needs_gpu
def test_the_same_losses_as_without(tmp_path):
    plain = comparable_journal(run_at(tmp_path / "plain", config("cuda")))
    graphs = comparable_journal(run_at(tmp_path / "graphs", config("cuda", cuda_graphs=True)))
    losses = [[epoch["train_loss"] for epoch in journal] for journal in (graphs, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0][1] < losses[0][0]
