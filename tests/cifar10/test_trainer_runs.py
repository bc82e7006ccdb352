"""The run directories and regimes of the CIFAR trainer."""

import importlib.metadata
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    TASK,
    TINY,
    accuracy_bounds,
    assert_accuracy,
    assert_names,
    few_digits,
    read_journal,
    tiny_network,
    train_tiny,
)

from cifar10 import trainer
from early_exit import config as configs
from early_exit.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from early_exit.training import checkpoint
from early_exit.training import train as training


class TestRunDirectory:
    def test_its_files(self, joint):
        assert {path.name for path in joint.iterdir()} == {
            ".lock",
            "checkpoint.pt",
            "checkpoint-previous.pt",
            "config.yaml",
            "metrics.jsonl",
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
        assert {
            "python",
            "torch",
            "torchvision",
            "numpy",
            "git",
            "device",
            "processes",
            "precision",
            "command",
        } == set(versions)
        assert versions["precision"] == "off"

    def test_journal_has_a_record_an_epoch_with_every_exit(self, joint):
        records = read_journal(joint)
        assert [(r["phase"], r["epoch"]) for r in records] == [("joint", 0), ("joint", 1)]
        for record in records:
            assert list(record["val_top1"]) == ["layer1", "layer2", "final"]
            assert list(record["train_top1"]) == ["layer1", "layer2", "final"]
            assert math.isfinite(record["train_loss"]) and math.isfinite(record["val_loss"])
            assert record["images_per_second"] > 0
            assert record["peak_memory"] > 2**20

    def test_journals_last_accuracy_is_the_checkpoints(self, joint):
        assert_accuracy(read_journal(joint)[-1]["val_top1"], accuracy_bounds(joint, "val"))

    def test_training_learns(self, joint):
        first, last = read_journal(joint)
        assert last["train_loss"] < first["train_loss"]

    def test_checkpoint_says_what_evaluation_needs(self, joint):
        saved = checkpoint.load(joint)
        assert saved["exit_names"] == ["layer1", "layer2", "final"]
        assert saved["classes"] == list("0123456789")
        assert saved["val_hash"] == saved["unseen_val"] == few_digits(0).val_hash
        assert saved["normalisation"] == {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
        assert saved["position"] == {"phase": 1, "epoch": 0, "step": 0}

    def test_save_every_keeps_to_its_epochs_and_the_last(self, monkeypatch, tmp_path):
        positions, save = [], checkpoint.save

        def noted(directory, state):
            positions.append((state["position"]["phase"], state["position"]["epoch"]))
            save(directory, state)

        monkeypatch.setattr(checkpoint, "save", noted)
        train_tiny(tmp_path / "run", "--epochs", "5", "-b", "48", "--save-every", "2")
        assert positions == [(0, 2), (0, 4), (1, 0)]

    def test_tensorboard_files_hold_every_exit(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train_tiny(tmp_path / "run", "--epochs", "1", "--tensorboard")
        found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        found.Reload()
        (event,) = found.Scalars("val_top1/layer2")
        assert event.value == pytest.approx(read_journal(tmp_path / "run")[0]["val_top1"]["layer2"])

    def test_a_training_goes_on_without_tensorboard_if_that_fails(
        self, tmp_path, monkeypatch, caplog
    ):
        from torch.utils.tensorboard import SummaryWriter

        monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *_: 1 / 0)
        train_tiny(tmp_path / "run", "--epochs", "2", "--tensorboard")
        assert len(read_journal(tmp_path / "run")) == 2
        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert len(warnings) == 1 and "\n" not in warnings[0].getMessage()

    def test_without_the_flag_there_is_no_tensorboard(self, joint):
        assert not (joint / "tensorboard").exists()

    def test_start_epoch_begins_there(self, tmp_path):
        train_tiny(tmp_path / "run", "--start-epoch", "1")
        assert [record["epoch"] for record in read_journal(tmp_path / "run")] == [1]

    def test_the_same_seed_trains_the_same_weights(self, joint, tmp_path):
        again = checkpoint.load(train_tiny(tmp_path / "run"))["network"]
        for name, value in checkpoint.load(joint)["network"].items():
            assert torch.equal(value, again[name]), name

    def test_another_seed_trains_others(self, joint, tmp_path):
        other = checkpoint.load(train_tiny(tmp_path / "run", "--seed", "1"))["network"]
        name = "backbone.conv1.weight"
        assert not torch.equal(checkpoint.load(joint)["network"][name], other[name])

    def test_digits_of_a_preset_are_the_digits_of_the_flag(self, joint, tmp_path):
        preset = tmp_path / "preset.yaml"
        preset.write_text("data: {dataset: digits}\n")
        train_tiny(tmp_path / "run", "--config", preset)
        flags = TINY[2:]  # without --dataset digits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "TASK", TASK)
            trainer.main([*flags, "--config", str(preset), "--save-dir", str(tmp_path / "other")])
        texts = [(tmp_path / name / "config.yaml").read_text() for name in ("run", "other")]
        assert texts[0] == texts[1]


class TestRegimes:
    def test_two_phases_with_their_own_epochs_and_rates(self, tmp_path):
        train_tiny(
            tmp_path / "run",
            "--regime",
            "mixed",
            "--epochs",
            "2",
            "--backbone-epochs",
            "1",
            "--lr",
            "0.01",
            "--backbone-lr",
            "0.02",
            "--schedule",
            "step",
        )
        records = read_journal(tmp_path / "run")
        assert [(r["phase"], r["phase_index"], r["epoch"], r["epochs"]) for r in records] == [
            ("backbone", 0, 0, 1),
            ("joint", 1, 0, 2),
            ("joint", 1, 1, 2),
        ]
        # at the last step of each epoch: both milestones passed, none, both
        assert [r["lr"] for r in records] == pytest.approx([0.0002, 0.01, 0.0001])
        assert [list(r["val_top1"]) for r in records] == [
            ["final"],
            ["layer1", "layer2", "final"],
            ["layer1", "layer2", "final"],
        ]

    def test_the_first_phase_does_not_train_the_heads(self, tmp_path):
        train_tiny(tmp_path / "run", "--regime", "mixed", "--epochs", "1", "--backbone-epochs", "1")
        before = checkpoint.load(tmp_path / "run" / checkpoint.PREVIOUS)["network"]
        after = checkpoint.load(tmp_path / "run")["network"]
        torch.manual_seed(0)
        config = Config(model=ModelConfig(exits=("layer1", "layer2")))
        untrained = tiny_network(config, 10).state_dict()
        heads = [name for name in after if name.startswith("heads.")]
        assert all(torch.equal(before[name], untrained[name]) for name in heads)
        assert not all(torch.equal(after[name], untrained[name]) for name in heads)

    def test_a_given_backbone_skips_the_first_phase(self, plain, tmp_path):
        train_tiny(tmp_path / "run", "--regime", "mixed", "--epochs", "1", "--backbone", plain)
        assert [record["phase"] for record in read_journal(tmp_path / "run")] == ["joint"]

    @pytest.fixture(scope="class")
    @classmethod
    def frozen(cls, plain, tmp_path_factory) -> Path:
        """A frozen run of two epochs on the plain run's backbone."""
        flags = ("--regime", "frozen", "--backbone", plain)
        return train_tiny(tmp_path_factory.mktemp("frozen") / "run", *flags)

    def test_frozen_changes_no_number_of_the_backbone(self, plain, frozen):
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
        final = read_journal(frozen)[-1]["val_top1"]["final"]
        assert_accuracy({"final": final}, accuracy_bounds(plain, "val"))

    def test_a_backbone_of_the_same_split_leaves_val_unseen(self, frozen):
        assert checkpoint.load(frozen)["unseen_val"] == few_digits(0).val_hash

    def test_a_backbone_of_another_split_has_seen_val(self, plain, tmp_path):
        flags = ("--regime", "frozen", "--epochs", "1", "--backbone", plain, "--split-seed", "1")
        train_tiny(tmp_path / "run", *flags)
        saved = checkpoint.load(tmp_path / "run")
        assert saved["unseen_val"] is None
        assert saved["val_hash"] == few_digits(1).val_hash

    def test_a_backbone_from_elsewhere_may_have_seen_val(self, plain, tmp_path):
        weights, _ = checkpoint.load_backbone(plain, {})
        torch.save(
            {"state_dict": {f"module.{n}": v for n, v in weights.items()}}, tmp_path / "public.th"
        )
        flags = ("--regime", "mixed", "--epochs", "1", "--backbone", tmp_path / "public.th")
        train_tiny(tmp_path / "run", *flags)
        assert checkpoint.load(tmp_path / "run")["unseen_val"] is None
