"""The exported copy of a run, and its card."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CPU, TASK, assert_names, few_digits, refusal, tiny_run

from early_exit import export
from early_exit.card import card
from early_exit.choosing.goals import Budget, ConditionalDeepLearning, FixedThresholds, MaxDrop
from early_exit.classifier import load
from early_exit.config import OptimConfig
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.policy import Policy
from early_exit.output import prepare_output
from early_exit.training import checkpoint


def export_copy(run: Path, directory: Path, *arguments: str) -> Path:
    """Exports a run on the command line; returns the directory of the copy."""
    export.main([str(run), str(directory), "--task", "helpers:TASK", *arguments])
    return directory


class TestExport:
    @pytest.fixture
    def exported(self, evaluated_run, tmp_path) -> Path:
        """An exported copy."""
        texts = ("--licence", "MIT", "--source", "Digits are everybody's.")
        return export_copy(evaluated_run, tmp_path / "exported", "--eval", "mine", *texts)

    def test_it_gives_the_same_answers(self, evaluated_run, exported, photos):
        files = sorted(photos.rglob("*.png"))
        assert load(exported, task=TASK)(files) == load(evaluated_run, "mine", task=TASK)(files)

    def test_it_lacks_what_only_training_needs(self, evaluated_run, exported):
        state = checkpoint.load(exported)
        assert not {"optimizer", "scaler", "tally", "average"} & set(state)
        assert state["rounded_to"] is None
        names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
        assert names == {
            "README.md",
            "config.json",
            "model.safetensors",
            "eval/mine/policy.yaml",
            "eval/mine/report.json",
        }

    def test_an_export_of_before_is_loaded_and_exported_too(
        self, evaluated_run, exported, tmp_path
    ):
        """It had everything in a file of torch.save."""
        old = tmp_path / "old"
        shutil.copytree(exported / "eval", old / "eval")
        state = export.slim(checkpoint.load(evaluated_run))
        del state["rounded_to"]
        torch.save(state, old / checkpoint.NAME)
        assert load(old, task=TASK).loaded.weights == load(exported, task=TASK).loaded.weights
        export_copy(old, tmp_path / "new")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "new" / name).read_bytes() == (exported / name).read_bytes()

    def test_its_backbone_is_loaded_as_that_of_a_run(self, evaluated_run, exported):
        classifier = load(evaluated_run, "mine", task=TASK, device="cpu")
        own = classifier.loaded.network.backbone.state_dict()
        for path in (exported, exported / "model.safetensors"):
            found, meta = checkpoint.load_backbone(path, own)
            assert own.keys() == found.keys()
            assert all(torch.equal(found[name], own[name]) for name in own)
            # the file alone does not say which images its weights have seen
            seen = checkpoint.load(evaluated_run)["unseen_val"] if path.is_dir() else None
            assert meta.get("unseen_val") == seen

    def test_other_outputs_are_not_written_into_it(self, evaluated_run, exported):
        assert_names(refusal(prepare_output, evaluated_run, exported), exported, "--out")

    def test_a_damaged_copy_is_named(self, exported):
        path = exported / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert_names(refusal(load, exported, task=TASK), path)

    def test_names_of_classes_are_no_markdown(self, tmp_path):
        classes = ("__ape__", "<unk>", *"23456789")
        task = dataclasses.replace(
            TASK, load_data=lambda _: dataclasses.replace(few_digits(0), classes=classes)
        )
        run = tiny_run(tmp_path / "run", task)
        evaluate(run, task, Budget(0.8), overrides=CPU, live=False, draw=False, name="mine")
        classifier = load(run, task=task)
        report = json.loads((run / "eval" / "mine" / "report.json").read_text())
        text = card(report, classifier, "", "mit", "", [])
        assert "10 classes (\\_\\_ape\\_\\_, &lt;unk&gt;, 2, 3," in text

    def test_the_running_average_is_what_is_exported(self, evaluated_copy, tmp_path):
        state = checkpoint.load(evaluated_copy)
        state["average"] = {name: value + 1 for name, value in state["network"].items()}
        slim = export.slim(state)
        assert torch.equal(
            slim["network"]["backbone.linear.bias"], state["network"]["backbone.linear.bias"] + 1
        )

    def test_a_run_with_a_running_average(self, photos, tmp_path):
        optim = OptimConfig(epochs=1, batch_size=8, lr=0.05, ema=0.9)
        averaged = tiny_run(tmp_path / "run", TASK, optim)
        evaluate(averaged, TASK, Budget(0.8), overrides=CPU, live=False, draw=False, name="mine")
        export_copy(averaged, tmp_path / "exported")
        files = sorted(photos.rglob("*.png"))
        assert load(tmp_path / "exported", task=TASK)(files) == load(averaged, task=TASK)(files)
        exported, own = (
            load(path, task=TASK, device="cpu").loaded for path in (tmp_path / "exported", averaged)
        )
        average = checkpoint.load(averaged)["average"]
        assert exported.weights == own.weights
        for name, value in exported.network.state_dict().items():
            assert torch.equal(value, average[name]), name

    @pytest.mark.parametrize(
        "change",
        [{"thresholds": (0.5,) * 2}, {"enabled": (False, True)}, {"temperatures": (1.5,) * 3}],
    )
    def test_a_policy_that_its_report_is_not_of(self, evaluated_copy, tmp_path, change):
        """The card would state what another policy gave."""
        path = evaluated_copy / "eval" / "mine" / "policy.yaml"
        dataclasses.replace(Policy.load(path), **change).save(path)
        new = tmp_path / "new"
        message = refusal(export_copy, evaluated_copy, new, "--eval", "mine")
        assert_names(message, path, "--policy", evaluated_copy)
        assert not new.exists()

    @pytest.mark.parametrize(
        ("command", "shortened"),
        [
            ("trainer.py --data /home/alice/x", "trainer.py --data x"),
            ("trainer.py --data=/home/alice/x", "trainer.py --data=x"),
            ("trainer.py --set data.root=/home/alice/x/", "trainer.py --set data.root=x"),
            ("'/home/a b/trainer.py' --data='/home/a b/c d'", "trainer.py '--data=c d'"),
            ("/home/a=b/trainer.py --lr=0.1 -- sub/x", "trainer.py --lr=0.1 -- sub/x"),
            ("trainer.py --save-dir ../../runs/x --data=../d", "trainer.py --save-dir x --data=d"),
        ],
    )
    def test_absolute_paths_in_a_command_are_shortened(self, command, shortened):
        assert export.without_directories(shlex.split(command)) == shortened

    @pytest.mark.parametrize(
        ("resumed", "said"),
        [
            (["t.py --epochs 9 --resume auto"], "Training command: `python t.py --epochs 9`."),
            (["t.py --epochs 9 --resume=auto"], "Training command: `python t.py --epochs 9`."),
            (
                ["t.py --epochs 9 --resume auto", "t.py --resume x --epochs 7"],
                "Training command: `python t.py --epochs 9`. Resumed with other flags: `python t.py"
                " --epochs 7`.",
            ),
        ],
    )
    def test_flags_with_which_it_was_resumed_are_part_of_how_it_was_trained(
        self, tmp_path, resumed, said
    ):
        commands = [{"command": line.split()} for line in ("t.py --epochs 9", *resumed)]
        versions = {**commands[0], "resumed": commands[1:]}
        (tmp_path / "versions.json").write_text(json.dumps(versions))
        assert export.training_sentence(tmp_path) == said

    def test_paths_of_this_machine_are_removed(self, evaluated_copy, tmp_path):
        state = checkpoint.load(evaluated_copy)
        state["config"]["data"]["root"] = "/home/somebody/data"
        state["config"]["model"]["backbone"] = "/home/somebody/resnet.th"
        state["config"]["loss"]["teacher"] = "/home/somebody/runs/teacher"
        config = export.slim(state)["config"]
        assert config["data"]["root"] is None
        assert config["model"]["backbone"] == "resnet.th"
        assert config["loss"]["teacher"] == "teacher"

    def test_the_card(self, evaluated_run, exported):
        card = " ".join((exported / "README.md").read_text().split())
        report = json.loads((evaluated_run / "eval" / "mine" / "report.json").read_text())
        for accuracy in (report["test"]["accuracy"], report["final_accuracy"]):
            assert_names(card, f"{100 * accuracy:.2f} %")
        assert_names(card, "MIT")
        assert "Digits are everybody's." in card
        assert_names(card, 10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9")

    @pytest.mark.parametrize(
        ("goal", "fitted"),
        [
            (MaxDrop(0.005), ("thresholds", "temperatures")),
            (FixedThresholds((0.5,)), ("temperatures",)),
            (FixedThresholds((0.5,), calibrate=False), ()),
            (ConditionalDeepLearning(0.9), ("stages",)),
        ],
        ids=str,
    )
    def test_the_card_tells_what_was_fitted(self, evaluated_copy, tmp_path, goal, fitted):
        shutil.rmtree(evaluated_copy / "eval")
        evaluate(evaluated_copy, TASK, goal, overrides=CPU, live=False, draw=False)
        export_copy(evaluated_copy, tmp_path / "exported")
        card = " ".join((tmp_path / "exported" / "README.md").read_text().split())
        (before,) = re.findall(r"([^.]*)\b40 val images", card)  # the sentence up to them
        words = set(re.findall("thresholds|temperatures|stages", before.lower()))
        assert words == set(fitted)

    def test_no_file_names_a_directory_of_this_machine(self, evaluated_copy, tmp_path):
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        report["environment"]["command"] = (
            f"python {tmp_path}/eval.py {evaluated_copy} --data {tmp_path}/data"
        )
        path.write_text(json.dumps(report))
        export_copy(evaluated_copy, tmp_path / "exported", "--eval", "mine")
        for file in (tmp_path / "exported").rglob("*"):
            assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
        assert "`python eval.py copy --data data`" in " ".join(
            (tmp_path / "exported" / "README.md").read_text().split()
        )

    def test_an_incomplete_report_is_named(self, evaluated_copy, tmp_path):
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        del report["choice"]["calibrated"]
        path.write_text(json.dumps(report))
        message = refusal(export_copy, evaluated_copy, tmp_path / "exported", "--eval", "mine")
        assert_names(message, path)
        assert not (tmp_path / "exported").exists()

    def test_an_existing_directory_is_refused(self, evaluated_run, tmp_path):
        (tmp_path / "there").mkdir()
        assert_names(refusal(export_copy, evaluated_run, tmp_path / "there"), tmp_path / "there")
        assert list((tmp_path / "there").iterdir()) == []
