"""Resuming equals never having stopped: what a resumed run may change, and where it continues."""

import dataclasses
import json
import logging
import shutil
import sys

import pytest
import torch
import yaml
from helpers import (
    TASK,
    Crash,
    ask_to_stop,
    assert_names,
    assert_same_run,
    at_batch,
    comparable_journal,
    crash,
    mixed_config,
    read_journal,
    refusal,
    require_precision,
    resume_run,
    run_main,
)

from cifar10 import trainer
from early_exit.config import (
    ModelConfig,
)
from early_exit.errors import UserError
from early_exit.system import signals
from early_exit.training import checkpoint, exported
from early_exit.training.checkpoint import NAME
from early_exit.training.state import Position


class TestLayout:
    @pytest.mark.parametrize("before", [True, False])
    def test_momenta_are_restored_in_another_memory_layout(self, monkeypatch, tmp_path, before):
        """The first step after it moves each weight by its own saved momentum."""
        at_batch(monkeypatch, 2, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run", mixed_config(regime="joint", channels_last=before))
        saved = checkpoint.load(tmp_path / "run")["optimizer"]["state"]
        steps, step = [], torch.optim.SGD.step

        def watched(optimizer, *arguments, **options):
            groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
            values = [(p.detach().double(), p.grad.double()) for p, _ in groups]
            result = step(optimizer, *arguments, **options)
            steps.append(
                [
                    (*old, p.detach().clone(), {**group, "params": None})
                    for old, (p, group) in zip(values, groups, strict=True)
                ]
            )
            return result

        monkeypatch.setattr(torch.optim.SGD, "step", watched)
        resume_run(tmp_path / "run", mixed_config(regime="joint", channels_last=not before))
        assert len(steps) == 3
        momenta = [saved[index]["momentum_buffer"] for index in range(len(saved))]
        pairs = list(zip(momenta, steps[0], strict=True))
        assert any(kept.stride() != after.stride() for kept, (_, _, after, _) in pairs)
        for kept, (weight, gradient, after, group) in pairs:
            assert kept.any() and not group["nesterov"]
            rate, kept = group["lr"], group["momentum"] * kept.double()
            decay = group["weight_decay"] * weight
            # a handful of float32 operations on each number, each within epsilon of its result
            size = weight.abs() + rate * (kept.abs() + gradient.abs() + decay.abs())
            expected = weight - rate * (kept + gradient + decay)
            error = (after.double() - expected).abs()
            assert (error <= 8 * torch.finfo(torch.float32).eps * size).all()


class TestOtherSettings:
    """What a resumed run may change, and what it may not."""

    @pytest.fixture
    def refusal(self, monkeypatch, capsys, half):
        """A function that resumes with flags and gives the one line that ends it."""
        monkeypatch.setattr(trainer, "TASK", TASK)

        def call(*flags: object) -> str:
            before = checkpoint.load(half)["position"]
            code, _, err = run_main(
                trainer.main, "trainer.py", monkeypatch, capsys, "--resume", half, *flags
            )
            assert code == 2
            assert err.count("\n") == 1
            assert checkpoint.load(half)["position"] == before
            return err.removeprefix("trainer.py: ")

        return call

    @pytest.mark.parametrize(
        ("flags", "setting", "trained", "asked"),
        [
            (("--arch", "resnet32"), "model.arch", "resnet20", "resnet32"),
            (("--exits", "layer2"), "model.exits", "layer1", "layer2"),
            (("--exits", "none"), "model.exits", "layer1", "none"),
            (("--head", "linear"), "model.head", "conv", "linear"),
            (("--seed", "1"), "run.seed", 0, 1),
            (("--split-seed", "1"), "data.split_seed", 0, 1),
            (("-b", "8"), "optim.batch_size", 16, 8),
            (("--regime", "joint"), "run.regime", "mixed", "joint"),
        ],
    )
    def test_another_run_is_refused(self, refusal, half, flags, setting, trained, asked):
        message = refusal(*flags)
        assert str(half / NAME) in message
        assert_names(message.replace(str(half), ""), setting, trained, asked)

    def test_fewer_epochs_than_are_done(self, refusal, half):
        message = refusal("--epochs", "1")
        assert str(half / NAME) in message
        assert_names(message.replace(str(half), ""), "--epochs", 1)

    def test_a_backbone_that_would_drop_a_phase(self, refusal, whole):
        assert "backbone" in refusal("--backbone", whole)

    def test_another_rate_is_used_and_logged(self, half, caplog, monkeypatch):
        monkeypatch.setattr(trainer, "TASK", TASK)
        with caplog.at_level(logging.INFO):
            trainer.main(["--resume", str(half), "--lr", "0.01"])
        (told,) = [line for line in caplog.messages if "optim.lr" in line]
        assert_names(told, 0.05, 0.01)
        assert read_journal(half)[-1]["lr"] < 0.01 < read_journal(half)[-2]["lr"]

    def test_the_command_that_began_a_run_is_kept(self, half, monkeypatch):
        began = json.loads((half / "versions.json").read_text())
        monkeypatch.setattr(trainer, "TASK", TASK)
        monkeypatch.setattr(sys, "argv", ["trainer.py", "--resume", "it"])
        trainer.main(["--resume", str(half)])
        now = json.loads((half / "versions.json").read_text())
        (resumed,) = now.pop("resumed")
        assert now == began
        assert resumed["command"] == ["trainer.py", "--resume", "it"] != began["command"]

    def test_without_flags_the_runs_own_settings_are_used(self, half, whole, monkeypatch):
        monkeypatch.setattr(trainer, "TASK", TASK)
        trainer.main(["--resume", str(half)])
        assert_same_run(half, whole)

    @pytest.mark.parametrize("change", [{"epochs": 4}, {"lr": 0.01}, {"label_smoothing": 0.1}])
    def test_another_recipe_for_a_finished_run_is_refused(self, whole, tmp_path, change):
        """Otherwise config.yaml would describe another training than the one that was done."""
        shutil.copytree(whole, tmp_path / "run")
        optim = dataclasses.replace(mixed_config().optim, **change)
        with pytest.raises(UserError, match=rf"\boptim\.{next(iter(change))}\b"):
            resume_run(tmp_path / "run", dataclasses.replace(mixed_config(), optim=optim))

    def test_a_finished_run_is_not_changed(self, whole, tmp_path, caplog):
        directory = shutil.copytree(whole, tmp_path / "run")
        (directory / "versions.json").write_text("those of the training")
        with caplog.at_level(logging.INFO):
            resume_run(directory)
        assert str(directory) in caplog.messages[-1]
        assert (directory / "versions.json").read_text() == "those of the training"

    def test_the_default_places_may_be_named(self, tmp_path, monkeypatch):
        model = dataclasses.replace(mixed_config().model, exits=None)
        at_batch(monkeypatch, 7, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run", dataclasses.replace(mixed_config(), model=model))
        resume_run(tmp_path / "run")  # with exits=("layer1",)

    def test_another_precision_is_used(self, half, whole, monkeypatch):
        require_precision("fp16")
        monkeypatch.setattr(trainer, "TASK", TASK)
        trainer.main(["--resume", str(half), "--amp", "fp16"])
        assert checkpoint.load(half)["scaler"]
        assert checkpoint.load(half)["position"] == checkpoint.load(whole)["position"]

    def test_another_set_of_decayed_parameters_is_refused(self, refusal):
        message = refusal("--set", "optim.decay_norm=false")
        assert_names(message, "optim.decay_norm", True, False)

    def test_auto_without_a_directory_uses_the_runs_own_settings(self, tmp_path, monkeypatch):
        monkeypatch.setattr(trainer, "TASK", TASK)
        monkeypatch.setattr(trainer, "RUNS", tmp_path)
        flags = ("--dataset", "digits", "--threads", "1")
        with monkeypatch.context() as patch:
            at_batch(patch, 4, crash)
            with pytest.raises(Crash):
                trainer.main([*flags, "--epochs", "2", "-b", "16", "--lr", "0.01"])
        trainer.main([*flags, "--resume", "auto"])
        (directory,) = tmp_path.iterdir()
        assert [record["epochs"] for record in read_journal(directory)] == [2, 2]


class TestPaths:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(trainer, "TASK", TASK)

    def test_a_checkpoint_file_resumes_in_its_directory(self, half, whole):
        trainer.main(["--resume", str(half / NAME)])
        assert_same_run(half, whole)

    def test_into_another_directory_the_old_one_is_not_changed(self, half, whole, tmp_path):
        before = {path.name: path.read_bytes() for path in half.iterdir()}
        trainer.main(["--resume", str(half), "--save-dir", str(tmp_path / "new")])
        assert {path.name: path.read_bytes() for path in half.iterdir()} == before
        assert comparable_journal(tmp_path / "new") == comparable_journal(whole)
        began = json.loads(before["versions.json"])
        versions = json.loads((tmp_path / "new" / "versions.json").read_text())
        assert versions.pop("resumed") and versions == began
        found = checkpoint.load(tmp_path / "new")["network"]
        for name, value in checkpoint.load(whole)["network"].items():
            assert torch.equal(found[name], value), name

    def test_a_relative_path_and_an_absolute_one_are_the_same_run(self, half, whole, monkeypatch):
        monkeypatch.chdir(half.parent)
        trainer.main(["--resume", half.name, "--save-dir", str(half)])
        assert_same_run(half, whole)

    def test_auto_starts_afresh_where_there_is_nothing(self, whole, tmp_path):
        resume_run(tmp_path / "run", resume="auto")
        assert_same_run(tmp_path / "run", whole)

    def test_a_finished_run_is_not_changed(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run")
        resume_run(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_another_backbone_is_not_read_and_not_written_down(self, whole, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        own = str(shutil.copy(whole / NAME, tmp_path / "file.pt"))
        model = ModelConfig(arch="resnet20", exits=("layer1",), backbone=own)
        config = dataclasses.replace(mixed_config(regime="frozen"), model=model)
        resume_run(tmp_path / "run", config)
        model = dataclasses.replace(model, backbone="/nowhere.pt")
        longer = dataclasses.replace(config.optim, epochs=config.optim.epochs + 1)
        state = checkpoint.load(tmp_path / "run")
        state["position"] = {"phase": 0, "epoch": 1, "step": 0}
        checkpoint.save(tmp_path / "run", {k: v for k, v in state.items() if k != "format"})
        resume_run(tmp_path / "run", dataclasses.replace(config, model=model, optim=longer))
        assert "/nowhere.pt is not read" in caplog.text
        for found in (
            checkpoint.load(tmp_path / "run")["config"],
            yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()),
        ):
            assert found["model"]["backbone"] == own

    def test_the_backbones_file_is_no_longer_needed(self, whole, monkeypatch, tmp_path):
        shutil.copy(whole / NAME, tmp_path / "file.pt")
        model = ModelConfig(arch="resnet20", exits=("layer1",), backbone=str(tmp_path / "file.pt"))
        config = dataclasses.replace(mixed_config(regime="frozen"), model=model)
        resume_run(tmp_path / "whole", config)
        at_batch(monkeypatch, 4, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run", config)
        (tmp_path / "file.pt").unlink()
        trainer.main(["--resume", str(tmp_path / "run")])
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_position_starts_at_the_beginning():
    assert Position() == Position(phase=0, epoch=0, step=0)


def test_an_export_cannot_be_resumed(whole, tmp_path):
    state = checkpoint.load(whole)
    kept = {name: state[name] for name in (*exported.TYPES, "network")}
    directory = tmp_path / "export"
    directory.mkdir()
    exported.write(directory, kept)
    message = refusal(resume_run, directory)
    assert_names(message, exported.WEIGHTS, "--backbone")
    assert sorted(path.name for path in directory.iterdir()) == [
        ".lock",
        exported.SETTINGS,
        exported.WEIGHTS,
    ]
