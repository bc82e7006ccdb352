"""Deployed models: the answers without torch, what may be changed, and what is refused."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import CPU, ROOT, SIDE, TASK, assert_names, finish, refusal
from PIL import Image

import early_exit
from early_exit import compare, deployed, export, predict
from early_exit.choosing.goals import MaxDrop
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference import criteria
from early_exit.inference.policy import Policy
from early_exit.manifest import NAME, Manifest

# Before anything else is imported: a process that has no torch.
NO_TORCH = """
import runpy, sys

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("torch", "torchvision"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Finder, sys.meta_path)
"""
WITHOUT_TORCH = f"""{NO_TORCH}
sys.argv[0] = "predict"
runpy.run_module("early_exit.predict", run_name="__main__", alter_sys=True)
"""
LOAD_NOTHING = f"""{NO_TORCH}
import early_exit
from early_exit.errors import UserError

for path in ("models/typo", "models/eval/typo"):
    try:
        early_exit.load(path)
    except UserError as error:
        print(error)
assert "torch" not in sys.modules
"""


def in_torch(run: Path, files: list[Path]) -> list[early_exit.prediction.Prediction]:
    """What the run itself predicts."""
    return early_exit.load(run, "mine", task=TASK, device="cpu")(files)


def assert_same(found: list, expected: list, model: Path) -> None:
    """The same predictions, but for the rounding of the confidence, which moves by at most twice as
    much as the logits; the manifest bounds that relative to the largest one, which is below 40."""
    slack = 2 * 40 * Manifest.read(model).check["tolerance"]
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.confidence == pytest.approx(theirs.confidence, abs=slack)
        assert dataclasses.replace(ours, confidence=theirs.confidence) == theirs


def as_predictions(lines: str) -> list[early_exit.prediction.Prediction]:
    """The predictions that predict printed as JSON."""
    values = [json.loads(line) for line in lines.splitlines()]
    return [
        early_exit.prediction.Prediction(
            one.pop("class"), **{name: value for name, value in one.items() if name != "image"}
        )
        for one in values
    ]


def process(command: list, **environment: str) -> subprocess.CompletedProcess:
    """A finished process on one thread, with these variables instead of the Python path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return finish(
        subprocess.Popen(
            list(map(str, command)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**kept, "OMP_NUM_THREADS": "1", **environment},
        )
    )


class TestAnswers:
    def test_without_torch_they_are_those_of_torch(self, evaluated_run, deployed_model, photos):
        files = sorted(photos.rglob("*.png"))
        command = [sys.executable, "-c", WITHOUT_TORCH, deployed_model, photos, "--json"]
        done = process([*command, "--threads", 1], PYTHONPATH=str(ROOT))
        assert (done.returncode, done.stderr) == (0, "")
        found = as_predictions(done.stdout)
        assert_same(found, in_torch(evaluated_run, files), deployed_model)
        assert len({one.exit for one in found}) > 1

    def test_without_torch_a_directory_that_is_not_there_is_named(self):
        done = process([sys.executable, "-c", LOAD_NOTHING], PYTHONPATH=str(ROOT))
        assert (done.returncode, done.stderr) == (0, "")
        first, second = done.stdout.splitlines()
        assert_names(first, "no run or deployed model", "models/typo")
        assert_names(second, "no run or deployed model", "models/eval/typo")

    def test_the_same_interface(self, evaluated_run, deployed_model, photos):
        classify = early_exit.load(deployed_model, threads=1)
        files = sorted(photos.rglob("*.png"))
        own = early_exit.load(evaluated_run, "mine", task=TASK)
        assert classify.classes == own.classes
        assert (classify.policy, classify.cost) == (own.policy, own.cost)
        images = [classify.read(file) for file in files]
        assert np.array_equal(images, [own.read(file) for file in files])
        for found in (classify(files, batch_size=3), classify([Image.open(f) for f in files])):
            assert_same(found, own(files), deployed_model)
        assert classify([]) == []

    @pytest.mark.slow
    def test_openvino(self, evaluated_run, deployed_model, photos):
        """Also with arrays whose rows are not contiguous, as `np.stack` gives them."""
        pytest.importorskip("openvino")
        classify = early_exit.load(deployed_model, runtime="openvino", threads=1)
        files = sorted(photos.rglob("*.png"))
        assert_same(classify(files), in_torch(evaluated_run, files), deployed_model)
        images = np.stack([classify.read(file) for file in files])
        strided = np.asfortranarray(images)
        assert not strided.flags.c_contiguous
        found, expected = classify.answer(strided), classify.answer(np.ascontiguousarray(images))
        assert np.array_equal(found.logits, expected.logits)

    def test_images_of_another_kind_are_refused(self, deployed_model):
        classify = early_exit.load(deployed_model, threads=1)
        for images in (
            np.zeros((2, 3, SIDE, SIDE), np.float32),
            np.zeros((2, 3, SIDE, SIDE + 1), np.uint8),
            np.zeros((0, 3, SIDE, SIDE), np.uint8),
        ):
            message = refusal(classify.answer, images)
            assert_names(message, images.dtype, "uint8", SIDE)

    @pytest.mark.slow
    def test_an_environment_without_torch(self, evaluated_run, deployed_model, photos, tmp_path):
        """A real one: numpy, Pillow, PyYAML, ONNX Runtime and this package, and no pip."""
        venv.create(tmp_path / "env", with_pip=False)
        (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
        for name in ("numpy", "PIL", "yaml", "onnxruntime"):
            package = Path(importlib.import_module(name).__file__).parent
            (site / name).symlink_to(package)
            for libraries in (f"{name}.libs", "pillow.libs"):
                if (package.parent / libraries).is_dir() and not (site / libraries).exists():
                    (site / libraries).symlink_to(package.parent / libraries)
        (site / "early_exit").symlink_to(ROOT / "early_exit")
        python = tmp_path / "env" / "bin" / "python"
        assert process([python, "-c", "import torch"]).returncode == 1
        done = process([python, "-m", "early_exit.predict", deployed_model, photos, "--json"])
        assert (done.returncode, done.stderr) == (0, "")
        expected = in_torch(evaluated_run, sorted(photos.rglob("*.png")))
        assert_same(as_predictions(done.stdout), expected, deployed_model)
        done = process([python, "-m", "early_exit.predict", evaluated_run, photos])
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert_names(done.stderr, "torchvision", "pip install")
        done = process([python, "-m", "early_exit.predict", tmp_path / "none", photos])
        assert done.returncode == 2 and "torch" not in done.stderr
        assert_names(done.stderr, tmp_path / "none")


def change(directory: Path, **values: object) -> Policy:
    """Changes entries of a deployed model's policy."""
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))
    return Policy.load(path)


