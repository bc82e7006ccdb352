"""The CIFAR trainer's errors: one line each, with exit code 2."""

import pytest
import torch
from helpers import TINY, assert_names, refusal

from cifar10 import data
from early_exit.system import locks
from early_exit.training import checkpoint
from early_exit.training.train import check_not_overwritten


class TestFlagsOfOtherScripts:
    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["-j", "4"], ["-j"]),
            (["-j4"], ["-j"]),
            (["--workers", "4"], ["--workers"]),
            (["--half"], ["--half", "--amp"]),
            (["--pretrained"], ["--pretrained", "--backbone"]),
        ],
    )
    def test_the_hint_names_ours(self, error, flags, named):
        assert_names(error(*flags), *named)


class TestErrors:
    def test_an_unknown_flag(self, error):
        assert_names(error("--leraning-rate", "1"), "--leraning-rate")

    def test_an_unknown_network(self, error, monkeypatch):
        monkeypatch.undo()
        message = error("--dataset", "digits", "--arch", "resnet21")
        assert_names(message, "resnet21", "resnet20")

    def test_an_unknown_data_set(self, error, monkeypatch):
        monkeypatch.undo()
        assert_names(error("--dataset", "svhn"), "svhn", *data.LOADERS)

    def test_an_unknown_place(self, error):
        assert_names(error(*TINY, "--exits", "layer1", "layr2"), "layr2", "layer2")

    def test_an_exit_that_saves_nothing(self, error):
        message = error(*TINY, "--exits", "layer3")
        assert_names(message, "layer3")
        assert "%" in message  # what it costs

    def test_exits_none_with_others(self, error):
        assert_names(error(*TINY, "--exits", "layer1", "none"), "model.exits", "none")

    def test_a_value_of_the_wrong_kind(self, error):
        assert_names(error("--epochs", "ten"), "optim.epochs", "ten")

    def test_loss_weights_that_do_not_fit_the_exits(self, error):
        message = error(*TINY, "--loss-weights", "1", "1", "1", "1")
        assert_names(message, "weights", 4, 3)

    def test_an_existing_run_directory(self, error, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        message = error(*TINY, "--save-dir", tmp_path)
        assert_names(message, tmp_path, "--resume auto", "--save-dir")
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_directory_with_nothing_of_the_users(self, tmp_path):
        (tmp_path / "lost+found").mkdir()  # of a new volume
        (tmp_path / ".DS_Store").touch()
        check_not_overwritten(tmp_path, None)
        (tmp_path / ".git").mkdir()
        assert_names(refusal(check_not_overwritten, tmp_path, None), tmp_path)

    def test_a_finished_run_directory(self, error, joint):
        before = {path: path.stat().st_mtime_ns for path in joint.iterdir()}
        assert_names(error(*TINY, "--save-dir", joint), joint)
        assert {path: path.stat().st_mtime_ns for path in joint.iterdir()} == before

    def test_a_run_directory_that_is_a_file(self, error, tmp_path):
        (tmp_path / "file").write_text("")
        message = error(*TINY, "--save-dir", tmp_path / "file")
        assert_names(message, tmp_path / "file", "--save-dir")

    def test_resume_from_a_path_that_is_missing(self, error, tmp_path):
        message = error(*TINY, "--resume", tmp_path / "none.pt")
        assert_names(message, tmp_path / "none.pt", "--resume")
        assert not (tmp_path / "runs").exists()

    def test_resume_from_a_directory_without_a_checkpoint(self, error, tmp_path):
        (tmp_path / "old").mkdir()
        message = error(*TINY, "--resume", tmp_path / "old")
        assert_names(message, tmp_path / "old", "--resume auto")

    def test_resume_of_another_run_into_an_existing_one(self, error, joint, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        message = error("--resume", joint, "--save-dir", tmp_path / "mine")
        assert_names(message, tmp_path / "mine")

    def test_start_epoch_with_resume(self, error, joint):
        message = error("--resume", joint, "--start-epoch", "1")
        assert_names(message, "--start-epoch", joint / checkpoint.NAME)

    @pytest.mark.parametrize("epoch", [2, -1])
    def test_start_epoch_out_of_range(self, error, epoch):
        message = error(*TINY, f"--start-epoch={epoch}")
        assert_names(message, "--start-epoch", epoch, 0, 1)

    def test_start_epoch_in_a_phase_that_needs_the_one_before(self, error, tmp_path):
        flags = ("--regime", "frozen", "--backbone-epochs", "1", "--start-epoch", "1")
        message = error(*TINY, *flags, "--save-dir", tmp_path / "run")
        assert_names(message, "--start-epoch", 1, "backbone", "--backbone")
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("[!.]*"))

    @pytest.mark.parametrize(
        ("flags", "ignored"),
        [
            (("--backbone-epochs", "3"), "--backbone-epochs"),
            (("--backbone-lr", "0.1"), "--backbone-lr"),
            (("--exits", "none", "--distill", "1"), "--distill"),
            (("--exits", "none", "--head", "conv"), "--head"),
            (("--exits", "none", "--regime", "frozen"), "--regime"),
            (("--exits", "none", "--set", "loss.start=0.1"), "--set loss.start"),
            (("--exits", "none", "--set", "optim.head_lr_scale=2"), "--set optim.head_lr_scale"),
            (
                ("--regime", "frozen", "--backbone", "x", "--set", "optim.stem_epochs=1"),
                "--set optim.stem_epochs",
            ),
            (("--set", "loss.teacher_weight=2"), "--set loss.teacher_weight"),
            (("--set", "loss.distill_temperature=2"), "--set loss.distill_temperature"),
            (("--set", "optim.peak=0.5"), "--set optim.peak"),
            (("--schedule", "cosine", "--set", "optim.milestones=0.5"), "--set optim.milestones"),
            (("--schedule", "triangular", "--set", "optim.warmup_epochs=2"), "optim.warmup_epochs"),
            (("--exits", "none", "--loss-weights", "1", "1"), "--loss-weights"),
            (("--regime", "frozen", "--backbone", "x", "--backbone-lr", "1"), "--backbone-lr"),
            (("--exits", "none", "--regime", "mixed", "--backbone-lr", "1"), "--backbone-lr"),
        ],
    )
    def test_flags_that_would_be_ignored(self, error, flags, ignored):
        assert_names(error(*TINY, *flags), ignored)

    def test_two_weights_to_score(self, error, joint, tmp_path):
        message = error("-e", "--resume", joint, "--backbone", tmp_path / "no.pt")
        assert_names(message, "-e", "--resume", "--backbone")

    def test_evaluate_without_weights(self, error):
        assert_names(error(*TINY, "-e"), "-e", "--resume", "--backbone")

    def test_evaluate_a_backbone_whose_heads_are_untrained(self, error, plain):
        message = error(*TINY, "-e", "--backbone", plain)
        assert_names(message, "--backbone", "--exits none")

    def test_split_without_evaluate(self, error):
        assert_names(error(*TINY, "--split", "test"), "--split", "-e")

    def test_backbone_in_a_joint_run(self, error, plain):
        message = error(*TINY, "--backbone", plain)
        assert_names(message, "--backbone", "--regime")

    def test_backbone_for_a_plain_network(self, error, plain):
        message = error(*TINY, "--exits", "none", "--regime", "mixed", "--backbone", plain)
        assert_names(message, "--backbone", "--regime")

    def test_a_backbone_that_is_missing(self, error, tmp_path):
        message = error(*TINY, "--regime", "mixed", "--backbone", tmp_path / "none.pt")
        assert_names(message, tmp_path / "none.pt")

    def test_an_error_makes_no_directory_that_stops_the_next_try(self, run, error, tmp_path):
        error(*TINY, "--save-dir", tmp_path / "run", "--start-epoch", "7")
        code, _, err = run(*TINY, "--save-dir", tmp_path / "run", "--start-epoch", "1")
        assert (code, err) == (0, "")

    def test_a_device_that_is_not_there(self, error):
        assert_names(error(*TINY, "--device", "gpu"), "gpu", "cpu")

    @pytest.mark.parametrize("device", ["mps", "meta", "xpu:0"])
    def test_a_device_of_another_kind(self, error, device):
        assert_names(error(*TINY, "--device", device), device, "cpu")

    def test_a_preset_that_is_missing(self, error, tmp_path):
        message = error("--config", tmp_path / "no.yaml")
        assert_names(message, tmp_path / "no.yaml", "--config")

    def test_a_directory_in_use_is_code_1(self, run, tmp_path):
        with locks.locked(tmp_path / "run"):
            code, _, err = run(*TINY, "--save-dir", tmp_path / "run", "--resume", "auto")
        assert code == 1  # it may be free later
        assert err.startswith("trainer.py: ") and err.count("\n") == 1
        assert_names(err, tmp_path / "run")

    def test_a_file_that_can_no_longer_be_written(self, error, monkeypatch, tmp_path):
        def gone(state, file):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(torch, "save", gone)
        new = tmp_path / "run" / "checkpoint.pt.new"
        message = error(*TINY, "--save-dir", tmp_path / "run")
        assert_names(message, new, "Read-only file system")
