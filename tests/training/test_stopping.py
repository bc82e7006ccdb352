"""Stopping early: after a signal everything is saved, and a loss that is not finite ends a run."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    TASK,
    TINY,
    ask_to_stop,
    assert_names,
    assert_same_run,
    at_batch,
    mixed_config,
    read_journal,
    resume_run,
    run_main,
    slowly,
    tensors,
)

from cifar10 import trainer
from early_exit.model.losses import joint_loss
from early_exit.system import signals
from early_exit.training import checkpoint, epochs
from early_exit.training.checkpoint import NAME


class TestStopped:
    """A signal: everything is saved where the run stands."""

    @pytest.mark.parametrize("step", [2, 4, *slowly(1, 5, 8)])
    def test_after_any_step(self, monkeypatch, whole, tmp_path, step):
        at_batch(monkeypatch, step, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run")
        position = checkpoint.load(tmp_path / "run")["position"]
        assert position == {"phase": step >= 3, "epoch": step >= 6, "step": step % 3 + 1}
        resume_run(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    @pytest.mark.parametrize("step", [0, 3])
    def test_before_the_first_step_of_a_phase_it_stops_at_once(
        self, monkeypatch, whole, tmp_path, step
    ):
        # all there is has been saved, and a first step may compile for minutes
        at_batch(monkeypatch, step, ask_to_stop)
        with pytest.raises(signals.Stopped) as stopped:
            resume_run(tmp_path / "run")
        path = tmp_path / "run" / NAME
        assert stopped.value.code == 143
        assert_names(str(stopped.value), 15)
        assert (str(path) in str(stopped.value)) == path.exists() == bool(step)
        resume_run(tmp_path / "run", resume="auto")
        assert_same_run(tmp_path / "run", whole)

    def test_between_two_phases(self, monkeypatch, whole, tmp_path):
        save, calls = checkpoint.save, []

        def saving(directory, state):
            ask_to_stop()
            save(directory, state)
            calls.append(state["position"])

        monkeypatch.setattr(checkpoint, "save", saving)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run")
        monkeypatch.undo()
        assert calls == [{"phase": 1, "epoch": 0, "step": 0}]
        resume_run(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    @pytest.mark.parametrize("micro_batch", [6, *slowly(1)])
    def test_after_any_micro_batch_of_a_step(self, monkeypatch, tmp_path, micro_batch):
        # of two a step: one that does not end its step is undone
        config = mixed_config()
        optim = dataclasses.replace(config.optim, accumulate=2, ema=0.9)
        config = dataclasses.replace(config, optim=optim)
        whole = resume_run(tmp_path / "whole", config)
        at_batch(monkeypatch, micro_batch, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run", config)
        position = checkpoint.load(tmp_path / "run")["position"]
        steps = (micro_batch + 1) // 2
        assert 3 * (position["phase"] + position["epoch"]) + position["step"] == steps
        resume_run(tmp_path / "run", config)
        assert_same_run(tmp_path / "run", whole)
        ours, theirs = (
            tensors(checkpoint.load(tmp_path / name)["average"]) for name in ("run", "whole")
        )
        assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())

    @pytest.mark.parametrize("epoch", range(3))
    def test_while_val_is_scored(self, monkeypatch, whole, tmp_path, epoch):
        at_batch(monkeypatch, epoch, ask_to_stop, "eval_batches")
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run")
        assert len(read_journal(tmp_path / "run")) == epoch
        resume_run(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_after_every_single_step(self, monkeypatch, whole, tmp_path):
        original = epochs.stop_if_signalled

        def stopping(*arguments, **options):
            if options:  # in training; val has nothing to undo
                ask_to_stop()
            original(*arguments, **options)

        monkeypatch.setattr(epochs, "stop_if_signalled", stopping)
        for _ in range(9):  # all steps of the run
            with pytest.raises(signals.Stopped):
                resume_run(tmp_path / "run")
        resume_run(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_the_message_names_the_position_and_how_to_resume(self, monkeypatch, tmp_path):
        at_batch(monkeypatch, 4, ask_to_stop)
        with pytest.raises(signals.Stopped) as stopped:
            resume_run(tmp_path / "run")
        assert stopped.value.code == 143
        message = str(stopped.value)
        assert f"--resume {tmp_path / 'run'}" in message
        # the signal, the epoch and the step
        assert_names(message.replace(str(tmp_path), ""), 15, 1, 2)

    def test_a_frozen_backbone_stays_frozen(self, monkeypatch, whole_frozen, tmp_path):
        config = mixed_config(regime="frozen")
        at_batch(monkeypatch, 7, ask_to_stop)
        with pytest.raises(signals.Stopped):
            resume_run(tmp_path / "run", config)
        resume_run(tmp_path / "run", config)
        assert_same_run(tmp_path / "run", whole_frozen)


class TestDivergence:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """A function that runs the trainer as its command line does: exit code, stdout, stderr."""
        monkeypatch.setattr(trainer, "TASK", TASK)
        return lambda *flags: run_main(trainer.main, "trainer.py", monkeypatch, capsys, *flags)

    @pytest.fixture
    def break_loss(self, monkeypatch):
        """A function that makes the k'th loss of the run, training and val alike, not a number."""

        def arm(k: int) -> None:
            calls = iter(range(1000))

            def broken(*arguments, **options):
                loss = joint_loss(*arguments, **options)
                return loss * math.nan if next(calls) == k else loss

            monkeypatch.setattr(trainer, "TASK", dataclasses.replace(TASK, loss=broken))

        return arm

    def test_a_rate_far_too_high_ends_with_code_1_and_one_line(self, run, tmp_path):
        code, _, err = run(*TINY, "--save-dir", tmp_path / "run", "--lr", "1e30")
        assert code == 1
        assert err.count("\n") == 1
        assert err.startswith("trainer.py: ")
        assert_names(err.replace(str(tmp_path), ""), 1, "joint")  # the epoch and the phase
        assert checkpoint.NAME not in err
        assert not (tmp_path / "run" / checkpoint.NAME).exists()

    def test_step_epoch_and_last_checkpoint_are_named(self, run, break_loss, tmp_path):
        break_loss(6 + 1 + 2)  # six steps and one batch of val an epoch
        code, _, err = run(*TINY, "--save-dir", tmp_path / "run")
        newest = tmp_path / "run" / checkpoint.NAME
        assert code == 1
        assert_names(err, newest)
        # the step, the epoch and the phase
        assert_names(err.replace(str(tmp_path), ""), 3, 2, "joint")
        assert checkpoint.load(newest)["position"] == {"phase": 0, "epoch": 1, "step": 0}

    def test_the_last_good_checkpoint_holds_finite_weights(self, run, tmp_path):
        """One step an epoch: its loss is finite, the weights after it are not."""
        flags = (*TINY, "-b", "48", "--lr", "1e30", "--save-dir", tmp_path / "run")
        code, _, _ = run(*flags)
        assert code == 1
        assert not (tmp_path / "run" / checkpoint.NAME).exists()

    def test_a_loss_on_val_that_is_not_finite_ends_the_run_too(self, run, break_loss, tmp_path):
        break_loss(6)
        code, _, err = run(*TINY, "--save-dir", tmp_path / "run")
        assert code == 1
        assert err.count("\n") == 1
        assert_names(err.replace(str(tmp_path), ""), "val", 1, "joint")
        assert read_journal(tmp_path / "run") == []