class TestPolicy:
    def test_changed_thresholds_are_used(self, deployed_copy, photos):
        files = sorted(photos.rglob("*.png"))
        for thresholds, expected in (([0.1, 0.1], 0), ([float("inf")] * 2, 2)):
            change(deployed_copy, thresholds=thresholds)
            found = early_exit.load(deployed_copy, threads=1)(files)
            assert {one.exit_index for one in found} == {expected}

    def test_a_changed_temperature_changes_the_confidence(self, deployed_copy, photos):
        files = sorted(photos.rglob("*.png"))
        thresholds = [float("inf")] * 2
        change(deployed_copy, thresholds=thresholds, temperatures=[1.0, 1.0, 1e6])
        found = early_exit.load(deployed_copy, threads=1)(files)
        # all logits are about 0 after the division
        assert [one.confidence for one in found] == pytest.approx([0.1] * len(files), abs=1e-4)

    def test_a_changed_set_of_exits_is_refused(self, deployed_copy):
        change(deployed_copy, enabled=[False, True])
        message = refusal(early_exit.load, deployed_copy)
        assert_names(message, deployed_copy / "policy.yaml", "layer1", "layer2")

    def test_another_criterion_is_refused(self, deployed_copy):
        change(deployed_copy, criterion="margin")
        assert_names(refusal(early_exit.load, deployed_copy), "margin", "max_prob")

    def test_other_exits_are_refused(self, deployed_copy):
        change(deployed_copy, exit_names=["layer1", "layer3", "final"])
        assert_names(refusal(early_exit.load, deployed_copy), "layer2", "layer3")

    def test_a_threshold_out_of_range_is_refused(self, deployed_copy):
        change(deployed_copy, thresholds=[1.5, 0.5])
        assert_names(refusal(early_exit.load, deployed_copy), 1.5)


