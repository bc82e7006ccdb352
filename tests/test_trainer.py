"""The CIFAR trainer: flags, mistakes, regimes, and what a run leaves behind."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from claims import DTYPES, assert_names, require_precision
from scripts import DOOR, TINY, few_digits, finish, run_main, start, tiny_network

from cifar10 import trainer
from early_exit import checkpoint, disk, experiment, training
from early_exit import config as configs
from early_exit.config import (
    BackbonePhaseConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from early_exit.errors import UserError
from early_exit.experiment import FrontDoor, Phase, plan_phases
from early_exit.losses import joint_loss


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """The trainer with the tiny network and data; runs/ lies in a temporary directory."""
    monkeypatch.setattr(trainer, "DOOR", DOOR)
    monkeypatch.setattr(trainer, "RUNS", tmp_path / "runs")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the trainer as its command line does: exit code, stdout, stderr."""

    def call(*flags):
        return run_main(trainer.main, "trainer.py", monkeypatch, capsys, *flags)

    return call


@pytest.fixture
def refusal(run):
    """A function that gives the one line in which a mistake ends, with exit code 2."""

    def call(*flags) -> str:
        code, _, err = run(*flags)
        assert code == 2
        assert err.startswith("trainer.py: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("trainer.py: ").rstrip("\n")

    return call


def train(directory: Path, *flags: object, door: FrontDoor = DOOR) -> Path:
    """A tiny run in `directory`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "DOOR", door)
        trainer.main([*TINY, "--save-dir", str(directory), *map(str, flags)])
    return directory


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> Path:
    """A finished joint run of two epochs, exits after layer1 and layer2. Not to be changed."""
    return train(tmp_path_factory.mktemp("joint") / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A finished run of the plain network, two epochs. Not to be changed."""
    return train(tmp_path_factory.mktemp("plain") / "run", "--exits", "none")


def journal(directory: Path) -> list[dict]:
    """The records of metrics.jsonl, which are strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def slow_accuracy(directory: Path, split: str) -> dict[str, tuple[float, float]]:
    """Accuracy of every exit, one image after the other in float64, of the checkpoint in
    `directory`: the least and the most that float32 may make of it."""
    saved = checkpoint.load(directory)
    config = configs.build(Config, saved["config"])
    network = tiny_network(config, 10).eval()
    network.load_state_dict(saved["network"])
    network.double()
    part = few_digits(config.data.split_seed).splits[split]
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    # a logit is a sum of sums: of as many products as one path from the image has weights
    work = sum(p[0].numel() for p in network.parameters() if p.ndim > 1)
    least, most = (dict.fromkeys(network.exit_names, 0) for _ in range(2))
    with torch.no_grad():
        for image, target in zip(part.images, part.targets.tolist(), strict=True):
            logits = network(((image.double() / 255 - mean) / std)[None])
            for name, (said,) in zip(network.exit_names, logits, strict=True):
                ahead = said[target] - max(value for k, value in enumerate(said) if k != target)
                rounding = work * torch.finfo(torch.float32).eps * said.abs().max()
                least[name] += bool(ahead > rounding)
                most[name] += bool(ahead >= -rounding)
    return {name: (least[name] / len(part), most[name] / len(part)) for name in least}


def assert_accuracy(found: dict[str, float], expected: dict[str, tuple[float, float]]) -> None:
    """That fractions lie within bounds, for the same exits."""
    assert list(found) == list(expected)
    for name, (least, most) in expected.items():
        assert most - least < 0.1  # or this would claim little
        assert least - 1e-6 <= found[name] <= most + 1e-6, name


class TestFlagsOfOthers:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["-j", "4"], ["-j"]),
            (["-j4"], ["-j"]),
            (["--workers", "4"], ["--workers"]),
            (["--half"], ["--half", "--amp"]),
            (["--pretrained"], ["--pretrained", "--backbone"]),
        ],
    )
    def test_they_are_told_ours(self, refusal, flags, said):
        assert_names(refusal(*flags), *said)


class TestMistakes:
    def test_an_unknown_flag(self, refusal):
        assert_names(refusal("--leraning-rate", "1"), "--leraning-rate")

    def test_an_unknown_network(self, refusal, monkeypatch):
        monkeypatch.undo()
        message = refusal("--dataset", "digits", "--arch", "resnet21")
        assert_names(message, "resnet21", "resnet20")

    def test_an_unknown_data_set(self, refusal, monkeypatch):
        monkeypatch.undo()
        assert_names(refusal("--dataset", "svhn"), "svhn", "cifar10", "digits", "mnist")

    def test_an_unknown_place(self, refusal):
        assert_names(refusal(*TINY, "--exits", "layer1", "layr2"), "layr2", "layer2")

    def test_an_exit_that_saves_nothing(self, refusal):
        message = refusal(*TINY, "--exits", "layer3")
        assert_names(message, "layer3")
        assert "%" in message  # what it costs

    def test_exits_none_with_others(self, refusal):
        assert_names(refusal(*TINY, "--exits", "layer1", "none"), "exits", "none")

    def test_a_value_of_the_wrong_kind(self, refusal):
        assert_names(refusal("--epochs", "ten"), "optim.epochs", "ten")

    def test_loss_weights_that_do_not_fit_the_exits(self, refusal):
        message = refusal(*TINY, "--loss-weights", "1", "1", "1", "1")
        assert_names(message, "weights", 4, 3)

    def test_an_existing_run_directory(self, refusal, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        message = refusal(*TINY, "--save-dir", tmp_path)
        assert_names(message, tmp_path, "--resume auto", "--save-dir")
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_finished_run_directory(self, refusal, joint):
        before = {path: path.stat().st_mtime_ns for path in joint.iterdir()}
        assert_names(refusal(*TINY, "--save-dir", joint), joint)
        assert {path: path.stat().st_mtime_ns for path in joint.iterdir()} == before

    def test_a_run_directory_that_is_a_file(self, refusal, tmp_path):
        (tmp_path / "file").write_text("")
        message = refusal(*TINY, "--save-dir", tmp_path / "file")
        assert_names(message, tmp_path / "file", "--save-dir")

    def test_resume_from_a_path_that_is_missing(self, refusal, tmp_path):
        message = refusal(*TINY, "--resume", tmp_path / "none.pt")
        assert_names(message, tmp_path / "none.pt", "--resume")
        assert not (tmp_path / "runs").exists()

    def test_resume_from_a_directory_without_a_checkpoint(self, refusal, tmp_path):
        (tmp_path / "old").mkdir()
        message = refusal(*TINY, "--resume", tmp_path / "old")
        assert_names(message, tmp_path / "old", "--resume auto")

    def test_resume_of_another_run_into_an_existing_one(self, refusal, joint, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        message = refusal("--resume", joint, "--save-dir", tmp_path / "mine")
        assert_names(message, tmp_path / "mine")

    def test_start_epoch_with_resume(self, refusal, joint):
        message = refusal("--resume", joint, "--start-epoch", "1")
        assert_names(message, "--start-epoch", joint / checkpoint.NAME)

    @pytest.mark.parametrize("epoch", [2, -1])
    def test_start_epoch_out_of_range(self, refusal, epoch):
        message = refusal(*TINY, f"--start-epoch={epoch}")
        assert_names(message, "--start-epoch", epoch, 0, 1)

    def test_start_epoch_in_a_phase_that_needs_the_one_before(self, refusal, tmp_path):
        flags = ("--regime", "frozen", "--backbone-epochs", "1", "--start-epoch", "1")
        message = refusal(*TINY, *flags, "--save-dir", tmp_path / "run")
        assert_names(message, "--start-epoch", 1, "backbone", "--backbone")
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("[!.]*"))

    @pytest.mark.parametrize(
        ("flags", "ignored"),
        [
            (("--backbone-epochs", "3"), "--backbone-epochs"),
            (("--backbone-lr", "0.1"), "--backbone-lr"),
            (("--exits", "none", "--distill", "1"), "--distill"),
            (("--exits", "none", "--head", "conv"), "--head"),
            (("--exits", "none", "--loss-weights", "1", "1"), "--loss-weights"),
            (("--regime", "frozen", "--backbone", "x", "--backbone-lr", "1"), "--backbone-lr"),
            (("--exits", "none", "--regime", "mixed", "--backbone-lr", "1"), "--backbone-lr"),
        ],
    )
    def test_flags_that_would_be_ignored(self, refusal, flags, ignored):
        assert_names(refusal(*TINY, *flags), ignored)

    def test_two_weights_to_score(self, refusal, joint, tmp_path):
        message = refusal("-e", "--resume", joint, "--backbone", tmp_path / "no.pt")
        assert_names(message, "-e", "--resume", "--backbone")

    def test_evaluate_without_weights(self, refusal):
        assert_names(refusal(*TINY, "-e"), "-e", "--resume", "--backbone")

    def test_evaluate_a_backbone_whose_heads_are_untrained(self, refusal, plain):
        message = refusal(*TINY, "-e", "--backbone", plain)
        assert_names(message, "--backbone", "--exits none")

    def test_split_without_evaluate(self, refusal):
        assert_names(refusal(*TINY, "--split", "test"), "--split", "-e")

    def test_backbone_in_a_joint_run(self, refusal, plain):
        message = refusal(*TINY, "--backbone", plain)
        assert_names(message, "--backbone", "--regime")

    def test_backbone_for_a_plain_network(self, refusal, plain):
        message = refusal(*TINY, "--exits", "none", "--regime", "mixed", "--backbone", plain)
        assert_names(message, "--backbone", "--regime")

    def test_a_backbone_that_is_missing(self, refusal, tmp_path):
        message = refusal(*TINY, "--regime", "mixed", "--backbone", tmp_path / "none.pt")
        assert_names(message, tmp_path / "none.pt")

    def test_a_mistake_leaves_no_directory_that_stops_the_next_try(self, run, refusal, tmp_path):
        refusal(*TINY, "--save-dir", tmp_path / "run", "--start-epoch", "7")
        code, _, err = run(*TINY, "--save-dir", tmp_path / "run", "--start-epoch", "1")
        assert (code, err) == (0, "")

    def test_a_device_that_is_not_there(self, refusal):
        assert_names(refusal(*TINY, "--device", "gpu"), "gpu", "cpu")

    @pytest.mark.parametrize("device", ["mps", "meta", "xpu:0"])
    def test_a_device_of_another_kind(self, refusal, device):
        assert_names(refusal(*TINY, "--device", device), device, "cpu")

    def test_a_preset_that_is_missing(self, refusal, tmp_path):
        message = refusal("--config", tmp_path / "no.yaml")
        assert_names(message, tmp_path / "no.yaml", "--config")

    def test_a_directory_in_use_is_no_mistake(self, run, tmp_path):
        with disk.locked(tmp_path / "run"):
            code, _, err = run(*TINY, "--save-dir", tmp_path / "run", "--resume", "auto")
        assert code == 1  # it may be free later
        assert err.startswith("trainer.py: ") and err.count("\n") == 1
        assert_names(err, tmp_path / "run")

    def test_a_file_that_can_no_longer_be_written(self, refusal, monkeypatch, tmp_path):
        def gone(state, file):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(torch, "save", gone)
        new = tmp_path / "run" / "checkpoint.pt.new"
        message = refusal(*TINY, "--save-dir", tmp_path / "run")
        assert_names(message, new, "Read-only file system")


class TestDivergence:
    @pytest.fixture
    def break_loss(self, monkeypatch):
        """A function that makes the k'th loss of the run, training and val alike, not a number."""

        def arm(k: int) -> None:
            calls = iter(range(1000))

            def broken(*arguments, **options):
                loss = joint_loss(*arguments, **options)
                return loss * math.nan if next(calls) == k else loss

            monkeypatch.setattr(trainer, "DOOR", dataclasses.replace(DOOR, loss=broken))

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
        assert journal(tmp_path / "run") == []


class TestHelp:
    @pytest.fixture(scope="class")
    @classmethod
    def text(cls) -> str:
        return trainer.parser().format_help()

    def test_it_is_printed_with_code_0(self, run, text):
        assert run("--help") == (0, text, "")

    @pytest.mark.parametrize(
        ("flag", "setting"),
        [
            ("--arch", "model.arch"),
            ("--head", "model.head"),
            ("--regime", "run.regime"),
            ("--epochs", "optim.epochs"),
            ("--batch-size", "optim.batch_size"),
            ("--learning-rate", "optim.lr"),
            ("--schedule", "optim.schedule"),
            ("--momentum", "optim.momentum"),
            ("--weight-decay", "optim.weight_decay"),
            ("--distill", "loss.distill"),
            ("--save-every", "run.save_every"),
            ("--amp", "run.amp"),
            ("--seed", "run.seed"),
            ("--split-seed", "data.split_seed"),
        ],
    )
    def test_it_says_the_default(self, flag, setting):
        section, name = setting.split(".")
        (action,) = (a for a in trainer.parser()._actions if flag in a.option_strings)
        default = getattr(getattr(Config(), section), name)
        assert action.dest == setting
        default = " ".join(default) if isinstance(default, tuple) else default
        assert_names(action.help, f"{default:g}" if isinstance(default, float) else default)

    def test_every_flag_that_takes_a_value_says_what_happens_without_it(self):
        silent = {"--config", "--set", "--resume", "--backbone"}  # absent: there is none
        for action in trainer.parser()._actions:
            shown = action.help != "==SUPPRESS==" and action.nargs != 0
            if shown and not silent & {*action.option_strings}:
                said = re.search("default|absent|without|unless|otherwise|not given", action.help)
                assert said, action.option_strings

    def test_without_a_data_set_it_is_cifar10(self, refusal, monkeypatch):
        def load_data(settings):
            raise UserError(f"asked for {settings.dataset}")

        monkeypatch.setattr(trainer, "DOOR", FrontDoor(tiny_network, load_data))
        assert refusal("--epochs", "1") == "asked for cifar10"

    def test_it_shows_the_examples_of_the_script(self, text):
        assert "python cifar10/trainer.py --dataset digits" in text


@pytest.mark.slow
class TestProcess:
    """The script itself, run from another working directory."""

    @pytest.fixture(scope="class")
    @classmethod
    def done(cls, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "full").mkdir()
        (elsewhere / "full" / "notes.txt").write_text("mine")
        started = {
            "full": start(
                "cifar10/trainer.py", "--dataset", "digits", "--save-dir", "full", cwd=elsewhere
            ),
            "eval": start("cifar10/eval.py", "nowhere", cwd=elsewhere),
        }
        return {name: finish(process) for name, process in started.items()}

    def test_a_mistake_is_one_line_and_code_2(self, done):
        assert done["full"].returncode == 2
        line = done["full"].stderr
        assert line.startswith("trainer.py: ") and line.count("\n") == 1
        assert_names(line, "full", "--resume auto", "--save-dir")

    def test_a_mistake_of_an_evaluation_is_one_line_and_code_2(self, done):
        assert done["eval"].returncode == 2
        line = done["eval"].stderr
        assert line.startswith("eval.py: ") and line.count("\n") == 1
        assert_names(line, "nowhere")


class TestRunDirectory:
    def test_its_files(self, joint):
        assert {path.name for path in joint.iterdir()} == {
            ".lock", "checkpoint.pt", "checkpoint-previous.pt", "config.yaml", "metrics.jsonl",
            "versions.json",
        }

    def test_it_is_named_after_the_settings(self, run, tmp_path):
        code, out, _ = run(*TINY, "--epochs", "1", "--seed", "3")
        directory = tmp_path / "runs" / "digits-resnet20-layer1-layer2-joint-seed3"
        assert code == 0
        assert_names(out.splitlines()[-2], directory)
        assert (directory / checkpoint.NAME).exists()

    def test_a_plain_network_is_named_plain(self):
        config = Config(data=DataConfig(dataset="cifar10"), model=ModelConfig(exits=()))
        path = training.default_run_dir(Path("runs"), config, ("final",))
        assert path == Path("runs/cifar10-resnet32-plain-seed0")

    def test_config_yaml_rebuilds_the_configuration(self, joint):
        written = yaml.safe_load((joint / "config.yaml").read_text())
        assert configs.build(Config, written) == Config(
            data=DataConfig(dataset="digits"),
            model=ModelConfig(arch="resnet20", exits=("layer1", "layer2")),
            optim=OptimConfig(epochs=2, batch_size=8, lr=0.05, schedule="cosine"),
            run=RunConfig(amp="off", device="cpu", threads=1),
        )

    def test_versions_json_says_what_ran(self, joint):
        versions = json.loads((joint / "versions.json").read_text())
        assert versions["torch"] == importlib.metadata.version("torch")
        assert {"python", "torch", "torchvision", "numpy", "git", "device", "processes",
                "precision", "command"} == set(versions)
        assert versions["precision"] == "off"

    def test_journal_has_a_record_an_epoch_with_every_exit(self, joint):
        records = journal(joint)
        assert [(r["phase"], r["epoch"]) for r in records] == [("joint", 0), ("joint", 1)]
        for record in records:
            assert list(record["val_top1"]) == ["layer1", "layer2", "final"]
            assert list(record["train_top1"]) == ["layer1", "layer2", "final"]
            assert math.isfinite(record["train_loss"]) and math.isfinite(record["val_loss"])
            assert record["images_per_second"] > 0
            assert record["peak_memory"] > 2**20

    def test_journals_last_accuracy_is_the_checkpoints(self, joint):
        assert_accuracy(journal(joint)[-1]["val_top1"], slow_accuracy(joint, "val"))

    def test_training_learns(self, joint):
        first, last = journal(joint)
        assert last["train_loss"] < first["train_loss"]

    def test_checkpoint_says_what_evaluation_needs(self, joint):
        saved = checkpoint.load(joint)
        assert saved["exit_names"] == ["layer1", "layer2", "final"]
        assert saved["classes"] == list("0123456789")
        assert saved["val_hash"] == saved["unseen_val"] == few_digits(0).val_hash
        assert saved["normalisation"] == {
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]
        }
        assert saved["position"] == {"phase": 1, "epoch": 0, "step": 0}

    def test_save_every_keeps_to_its_epochs_and_the_last(self, monkeypatch, tmp_path):
        positions, save = [], checkpoint.save

        def noted(directory, state):
            positions.append((state["position"]["phase"], state["position"]["epoch"]))
            save(directory, state)

        monkeypatch.setattr(checkpoint, "save", noted)
        train(tmp_path / "run", "--epochs", "5", "-b", "48", "--save-every", "2")
        assert positions == [(0, 2), (0, 4), (1, 0)]

    def test_tensorboard_files_hold_every_exit(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train(tmp_path / "run", "--epochs", "1", "--tensorboard")
        found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        found.Reload()
        (event,) = found.Scalars("val_top1/layer2")
        assert event.value == pytest.approx(journal(tmp_path / "run")[0]["val_top1"]["layer2"])

    def test_without_the_flag_there_is_no_tensorboard(self, joint):
        assert not (joint / "tensorboard").exists()

    def test_start_epoch_begins_there(self, tmp_path):
        train(tmp_path / "run", "--start-epoch", "1")
        assert [record["epoch"] for record in journal(tmp_path / "run")] == [1]

    def test_the_same_seed_trains_the_same_weights(self, joint, tmp_path):
        again = checkpoint.load(train(tmp_path / "run"))["network"]
        for name, value in checkpoint.load(joint)["network"].items():
            assert torch.equal(value, again[name]), name

    def test_another_seed_trains_others(self, joint, tmp_path):
        other = checkpoint.load(train(tmp_path / "run", "--seed", "1"))["network"]
        name = "backbone.conv1.weight"
        assert not torch.equal(checkpoint.load(joint)["network"][name], other[name])

    def test_digits_of_a_preset_are_the_digits_of_the_flag(self, joint, tmp_path):
        preset = tmp_path / "preset.yaml"
        preset.write_text("data: {dataset: digits}\n")
        train(tmp_path / "run", "--config", preset)
        flags = TINY[2:]  # without --dataset digits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "DOOR", DOOR)
            trainer.main([*flags, "--config", str(preset), "--save-dir", str(tmp_path / "other")])
        texts = [(tmp_path / name / "config.yaml").read_text() for name in ("run", "other")]
        assert texts[0] == texts[1]


class TestReadings:
    def lines(self, caplog, directory, *flags) -> list[str]:
        """What a tiny run logs about its steps."""
        with caplog.at_level(logging.INFO):
            train(directory, "--epochs", "1", *flags)
        return [
            message for record, message in zip(caplog.records, caplog.messages, strict=True)
            if record.module == "epochs"
        ]

    def test_print_freq_logs_lines_when_there_is_no_terminal(self, caplog, tmp_path):
        lines = self.lines(caplog, tmp_path / "run", "-p", "2")
        assert len(lines) == 3
        for line, step in zip(lines, (2, 4, 6), strict=True):
            assert_names(line, step, 6, "layer2", "final")

    def test_without_it_an_epoch_is_one_line(self, caplog, tmp_path):
        assert self.lines(caplog, tmp_path / "run") == []
        assert [record.module for record in caplog.records].count("journal") == 1


class TestPlan:
    """Which phases a regime has; the loss weights of each."""

    optim = OptimConfig(epochs=7, lr=0.3)

    def plan(self, regime, num_exits=3, backbone=None, weights=None, **phase) -> list[Phase]:
        config = Config(
            model=ModelConfig(backbone=backbone),
            optim=self.optim,
            backbone_phase=BackbonePhaseConfig(**phase),
            loss=LossConfig(weights=weights),
            run=RunConfig(regime=regime),
        )
        return plan_phases(config, num_exits)

    def test_joint(self):
        assert self.plan("joint") == [Phase("joint", self.optim, (1.0, 1.0, 1.0))]

    def test_a_plain_network_has_one_phase_whatever_the_regime(self):
        for regime in ("joint", "mixed", "frozen"):
            assert self.plan(regime, num_exits=1) == [Phase("plain", self.optim, (1.0,))]

    def test_mixed_trains_the_backbone_first_with_its_own_epochs_and_rate(self):
        first, second = self.plan("mixed", epochs=2, lr=0.01)
        assert (first.name, first.optim.epochs, first.optim.lr) == ("backbone", 2, 0.01)
        assert first.weights == (1.0,) and first.backbone_only
        assert second == Phase("joint", self.optim, (1.0, 1.0, 1.0))

    def test_the_first_phase_is_like_the_second_where_nothing_else_is_said(self):
        first, second = self.plan("mixed")
        assert first.optim == second.optim

    def test_frozen_trains_the_heads_last(self):
        first, second = self.plan("frozen")
        assert (first.name, second.name) == ("backbone", "heads")
        assert second.backbone_frozen and not first.backbone_frozen
        assert second.weights == (1.0, 1.0, 0.0)

    @pytest.mark.parametrize(("regime", "name"), [("mixed", "joint"), ("frozen", "heads")])
    def test_a_given_backbone_skips_the_first_phase(self, regime, name):
        (phase,) = self.plan(regime, backbone="file.pt")
        assert phase.name == name

    def test_one_weight_per_exit(self):
        (phase,) = self.plan("joint", weights=(0.2, 0.3, 2.0))
        assert phase.weights == (0.2, 0.3, 2.0)

    def test_one_weight_per_early_exit_leaves_the_rest_to_the_final(self):
        (phase,) = self.plan("joint", weights=(0.25, 0.25))
        assert phase.weights == (0.25, 0.25, 0.5)

    def test_frozen_with_heads_of_no_weight_is_refused(self):
        with pytest.raises(UserError, match=r"weights.*\b0\b"):
            self.plan("frozen", weights=(0.0, 0.0, 1.0))


class TestRegimes:
    def test_two_phases_with_their_own_epochs_and_rates(self, tmp_path):
        train(
            tmp_path / "run", "--regime", "mixed", "--epochs", "2", "--backbone-epochs", "1",
            "--lr", "0.01", "--backbone-lr", "0.02", "--schedule", "step",
        )
        records = journal(tmp_path / "run")
        assert [(r["phase"], r["phase_index"], r["epoch"], r["epochs"]) for r in records] == [
            ("backbone", 0, 0, 1), ("joint", 1, 0, 2), ("joint", 1, 1, 2)
        ]
        # at the last step of each epoch: both milestones passed, none, both
        assert [r["lr"] for r in records] == pytest.approx([0.0002, 0.01, 0.0001])
        assert [list(r["val_top1"]) for r in records] == [
            ["final"], ["layer1", "layer2", "final"], ["layer1", "layer2", "final"]
        ]

    def test_the_first_phase_leaves_the_heads_alone(self, tmp_path):
        train(tmp_path / "run", "--regime", "mixed", "--epochs", "1", "--backbone-epochs", "1")
        before = checkpoint.load(tmp_path / "run" / checkpoint.PREVIOUS)["network"]
        after = checkpoint.load(tmp_path / "run")["network"]
        torch.manual_seed(0)
        config = Config(model=ModelConfig(exits=("layer1", "layer2")))
        untrained = tiny_network(config, 10).state_dict()
        heads = [name for name in after if name.startswith("heads.")]
        assert all(torch.equal(before[name], untrained[name]) for name in heads)
        assert not all(torch.equal(after[name], untrained[name]) for name in heads)

    def test_a_given_backbone_skips_the_first_phase(self, plain, tmp_path):
        train(tmp_path / "run", "--regime", "mixed", "--epochs", "1", "--backbone", plain)
        assert [record["phase"] for record in journal(tmp_path / "run")] == ["joint"]

    @pytest.fixture(scope="class")
    @classmethod
    def frozen(cls, plain, tmp_path_factory) -> Path:
        """A frozen run of two epochs on the plain run's backbone."""
        flags = ("--regime", "frozen", "--backbone", plain)
        return train(tmp_path_factory.mktemp("frozen") / "run", *flags)

    def test_frozen_moves_no_number_of_the_backbone(self, plain, frozen):
        before = checkpoint.load(plain)["network"]
        after = checkpoint.load(frozen)["network"]
        names = [name for name in after if name.startswith("backbone.")]
        assert sorted(names) == sorted(before)
        assert any(name.endswith("running_mean") for name in names)
        for name in names:
            assert torch.equal(before[name], after[name]), name

    def test_frozen_trains_the_heads(self, frozen):
        torch.manual_seed(0)
        config = Config(model=ModelConfig(exits=("layer1", "layer2")))
        untrained = tiny_network(config, 10).state_dict()
        trained = checkpoint.load(frozen)["network"]
        weights = [n for n in trained if n.startswith("heads.") and n.endswith("weight")]
        assert not any(torch.equal(trained[name], untrained[name]) for name in weights)

    def test_frozen_keeps_the_final_exits_accuracy(self, plain, frozen):
        final = journal(frozen)[-1]["val_top1"]["final"]
        assert_accuracy({"final": final}, slow_accuracy(plain, "val"))

    def test_a_backbone_of_the_same_split_leaves_val_unseen(self, frozen):
        assert checkpoint.load(frozen)["unseen_val"] == few_digits(0).val_hash

    def test_a_backbone_of_another_split_has_seen_val(self, plain, tmp_path):
        flags = ("--regime", "frozen", "--epochs", "1", "--backbone", plain, "--split-seed", "1")
        train(tmp_path / "run", *flags)
        saved = checkpoint.load(tmp_path / "run")
        assert saved["unseen_val"] is None
        assert saved["val_hash"] == few_digits(1).val_hash

    def test_a_backbone_from_elsewhere_may_have_seen_val(self, plain, tmp_path):
        weights, _ = checkpoint.load_backbone(plain)
        torch.save({"state_dict": {f"module.{n}": v for n, v in weights.items()}},
                   tmp_path / "public.th")
        flags = ("--regime", "mixed", "--epochs", "1", "--backbone", tmp_path / "public.th")
        train(tmp_path / "run", *flags)
        assert checkpoint.load(tmp_path / "run")["unseen_val"] is None


class TestFlags:
    """Flags that change how a run is computed: each trains, and none is ignored."""

    @pytest.fixture
    def weights(self, tmp_path):
        """A function that gives the backbone's weights after a run of two epochs with flags."""

        def call(*flags, door=DOOR) -> dict[str, torch.Tensor]:
            return checkpoint.load(train(tmp_path / "run", *flags, door=door))["network"]

        return call

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_amp(self, monkeypatch, weights, joint, amp):
        require_precision(amp)
        seen = set()

        def spying(settings, num_classes):
            network = tiny_network(settings, num_classes)
            network.backbone.layer2[0].conv1.register_forward_hook(
                lambda _, inputs, output: seen.add(output.dtype)
            )
            return network

        found = weights("--amp", amp, door=dataclasses.replace(DOOR, build_network=spying))
        reference = checkpoint.load(joint)["network"]
        name = "backbone.conv1.weight"
        assert DTYPES[amp] in seen
        assert not torch.equal(found[name], reference[name])
        assert all(value.isfinite().all() for value in found.values())
        assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}

    def test_distill_teaches_the_early_exits(self, weights, joint):
        name, reference = "heads.layer1.5.weight", checkpoint.load(joint)["network"]
        assert not torch.equal(weights("--distill", "0.5")[name], reference[name])

    @pytest.mark.parametrize("flags, layout", [
        ((), torch.channels_last), (("--no-channels-last",), torch.contiguous_format),
    ])
    def test_channels_last(self, monkeypatch, tmp_path, flags, layout):
        seen = []

        def spying(settings):
            network = tiny_network(settings, 10)
            network.backbone.layer2[0].register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=layout))
            )
            return network

        monkeypatch.setattr(
            trainer, "DOOR", FrontDoor(lambda settings, _: spying(settings), DOOR.load_data)
        )
        trainer.main([*TINY, "--epochs", "1", "--save-dir", str(tmp_path / "run"), *flags])
        # dry run and cost count apart, which see images of no layout
        assert len(seen) > 2 and all(seen[2:])

    def first_loss(self, directory, *flags) -> float:
        """The loss of the first step, which takes all images: of the weights of the seed."""
        flags = ("--epochs", "1", "-b", "48", *flags)
        return journal(train(directory, *flags))[0]["train_loss"]

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_amp_gives_the_same_loss_but_for_rounding(self, tmp_path, amp):
        require_precision(amp)
        expected = self.first_loss(tmp_path / "off")
        # each of eight layers rounds its input, its weights and its output once
        bound = 24 * torch.finfo(DTYPES[amp]).eps * expected
        assert self.first_loss(tmp_path / amp, "--amp", amp) == pytest.approx(expected, abs=bound)

    @pytest.mark.slow
    def test_compile(self, monkeypatch, tmp_path):
        expected = self.first_loss(tmp_path / "off")
        compiled, compile_ = [], torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module, "compile",
            lambda module, **options: compiled.append(1) or compile_(module, **options),
        )
        found = self.first_loss(tmp_path / "on", "--compile")
        assert compiled
        # sums of up to 3 x 3 x 64 products in each of eight layers, in any order
        bound = 8 * 576 * torch.finfo(torch.float32).eps * expected
        assert found == pytest.approx(expected, abs=bound)


