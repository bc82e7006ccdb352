"""Resuming equals never having stopped, however the run ended."""

import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from claims import assert_names, require_precision
from scripts import DOOR, TINY, at_batch, finish, run_main, start

from cifar10 import trainer
from early_exit import checkpoint, epochs, runtime
from early_exit.checkpoint import NAME, PREVIOUS
from early_exit.config import (
    BackbonePhaseConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from early_exit.errors import Unavailable, UserError
from early_exit.resuming import Position
from early_exit.training import train


def tiny_config(**run) -> Config:
    """A mixed run: one epoch of the backbone and two of everything, three steps each."""
    return Config(
        data=DataConfig(dataset="digits"),
        model=ModelConfig(arch="resnet20", exits=("layer1",)),
        optim=OptimConfig(epochs=2, batch_size=16, lr=0.05, schedule="cosine"),
        backbone_phase=BackbonePhaseConfig(epochs=1),
        run=RunConfig(
            **{"regime": "mixed", "amp": "off", "device": "cpu", "threads": 1, **run}
        ),
    )


STEPS, EPOCHS = 9, 3


def slowly(*values: int) -> list:
    """Values of a parameter that are tried among the slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def go(directory: Path, config: Config | None = None, **options) -> Path:
    """Trains in `directory`, from where it stands."""
    options = {"resume": "auto", **options}
    return train(config or tiny_config(), DOOR, runs=directory, run_dir=directory, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of `tiny_config`, never stopped. Not to be changed."""
    return go(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def whole_joint(tmp_path_factory) -> Path:
    """The same in the joint regime: two epochs of three steps."""
    return go(tmp_path_factory.mktemp("joint") / "run", tiny_config(regime="joint"))


@pytest.fixture(scope="module")
def whole_frozen(tmp_path_factory) -> Path:
    """The same in the frozen regime: one epoch of the backbone, two of the heads."""
    return go(tmp_path_factory.mktemp("frozen") / "run", tiny_config(regime="frozen"))


def journal(directory: Path) -> list[dict]:
    """The records of a run, without what depends on the machine's speed and memory."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in record.items() if "second" not in k and k != "peak_memory"}
        for record in records
    ]


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dictionaries and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}


def assert_same_run(directory: Path, expected: Path) -> None:
    """That two finished runs have the same weights, momenta and journal, to the last bit."""
    found = checkpoint.newest(directory)[1]
    wanted = checkpoint.load(expected)
    for part in ("network", "optimizer"):
        ours, theirs = tensors(found[part]), tensors(wanted[part])
        assert ours and list(ours) == list(theirs)
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), f"{part}{name}"
    assert found["position"] == wanted["position"]
    assert journal(directory) == journal(expected)


class Crash(BaseException):
    """Stands for a process that is killed: nothing is saved."""


def crash() -> None:
    """Ends the run at once."""
    raise Crash


def ask_to_stop() -> None:
    """What a batch system does before the time is up."""
    os.kill(os.getpid(), signal.SIGTERM)


class TestLayout:
    @pytest.mark.parametrize("before", [True, False])
    def test_momenta_go_on_in_another_memory_layout(self, monkeypatch, tmp_path, before):
        """The first step after it moves each weight by its own saved momentum."""
        at_batch(monkeypatch, 2, ask_to_stop)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run", tiny_config(regime="joint", channels_last=before))
        saved = checkpoint.load(tmp_path / "run")["optimizer"]["state"]
        steps, step = [], torch.optim.SGD.step

        def watched(optimizer, *arguments, **options):
            groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
            values = [(p.detach().double(), p.grad.double()) for p, _ in groups]
            result = step(optimizer, *arguments, **options)
            steps.append([(*old, p.detach().clone(), {**group, "params": None})
                          for old, (p, group) in zip(values, groups, strict=True)])
            return result

        monkeypatch.setattr(torch.optim.SGD, "step", watched)
        go(tmp_path / "run", tiny_config(regime="joint", channels_last=not before))
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


class TestStopped:
    """A signal: everything is saved where the run stands."""

    @pytest.mark.parametrize("step", [2, 4, *slowly(1, 5, 8)])
    def test_after_any_step(self, monkeypatch, whole, tmp_path, step):
        at_batch(monkeypatch, step, ask_to_stop)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run")
        position = checkpoint.load(tmp_path / "run")["position"]
        assert position == {"phase": step >= 3, "epoch": step >= 6, "step": step % 3 + 1}
        go(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    @pytest.mark.parametrize("step", [0, 3])
    def test_before_the_first_step_of_a_phase_it_is_left_at_once(
        self, monkeypatch, whole, tmp_path, step
    ):
        # all there is has been saved, and a first step may compile for minutes
        at_batch(monkeypatch, step, ask_to_stop)
        with pytest.raises(runtime.Stopped) as stopped:
            go(tmp_path / "run")
        path = tmp_path / "run" / NAME
        assert stopped.value.code == 143
        assert_names(str(stopped.value), 15)
        assert (str(path) in str(stopped.value)) == path.exists() == bool(step)
        go(tmp_path / "run", resume="auto")
        assert_same_run(tmp_path / "run", whole)

    def test_between_two_phases(self, monkeypatch, whole, tmp_path):
        save, calls = checkpoint.save, []

        def saving(directory, state):
            ask_to_stop()
            save(directory, state)
            calls.append(state["position"])

        monkeypatch.setattr(checkpoint, "save", saving)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run")
        monkeypatch.undo()
        assert calls == [{"phase": 1, "epoch": 0, "step": 0}]
        go(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    @pytest.mark.parametrize("go_number", [6, *slowly(1)])
    def test_after_any_go_of_a_step(self, monkeypatch, tmp_path, go_number):
        # of two goes a step: one that does not end its step is taken back
        config = tiny_config()
        optim = dataclasses.replace(config.optim, accumulate=2, ema=0.9)
        config = dataclasses.replace(config, optim=optim)
        whole = go(tmp_path / "whole", config)
        at_batch(monkeypatch, go_number, ask_to_stop)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run", config)
        position = checkpoint.load(tmp_path / "run")["position"]
        steps = (go_number + 1) // 2
        assert 3 * (position["phase"] + position["epoch"]) + position["step"] == steps
        go(tmp_path / "run", config)
        assert_same_run(tmp_path / "run", whole)
        ours, theirs = (
            tensors(checkpoint.load(tmp_path / name)["average"]) for name in ("run", "whole")
        )
        assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())

    @pytest.mark.parametrize("epoch", range(EPOCHS))
    def test_while_val_is_scored(self, monkeypatch, whole, tmp_path, epoch):
        at_batch(monkeypatch, epoch, ask_to_stop, "eval_batches")
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run")
        assert len(journal(tmp_path / "run")) == epoch
        go(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_after_every_single_step(self, monkeypatch, whole, tmp_path):
        original = epochs.leave_if_asked

        def stopping(*arguments, **options):
            if options:  # in training; val has nothing to undo
                ask_to_stop()
            original(*arguments, **options)

        monkeypatch.setattr(epochs, "leave_if_asked", stopping)
        for _ in range(STEPS):
            with pytest.raises(runtime.Stopped):
                go(tmp_path / "run")
        go(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_the_message_says_where_and_how_to_go_on(self, monkeypatch, tmp_path):
        at_batch(monkeypatch, 4, ask_to_stop)
        with pytest.raises(runtime.Stopped) as stopped:
            go(tmp_path / "run")
        assert stopped.value.code == 143
        message = str(stopped.value)
        assert f"--resume {tmp_path / 'run'}" in message
        # the signal, the epoch and the step
        assert_names(message.replace(str(tmp_path), ""), 15, 1, 2)

    def test_a_frozen_backbone_stays_frozen(self, monkeypatch, whole_frozen, tmp_path):
        config = tiny_config(regime="frozen")
        at_batch(monkeypatch, 7, ask_to_stop)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run", config)
        go(tmp_path / "run", config)
        assert_same_run(tmp_path / "run", whole_frozen)


class TestCrashed:
    """A killed process: the run goes on from the last checkpoint."""

    # the first step of all, inside the first phase, the first step of the second, inside it
    @pytest.mark.parametrize("step", [0, 3, 4, *slowly(1, 6, 8)])
    def test_before_any_step(self, monkeypatch, whole, tmp_path, step):
        at_batch(monkeypatch, step, crash)
        with pytest.raises(Crash):
            go(tmp_path / "run")
        go(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_between_the_phases_of_a_frozen_run(self, monkeypatch, whole_frozen, tmp_path):
        config = tiny_config(regime="frozen")
        at_batch(monkeypatch, 3, crash)
        with pytest.raises(Crash):
            go(tmp_path / "run", config)
        go(tmp_path / "run", config)
        assert_same_run(tmp_path / "run", whole_frozen)

    # two epochs: the first moves two files, the second also the checkpoint before it
    @pytest.mark.parametrize("rename", range(5))
    def test_while_a_checkpoint_is_moved(self, monkeypatch, whole_joint, tmp_path, rename):
        replace, count = os.replace, itertools.count()

        def counted(source, target):
            if Path(target).name.startswith("checkpoint") and next(count) == rename:
                raise Crash
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            with pytest.raises(Crash):
                go(tmp_path / "run", tiny_config(regime="joint"))
        go(tmp_path / "run", tiny_config(regime="joint"))
        assert_same_run(tmp_path / "run", whole_joint)

    def test_with_a_torn_line_in_the_journal(self, monkeypatch, whole, tmp_path):
        at_batch(monkeypatch, 7, crash)
        with pytest.raises(Crash):
            go(tmp_path / "run")
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"phase": "joint", "phase_in')
        go(tmp_path / "run")
        assert journal(tmp_path / "run") == journal(whole)

    def test_with_a_record_that_is_ahead_of_the_checkpoint(
        self, monkeypatch, whole_joint, tmp_path
    ):
        """The record is written before the checkpoint; save_every may put epochs between them."""
        config = tiny_config(regime="joint", save_every=2)
        at_batch(monkeypatch, 4, crash)
        with pytest.raises(Crash):
            go(tmp_path / "run", config)
        assert len(journal(tmp_path / "run")) == 1
        go(tmp_path / "run", config)
        assert [record["epoch"] for record in journal(tmp_path / "run")] == [0, 1]
        assert_same_run(tmp_path / "run", whole_joint)

    def test_half_files_are_swept_away(self, monkeypatch, tmp_path):
        at_batch(monkeypatch, 7, crash)
        with pytest.raises(Crash):
            go(tmp_path / "run")
        (tmp_path / "run" / f".{NAME}.new.x1y2").write_bytes(b"half")
        go(tmp_path / "run")
        assert not list((tmp_path / "run").glob(f".{NAME}*"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run of `tiny_config` that was killed in the last epoch. Not to be changed."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 7, crash)
        with pytest.raises(Crash):
            go(directory)
    return directory


@pytest.fixture
def half(killed, tmp_path) -> Path:
    """A copy of `killed`, to be gone on with."""
    return shutil.copytree(killed, tmp_path / "half")


class TestDamage:
    def test_a_torn_newest_falls_back_with_a_warning_and_finishes(self, half, whole, caplog):
        half.joinpath(PREVIOUS).write_bytes((half / NAME).read_bytes())
        content = (half / NAME).read_bytes()
        (half / NAME).write_bytes(content[: len(content) // 2])
        go(half)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert_names(warning, half / NAME, PREVIOUS)
        assert_same_run(half, whole)

    def test_none_whole_stops_and_is_no_fresh_start(self, half):
        for name in (NAME, PREVIOUS):
            if (half / name).exists():
                (half / name).write_bytes(b"torn")
        before = (half / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match=re.escape(str(half))):
            go(half)
        assert (half / "metrics.jsonl").read_bytes() == before


class TestOtherSettings:
    """What a resumed run may change, and what it may not."""

    @pytest.fixture
    def refusal(self, monkeypatch, capsys, half):
        """A function that resumes with flags and gives the one line that ends it."""
        monkeypatch.setattr(trainer, "DOOR", DOOR)

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

    def test_another_rate_is_taken_and_told(self, half, caplog, monkeypatch):
        monkeypatch.setattr(trainer, "DOOR", DOOR)
        with caplog.at_level(logging.INFO):
            trainer.main(["--resume", str(half), "--lr", "0.01"])
        (told,) = [line for line in caplog.messages if "optim.lr" in line]
        assert_names(told, 0.05, 0.01)
        assert journal(half)[-1]["lr"] < 0.01 < journal(half)[-2]["lr"]

    def test_without_flags_the_runs_own_settings_are_taken(self, half, whole, monkeypatch):
        monkeypatch.setattr(trainer, "DOOR", DOOR)
        trainer.main(["--resume", str(half)])
        assert_same_run(half, whole)

    @pytest.mark.parametrize("change", [{"epochs": 4}, {"lr": 0.01}, {"label_smoothing": 0.1}])
    def test_another_recipe_for_a_finished_run_is_refused(self, whole, tmp_path, change):
        """Silence would leave a config.yaml that tells what nobody trained."""
        shutil.copytree(whole, tmp_path / "run")
        optim = dataclasses.replace(tiny_config().optim, **change)
        with pytest.raises(UserError, match=rf"\boptim\.{next(iter(change))}\b"):
            go(tmp_path / "run", dataclasses.replace(tiny_config(), optim=optim))

    def test_a_finished_run_is_left_as_it_is(self, whole, tmp_path, caplog):
        directory = shutil.copytree(whole, tmp_path / "run")
        (directory / "versions.json").write_text("those of the training")
        with caplog.at_level(logging.INFO):
            go(directory)
        assert str(directory) in caplog.messages[-1]
        assert (directory / "versions.json").read_text() == "those of the training"

    def test_the_default_places_may_be_named(self, tmp_path, monkeypatch):
        model = dataclasses.replace(tiny_config().model, exits=None)
        at_batch(monkeypatch, 7, ask_to_stop)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run", dataclasses.replace(tiny_config(), model=model))
        go(tmp_path / "run")  # with exits=("layer1",)

    def test_another_precision_is_taken(self, half, whole, monkeypatch):
        require_precision("fp16")
        monkeypatch.setattr(trainer, "DOOR", DOOR)
        trainer.main(["--resume", str(half), "--amp", "fp16"])
        assert checkpoint.load(half)["scaler"]
        assert checkpoint.load(half)["position"] == checkpoint.load(whole)["position"]

    def test_another_set_of_decayed_parameters_is_refused(self, refusal):
        message = refusal("--set", "optim.decay_norm=false")
        assert_names(message, "optim.decay_norm", True, False)

    def test_auto_without_a_directory_takes_the_runs_own_settings(self, tmp_path, monkeypatch):
        monkeypatch.setattr(trainer, "DOOR", DOOR)
        monkeypatch.setattr(trainer, "RUNS", tmp_path)
        flags = ("--dataset", "digits", "--threads", "1")
        with monkeypatch.context() as patch:
            at_batch(patch, 4, crash)
            with pytest.raises(Crash):
                trainer.main([*flags, "--epochs", "2", "-b", "16", "--lr", "0.01"])
        trainer.main([*flags, "--resume", "auto"])
        (directory,) = tmp_path.iterdir()
        assert [record["epochs"] for record in journal(directory)] == [2, 2]


class TestPaths:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(trainer, "DOOR", DOOR)

    def test_a_checkpoint_file_goes_on_in_its_directory(self, half, whole):
        trainer.main(["--resume", str(half / NAME)])
        assert_same_run(half, whole)

    def test_into_another_directory_the_old_one_is_left_alone(self, half, whole, tmp_path):
        before = {path.name: path.read_bytes() for path in half.iterdir()}
        trainer.main(["--resume", str(half), "--save-dir", str(tmp_path / "new")])
        assert {path.name: path.read_bytes() for path in half.iterdir()} == before
        found = checkpoint.load(tmp_path / "new")["network"]
        for name, value in checkpoint.load(whole)["network"].items():
            assert torch.equal(found[name], value), name

    def test_a_relative_path_and_an_absolute_one_are_the_same_run(self, half, whole, monkeypatch):
        monkeypatch.chdir(half.parent)
        trainer.main(["--resume", half.name, "--save-dir", str(half)])
        assert_same_run(half, whole)

    def test_auto_starts_afresh_where_there_is_nothing(self, whole, tmp_path):
        go(tmp_path / "run", resume="auto")
        assert_same_run(tmp_path / "run", whole)

    def test_a_finished_run_is_left_as_it_is(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run")
        go(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_the_backbones_file_is_no_longer_needed(self, whole, monkeypatch, tmp_path):
        shutil.copy(whole / NAME, tmp_path / "file.pt")
        model = ModelConfig(arch="resnet20", exits=("layer1",), backbone=str(tmp_path / "file.pt"))
        config = dataclasses.replace(tiny_config(regime="frozen"), model=model)
        go(tmp_path / "whole", config)
        at_batch(monkeypatch, 4, ask_to_stop)
        with pytest.raises(runtime.Stopped):
            go(tmp_path / "run", config)
        (tmp_path / "file.pt").unlink()
        trainer.main(["--resume", str(tmp_path / "run")])
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_two_processes_in_one_run_directory_are_refused(monkeypatch, tmp_path):
    def second() -> None:
        with pytest.raises(Unavailable, match=re.escape(str(tmp_path / "run"))):
            go(tmp_path / "run")
        crash()

    at_batch(monkeypatch, 1, second)
    with pytest.raises(Crash):
        go(tmp_path / "run")


def test_a_position_starts_at_the_beginning():
    assert Position() == Position(phase=0, epoch=0, step=0)


# As processes of their own.

LONG = (*TINY, "--epochs", "6", "--deterministic", "-p", "1")  # of six steps each


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The run of the LONG flags, never stopped. Not to be changed."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "DOOR", DOOR)
        trainer.main([*LONG, "--save-dir", str(directory)])
    torch.use_deterministic_algorithms(before)
    return directory


@pytest.mark.slow
class TestProcesses:
    """One run, ended three times by three signals and then let finish."""

    @pytest.fixture(scope="class")
    @classmethod
    def ends(cls, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
        """Exit code, what was said on stderr, and a copy of the directory at each end."""
        root = tmp_path_factory.mktemp("processes")
        flags = (*LONG, "--save-dir", root / "run", "--resume", "auto")
        ends = {}
        for name, batch in (("SIGTERM", 8), ("SIGINT", 13), ("SIGKILL", 4), ("none", 0)):
            done = finish(start("tests/scripts.py", name, batch, *flags, cwd=root))
            ends[name] = done.returncode, done.stderr, root / name
            shutil.copytree(root / "run", root / name)
        return ends

    @pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
    def test_a_signal_that_asks_is_one_line_and_its_code(self, ends, name, code):
        returncode, said, _ = ends[name]
        assert returncode == code
        assert said.startswith("trainer.py: ") and said.count("\n") == 1
        assert_names(said, code - 128)
        assert "--resume" in said

    # batch 8 is step 2 of epoch 1, batch 9 + 13 = 22 is step 4 of epoch 3, counted from 0
    @pytest.mark.parametrize(("name", "epoch", "step"), [("SIGTERM", 1, 3), ("SIGINT", 3, 5)])
    def test_it_is_saved_after_that_very_step(self, ends, name, epoch, step):
        position = checkpoint.load(ends[name][2])["position"]
        assert position == {"phase": 0, "epoch": epoch, "step": step}

    def test_a_kill_leaves_the_last_whole_epoch(self, ends):
        code, _, directory = ends["SIGKILL"]
        assert code == -signal.SIGKILL
        position = checkpoint.newest(directory)[1]["position"]
        assert position == {"phase": 0, "epoch": 4, "step": 0}

    def test_the_end_is_the_same_as_without_them(self, ends, uninterrupted):
        code, said, directory = ends["none"]
        assert (code, said) == (0, "")
        assert_same_run(directory, uninterrupted)


LIMIT = 600  # seconds, for a process that hangs


def wait_for(process, event: Callable[[str], bool]) -> bool:
    """Reads what a process writes until `event` is true of a line; false if it ends before."""
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    try:
        return any(event(line) for line in process.stdout)
    finally:
        watchdog.cancel()


def wait_until(process, event: Callable[[], bool]) -> bool:
    """Looks until `event` is true; false if the process ends before."""
    end = time.monotonic() + LIMIT
    while not event():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the process hangs"
        time.sleep(0.001)
    return True


@pytest.mark.slow
class TestManyKills:
    """Killed from outside, wherever that catches it."""

    def test_at_random_moments(self, uninterrupted, tmp_path):
        """After a random number of lines; a resumed run writes one for every step."""
        rng, caught = random.Random(0), 0
        flags = ("none", 0, *LONG, "--save-dir", tmp_path / "run", "--resume", "auto")
        for _ in range(8):
            lines = itertools.count(1)
            process = start("tests/scripts.py", *flags, cwd=tmp_path)
            wanted = rng.randrange(10, 30)
            caught += wait_for(process, lambda _: next(lines) == wanted)  # noqa: B023
            process.kill()
            finish(process)
        assert caught >= 2
        done = finish(start("tests/scripts.py", *flags, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_while_a_checkpoint_is_written(self, uninterrupted, tmp_path):
        """Killed as soon as the file under its temporary name is seen."""
        flags = ("none", 0, *LONG, "--save-dir", tmp_path / "run", "--resume", "auto")

        def half_written() -> set[Path]:
            return {*(tmp_path / "run").glob(f".{NAME}.new.*")}

        for _ in range(5):
            before = half_written()  # by the process that was killed last
            process = start("tests/scripts.py", *flags, cwd=tmp_path)
            wait_until(process, lambda: half_written() - before)  # noqa: B023
            process.kill()
            finish(process)
        done = finish(start("tests/scripts.py", *flags, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_the_script_itself_on_the_whole_digits(self, tmp_path):
        flags = (
            "--dataset", "digits", "--epochs", "2", "-b", "128", "--regime", "mixed",
            "--backbone-epochs", "1", "--deterministic", "--threads", "1", "--amp", "off",
            "--device", "cpu", "-p", "1",
        )
        script, resumed = "cifar10/trainer.py", ("--save-dir", tmp_path / "run", "--resume", "auto")
        whole = start(script, *flags, "--save-dir", tmp_path / "whole", cwd=tmp_path)
        assert finish(whole).returncode == 0
        # in the first epoch, at its fifth step; and after the first epoch of the second phase
        path = tmp_path / "run" / "metrics.jsonl"
        moments = (
            lambda line: re.search(r"\b5\b.{1,4}\b9\b", line),
            lambda _: path.exists() and '"joint"' in path.read_text(),
        )
        for moment in moments:
            process = start(script, *flags, *resumed, cwd=tmp_path)
            assert wait_for(process, moment)
            process.kill()
            finish(process)
        done = finish(start(script, *flags, *resumed, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        flags = ("--threads", "1", "--timing-images", "32", "--batch-sizes", "8")
        done = finish(start("cifar10/eval.py", "run", *flags, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        (directory,) = (tmp_path / "run" / "eval").iterdir()
        assert str(directory.relative_to(tmp_path) / "report.md") in done.stdout
        assert json.loads((directory / "report.json").read_text())["live"]["images"] == 360
        assert (directory / "accuracy_vs_macs.png").exists()