class TestFiles:
    def test_a_damaged_segment(self, deployed_copy):
        path = deployed_copy / "segment1.onnx"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert_names(refusal(early_exit.load, deployed_copy), path)

    @pytest.mark.parametrize("name", ["segment2.onnx", "policy.yaml"])
    def test_a_missing_file(self, deployed_copy, name):
        (deployed_copy / name).unlink()
        assert_names(refusal(early_exit.load, deployed_copy), deployed_copy / name)

    def test_an_incomplete_manifest(self, deployed_copy):
        path = deployed_copy / NAME
        path.write_text(path.read_text()[:300])
        assert_names(refusal(early_exit.load, deployed_copy), path)

    @pytest.mark.parametrize(
        "change",
        [
            {"format": "two"},
            {"classes": []},
            {"segments": []},
            {"segments": [{"file": "../x.onnx", "sha256": "", "first": 0, "last": 2}]},
            {"segments": [{"file": "..", "sha256": "", "first": 0, "last": 2}]},
            {"input": {"type": "uint8"}},
            {"cost": None},
            {"traits": {"of": "somebody"}},
            {"unknown": 1},
            {"runtime": ["onnxruntime"]},
            {"runtime": "onnxruntime-int8"},
            {"criterion": {}},
        ],
        ids=str,
    )
    def test_something_else_as_manifest(self, deployed_copy, change):
        path = deployed_copy / NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert_names(refusal(early_exit.load, deployed_copy), path)

    @pytest.mark.parametrize("text", ["[]", "1", "{}"])
    def test_no_manifest(self, deployed_copy, text):
        (deployed_copy / NAME).write_text(text)
        assert_names(refusal(early_exit.load, deployed_copy), deployed_copy / NAME)

    def test_a_newer_format(self, deployed_copy):
        path = deployed_copy / NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
        assert_names(refusal(early_exit.load, deployed_copy), path, 2, 1)

    def test_the_manifest_is_read_as_it_was_written(self, deployed_model):
        manifest = Manifest.read(deployed_model)
        assert manifest.to_json() == (deployed_model / NAME).read_text()


class TestRuntime:
    """Which runtime is used, whatever is installed here."""

    @pytest.fixture
    def chosen(self, monkeypatch):
        """A function that gives the runtime that is used, from the packages that are installed."""

        def chosen(*installed: str, own: str = "onnxruntime", wanted: str | None = None) -> str:
            monkeypatch.setattr(deployed, "_is_installed", lambda package: package in installed)
            return deployed.choose_runtime(own, wanted)

        return chosen

    def test_the_models_own(self, chosen, caplog):
        assert chosen("onnxruntime", "openvino") == "onnxruntime"
        assert chosen("onnxruntime", "openvino", own="openvino") == "openvino"
        assert chosen("openvino", own="openvino-bf16") == "openvino-bf16"
        assert caplog.records == []

    def test_another_of_the_same_precision_is_logged(self, chosen, caplog):
        assert chosen("openvino") == "openvino"
        assert chosen("onnxruntime", own="openvino") == "onnxruntime"
        assert len(caplog.records) == 2
        assert_names(caplog.messages[0], "onnxruntime", "openvino")

    @pytest.mark.parametrize(
        ("installed", "own", "wanted", "package"),
        [
            ([], "onnxruntime", None, "onnxruntime"),
            (["onnxruntime"], "openvino-bf16", None, "openvino"),
            (["openvino"], "openvino", "onnxruntime", "onnxruntime"),
            (["onnxruntime"], "openvino-int8", None, "openvino"),
            (["openvino"], "onnxruntime-int8", None, "onnxruntime"),
        ],
    )
    def test_a_missing_package_is_named(self, chosen, installed, own, wanted, package):
        message = refusal(chosen, *installed, own=own, wanted=wanted)
        assert_names(message, f"pip install {package}")

    def test_the_one_that_is_asked_for(self, chosen, caplog):
        assert chosen("onnxruntime", "openvino", wanted="openvino") == "openvino"
        assert caplog.records == []
        assert chosen("openvino", wanted="openvino-bf16") == "openvino-bf16"
        (message,) = caplog.messages
        assert_names(message, "bf16", "f32")

    @pytest.mark.parametrize("own", ["onnxruntime-int8", "openvino-int8"])
    def test_integers_run_in_their_own_runtime(self, chosen, caplog, own):
        assert chosen("onnxruntime", "openvino", own=own) == own
        assert chosen("onnxruntime", "openvino", own=own, wanted=own) == own
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("own", "wanted"),
        [
            ("onnxruntime-int8", "openvino-int8"),
            ("openvino-int8", "onnxruntime-int8"),
            ("onnxruntime-int8", "onnxruntime"),
            ("openvino-int8", "openvino-bf16"),
            ("openvino", "openvino-int8"),
        ],
    )
    def test_another_one_is_refused_for_integers(self, chosen, own, wanted):
        message = refusal(chosen, "onnxruntime", "openvino", own=own, wanted=wanted)
        assert_names(message, own, wanted, "--runtime", "export")

    def test_an_unknown_one(self, chosen):
        assert_names(refusal(chosen, wanted="tensorrt"), "'tensorrt'", "onnxruntime")
        assert_names(refusal(chosen, own="onnxruntime-int4"), "'onnxruntime-int4'")

    def test_a_number_of_threads_below_one(self, deployed_model):
        assert_names(refusal(early_exit.load, deployed_model, threads=0), "threads", 0, 1)