class TestWhatIsNext:
    def next_of(self, out: str) -> list[str]:
        last = out.splitlines()[-1]
        return shlex.split(last[last.index(sys.executable) :])

    def test_an_evaluation(self, run, tmp_path):
        directory = tmp_path / "a run"
        code, out, _ = run(*TINY, "--epochs", "1", "--save-dir", directory)
        assert code == 0
        python, script, run_dir = self.next_of(out)
        assert (python, run_dir) == (sys.executable, str(directory))
        assert script.endswith("eval.py") and Path(script).is_file()

    def test_a_choice_of_stages_after_cdl(self, run, tmp_path):
        flags = ("--regime", "cdl", "--epochs", "1", "--backbone-epochs", "1")
        code, out, err = run(*TINY, *flags, "--save-dir", tmp_path / "run")
        assert (code, err) == (0, "")
        assert self.next_of(out)[-2:] == ["--delta", "0.9"]
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config["model"]["head"] == ["linear"]  # without being asked for

    def test_the_score_of_a_plain_network(self, run, tmp_path):
        directory = tmp_path / "run"
        _, out, _ = run(*TINY, "--epochs", "1", "--save-dir", directory, "--exits", "none")
        code, out, _ = run(*self.next_of(out)[2:])
        assert code == 0
        assert_names(out, "test", "final")