class TestArguments:
    """What has no effect is refused."""

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("evaluation", "mine"),
            ("task", "helpers:TASK"),
            ("overrides", {"run": {}}),
            ("device", "cuda"),
        ],
    )
    def test_of_runs(self, deployed_model, argument, value):
        message = refusal(early_exit.load, deployed_model, **{argument: value})
        assert_names(message, deployed_model, "cuda" if argument == "device" else argument)

    def test_of_deployed_models(self, evaluated_run):
        message = refusal(early_exit.load, evaluated_run, threads=1)
        assert_names(message, evaluated_run, "threads")

    @pytest.mark.parametrize(
        "flags",
        [
            ("--eval", "mine"),
            ("--task", "helpers:TASK"),
            ("--data", "digits"),
            ("--device", "cuda"),
            ("--amp", "bf16"),
            ("--compile",),
            ("--no-channels-last",),
            ("--threads", "many"),
            ("--threads", "0"),
        ],
        ids=" ".join,
    )
    def test_of_predict(self, deployed_model, flags):
        message = refusal(predict.main, [str(deployed_model), "x.png", *flags])
        if flags[0] not in ("--device", "--threads"):
            assert_names(message, flags[0], deployed_model)

    def test_an_unknown_runtime_for_a_run(self, evaluated_run):
        task = ("--task", "helpers:TASK")
        arguments = [str(evaluated_run), "x.png", *task, "--runtime", "onnxrun"]
        assert_names(refusal(predict.main, arguments), "'onnxrun'", "onnxruntime")

    @pytest.mark.parametrize("flags", [("--amp", "bf16"), ("--compile",)], ids=" ".join)
    def test_a_runtime_for_a_run_and_flags_that_its_name_says(self, evaluated_run, flags):
        arguments = [str(evaluated_run), "x.png", "--task", "helpers:TASK", *flags]
        message = refusal(predict.main, [*arguments, "--runtime", "onnxruntime"])
        assert_names(message, flags[0], "--runtime")


class TestOtherPrograms:
    """They say what a deployed model is."""

    def test_evaluation(self, deployed_copy):
        before = sorted(deployed_copy.iterdir())
        message = refusal(evaluate, deployed_copy, TASK, MaxDrop(0.01), overrides=CPU)
        assert_names(message, deployed_copy, "deployed model")
        assert sorted(deployed_copy.iterdir()) == before

    def test_export(self, deployed_model, tmp_path):
        message = refusal(export.main, [str(deployed_model), str(tmp_path / "copy")])
        assert_names(message, deployed_model, "deployed model")
        assert not (tmp_path / "copy").exists()

    def test_comparison(self, deployed_model):
        message = refusal(compare.main, [str(deployed_model)])
        assert_names(message, deployed_model, "deployed model")


def test_the_table_is_that_of_a_run(deployed_model, evaluated_run, photos, capsys):
    predict.main([str(deployed_model), str(photos), "--threads", "1"])
    ours = capsys.readouterr().out
    predict.main([str(evaluated_run), str(photos), "--eval", "mine", "--task", "helpers:TASK"])
    theirs = capsys.readouterr().out

    def words(table: str) -> list[list[str]]:
        """Without the column of the confidence, which rounds to a tenth of a percent."""
        first, *rows, last = [line.split() for line in table.splitlines()]
        return [first, *(row[:1] + row[3:] for row in rows), last]

    assert words(ours) == words(theirs)


def test_two_models_of_one_unknown_criterion_have_ranges_of_their_own(monkeypatch):
    """With more classes a score may be higher."""
    known = dict(criteria.CRITERIA)
    monkeypatch.setattr(deployed, "CRITERIA", known)
    monkeypatch.setattr(criteria, "CRITERIA", known)
    monkeypatch.setattr(deployed, "_declared", set())
    for highest in (1.0, 9.0):
        traits = criteria.Traits(lowest=0.0, highest=highest)
        deployed._declare_criterion(SimpleNamespace(criterion="own", traits=traits))
        assert criteria.get_traits("own") == traits
    own = known["max_prob"]
    deployed._declare_criterion(SimpleNamespace(criterion="max_prob", traits=traits))
    assert known["max_prob"] is own