class TestEvaluate:
    def test_it_is_in_float32_unless_asked(self, run, joint, monkeypatch):
        asked = []
        monkeypatch.setattr(
            experiment, "setup",
            lambda config: asked.append(config.run.amp) or (torch.device("cpu"), "off"),
        )
        run("-e", "--resume", joint)
        run("-e", "--resume", joint, "--amp", "bf16")
        assert asked == ["off", "bf16"]

    def shown(self, out: str) -> dict[str, float]:
        """The accuracies printed, by exit."""
        rows = re.findall(r"\b(layer1|layer2|final)\b\D*?([\d.]+) ?%", out)
        return {name: float(percent) / 100 for name, percent in rows}

    def printed(self, bounds: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Bounds as they are printed: in hundredths of a percent."""
        return {name: (round(low, 4), round(high, 4)) for name, (low, high) in bounds.items()}

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_every_exit_of_a_run(self, run, joint, split):
        code, out, _ = run("-e", "--resume", joint, "--split", split)
        assert code == 0
        assert_names(out, split)
        assert_accuracy(self.shown(out), self.printed(slow_accuracy(joint, split)))

    def test_val_is_the_default(self, run, joint):
        assert run("-e", "--resume", joint) == run("-e", "--resume", joint, "--split", "val")

    def test_a_backbone_alone(self, run, plain):
        code, out, _ = run(*TINY, "-e", "--backbone", plain, "--exits", "none", "--split", "test")
        assert code == 0
        assert_accuracy(self.shown(out), self.printed(slow_accuracy(plain, "test")))

    def test_weights_that_may_have_seen_val_are_warned_of(self, run, plain, tmp_path, caplog):
        torch.save(checkpoint.load_backbone(plain)[0], tmp_path / "public.th")
        flags = (*TINY, "-e", "--exits", "none", "--backbone", tmp_path / "public.th")
        assert run(*flags)[0] == 0
        (warning,) = caplog.messages
        assert_names(warning, "val", "--split test")
        caplog.clear()
        assert run(*flags, "--split", "test")[0] == 0
        assert caplog.text == ""

    def test_weights_that_have_not_seen_val_are_not(self, run, joint, plain, caplog):
        assert run("-e", "--resume", joint)[0] == 0
        assert run(*TINY, "-e", "--exits", "none", "--backbone", plain)[0] == 0
        assert caplog.text == ""

    def test_it_trains_nothing_and_writes_nothing(self, run, joint):
        before = {path: path.stat().st_mtime_ns for path in joint.rglob("*")}
        run("-e", "--resume", joint)
        assert {path: path.stat().st_mtime_ns for path in joint.rglob("*")} == before

    def test_other_exits_than_the_runs_are_refused(self, refusal, joint):
        message = refusal("-e", "--resume", joint, "--exits", "layer1")
        assert "'heads.layer2" in message and "--exits" in message
