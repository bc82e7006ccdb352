"""Deployed models as they are written: the files, the manifest, the card, and what is refused."""

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, TASK, assert_names, folder_config, refusal, tiny_data, tiny_run

import early_exit
from early_exit import export, export_onnx
from early_exit.choosing.goals import FixedPolicy, FixedThresholds
from early_exit.data import folders
from early_exit.data.pixels import normalise
from early_exit.evaluation.evaluate import evaluate
from early_exit.evaluation.upgrade import read_report
from early_exit.inference.criteria import CRITERIA, declare
from early_exit.manifest import NAME, CentreCrop, ImageInput, Manifest

ONNX = ("--task", "helpers:TASK", "--eval", "mine", "--format", "onnx")


@pytest.fixture
def stored_models(deployed_model, monkeypatch):
    """Exports give the files of `deployed_model`, which takes no time."""
    models = [(deployed_model / f"segment{index}.onnx").read_bytes() for index in range(3)]
    monkeypatch.setattr(export_onnx, "export", lambda *_: models)


class TestFiles:
    def test_what_is_written(self, deployed_model):
        names = {path.name for path in deployed_model.iterdir()}
        assert names == {
            "README.md",
            "model.json",
            "policy.yaml",
            *(f"segment{index}.onnx" for index in range(3)),
        }
        for segment in Manifest.read(deployed_model).segments:
            content = (deployed_model / segment.file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == segment.sha256

    def test_the_manifest(self, evaluated_run, deployed_model):
        manifest = Manifest.read(deployed_model)
        own = early_exit.load(evaluated_run, "mine", task=TASK)
        report = read_report(evaluated_run / "eval" / "mine" / "report.json")
        assert manifest.classes == own.classes
        assert manifest.cost == own.cost
        assert (manifest.criterion, manifest.runtime) == ("max_prob", "onnxruntime")
        assert manifest.precision == "f32"
        assert manifest.traits.range() == (0.1, 1)
        assert [(one.first, one.last) for one in manifest.segments] == [(0, 0), (1, 1), (2, 2)]
        mean, std = (tuple(own.loaded.normalisation[name]) for name in ("mean", "std"))
        assert manifest.input == ImageInput(
            type="uint8", shape=(3, 16, 16), mean=mean, std=std, crop=None
        )
        assert manifest.check["images"] == 64
        assert manifest.check["largest_difference"] <= manifest.check["tolerance"]
        assert (manifest.check["compared_with"], manifest.check["images_of"]) == ("torch", "noise")
        assert manifest.check["from_float"] is None
        assert manifest.chosen_in == {"runtime": "torch", "precision": "float32"}
        assert manifest.test["accuracy"] == report["test"]["accuracy"]
        assert manifest.network["weights"] == own.loaded.weights
        assert {"torch", "numpy", "onnxruntime", "early-exit"} <= set(manifest.versions)
        point, row = manifest.val_curve[-1], report["curve"][-1]
        assert point == {
            "threshold": row["threshold"],
            **row["val"],
            "exit_shares": row["val_shares"],
        }
        assert manifest.val == {
            "thresholds": list(own.policy.thresholds),
            "temperatures": list(own.policy.temperatures),
            **report["val"],
            "exit_shares": report["val_shares"],
            "images": report["choice"]["val_images"],
        }
        assert len(manifest.val_curve) == len(report["curve"])

    def test_the_card(self, deployed_model):
        card = " ".join((deployed_model / "README.md").read_text().split())
        assert_names(card, "onnxruntime", "uint8", "pip install", "policy.yaml", "model.json", 64)
        assert "computed in float32 by onnxruntime, their logits differ" in card
        assert "report.json" not in card

    def test_no_file_names_a_directory_of_this_machine(self, evaluated_run, deployed_model):
        for file in deployed_model.iterdir():
            content = file.read_bytes()
            for directory in (evaluated_run.parent, Path(__file__).parent.parent):
                assert str(directory).encode() not in content, file


class TestRefusals:
    def write(self, run: Path, directory: Path, *flags: str) -> str:
        """The line in which an export ends; nothing is written."""
        message = refusal(export.main, [str(run), str(directory), *ONNX, *flags])
        assert not directory.exists() and not list(directory.parent.glob(".*"))
        return message

    def test_files_that_differ_from_torch(
        self, evaluated_run, tmp_path, stored_models, monkeypatch
    ):
        def other(images, *arguments):
            return 1.01 * normalise(images, *arguments)

        monkeypatch.setattr(export_onnx, "normalise", other)
        message = self.write(evaluated_run, tmp_path / "model")
        assert_names(message, "torch", "layer1")

    def test_an_incomplete_report(self, evaluated_copy, tmp_path):
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        del report["curve"]
        path.write_text(json.dumps(report))
        assert_names(self.write(evaluated_copy, tmp_path / "model"), "evaluate")

    def test_a_task_with_a_preparation_of_its_own(self, evaluated_run):
        def turned(_config, image):
            return image

        task = dataclasses.replace(TASK, prepare=turned)
        classifier = early_exit.load(evaluated_run, "mine", task=task)
        assert_names(refusal(export_onnx.describe_input, classifier, "uint8"), "turned")

    def test_a_kind_of_input_for_a_copy_of_the_run(self, evaluated_run, tmp_path):
        arguments = [str(evaluated_run), str(tmp_path / "copy"), "--input", "float"]
        assert_names(refusal(export.main, arguments), "--input", "onnx")


class TestRuntimeFor:
    @pytest.mark.parametrize(
        ("chosen", "precision", "deployed", "warned"),
        [
            ("torch", "float32", "onnxruntime", False),
            ("torch", "bfloat16", "onnxruntime", True),
            ("openvino", "float32", "openvino", False),
            ("openvino-bf16", "bfloat16", "openvino-bf16", False),
            ("onnxruntime-int8", "8-bit integers", "onnxruntime-int8", False),
            ("cudagraph", "float16", "onnxruntime", True),
        ],
    )
    def test_it_is_the_one_of_the_thresholds(self, caplog, chosen, precision, deployed, warned):
        assert export_onnx.runtime_for(chosen, precision) == deployed
        assert len(caplog.records) == warned

    @pytest.mark.parametrize(
        ("chosen", "reference"),
        [
            ("torch-bf16", "torch"),
            ("openvino-bf16", "torch"),
            ("openvino-int8", "openvino-int8"),
        ],
    )
    def test_integers_are_compared_with_themselves(self, chosen, reference):
        """And everything else with eager torch in float32."""
        report = {"environment": {"runtime": chosen}}
        assert export_onnx.reference_for(report) == reference

    @pytest.mark.parametrize(("precision", "kept"), [("float32", True), ("bfloat16", False)])
    def test_a_guarantee_is_of_the_precision_that_it_was_given_in(
        self, evaluated_copy, tmp_path, stored_models, precision, kept
    ):
        evaluation = evaluated_copy / "eval" / "mine"
        policy = early_exit.Policy.load(evaluation / "policy.yaml")
        dataclasses.replace(policy, guarantee={"risk": 0.1}).save(evaluation / "policy.yaml")
        report = json.loads((evaluation / "report.json").read_text())
        report["environment"] |= {"runtime": "torch", "precision": precision}
        report["guarantee"] = {"risk": 0.1}
        (evaluation / "report.json").write_text(json.dumps(report))
        export.main([str(evaluated_copy), str(tmp_path / "model"), *ONNX])
        card = (tmp_path / "model" / "README.md").read_text()
        assert ("The guarantee of the evaluation holds in bfloat16" in card) == (not kept)
        exported = early_exit.Policy.load(tmp_path / "model" / "policy.yaml")
        assert (exported.guarantee == {"risk": 0.1}) == kept
        assert exported.thresholds == policy.thresholds

    def test_it_is_in_the_manifest(self, evaluated_copy, tmp_path, stored_models):
        """And the files are checked in float32 by the same package."""
        pytest.importorskip("openvino")
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        report["environment"] |= {"runtime": "openvino-bf16", "precision": "bfloat16"}
        path.write_text(json.dumps(report))
        export.main([str(evaluated_copy), str(tmp_path / "model"), *ONNX])
        manifest = Manifest.read(tmp_path / "model")
        assert (manifest.runtime, manifest.precision) == ("openvino-bf16", "bf16")
        assert manifest.check["runtime"] == "openvino"
        assert manifest.chosen_in == {"runtime": "openvino-bf16", "precision": "bfloat16"}


class TestInput:
    def test_the_images_of_the_check_have_every_contrast(self):
        images = export_onnx.check_images((3, 8, 8))
        assert images.dtype == np.uint8 and images.shape == (64, 3, 8, 8)
        widths = np.ptp(images.reshape(64, -1).astype(int), axis=1)
        assert widths[0] == 0 and widths[-1] > 200
        assert np.array_equal(images, export_onnx.check_images((3, 8, 8)))

    def test_a_task_on_class_folders(self, evaluated_run):
        task = dataclasses.replace(TASK, prepare=folders.prepare)
        classifier = early_exit.load(evaluated_run, "mine", task=task)
        config = dataclasses.replace(classifier.loaded.config, data=folder_config("x"))
        loaded = dataclasses.replace(classifier.loaded, config=config)
        classifier = dataclasses.replace(classifier, loaded=loaded)
        found = export_onnx.describe_input(classifier, "uint8")
        assert found.crop == CentreCrop(resize=20, crop=16)
        image = folders_image()
        assert np.array_equal(found.read(image), classifier.read(image))

    def test_numpy_normalises_as_torch_does(self):
        """The same three operations in float32; a fused one may round once less."""
        images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        given = ImageInput(type="float32", shape=(3, 16, 16), mean=mean, std=std, crop=None)
        expected = normalise(torch.from_numpy(images), mean, std, torch.contiguous_format).numpy()
        found = given.array(images)
        assert found.dtype == np.float32
        # of the largest term in the difference, which is at most 255 / (255 * 0.224)
        assert np.abs(found - expected).max() <= 4 * np.finfo(np.float32).eps / 0.224
        bytes_in = dataclasses.replace(given, type="uint8")
        assert bytes_in.array(images) is images


def folders_image():
    """A picture of 40x30 pixels in which every pixel differs."""
    from PIL import Image

    rows, columns = np.mgrid[:30, :40]
    return Image.fromarray(np.stack([8 * rows, 6 * columns, rows + columns], -1).astype(np.uint8))


def write(directory: Path, run: Path, task, input_type: str = "uint8") -> Path:
    """Writes the run's evaluation `mine` as a deployed model."""
    classifier = early_exit.load(run, "mine", task=task, device="cpu")
    report = read_report(run / "eval" / "mine" / "report.json")
    directory.mkdir()
    export_onnx.write(directory, classifier, report, input_type)
    return directory


def assert_same_answers(deployed: Path, run: Path, task, files: list[Path]) -> None:
    """The same classes and exits as the run."""
    found = early_exit.load(deployed, threads=1)(files)
    expected = early_exit.load(run, "mine", task=task)(files)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.name, ours.exit, ours.macs) == (theirs.name, theirs.exit, theirs.macs)


@pytest.mark.slow
class TestKinds:
    """Models of other kinds are written, checked against torch and read."""

    @pytest.fixture(autouse=True)
    def packages(self):
        for package in ("onnxruntime", "onnxscript"):
            pytest.importorskip(package)

    def test_normalised_input(self, evaluated_run, photos, tmp_path, caplog):
        """And the exporter's own messages are not shown."""
        with caplog.at_level(logging.INFO):
            export.main([str(evaluated_run), str(tmp_path / "model"), *ONNX, "--input", "float"])
        assert {one.name.partition(".")[0] for one in caplog.records} <= {"early_exit"}
        assert Manifest.read(tmp_path / "model").input.type == "float32"
        files = sorted(photos.rglob("*.png"))
        assert_same_answers(tmp_path / "model", evaluated_run, TASK, files)

    def test_many_classes_with_unusual_names(self, photos, tmp_path):
        names = ("new\nline", "caf\udce9", "", "\u202eright", "'\"\\", "a/b", "🐱")
        names += tuple(f"class {number}" for number in range(len(names), 1000))

        def load_data(settings):
            return dataclasses.replace(tiny_data(settings), classes=names)

        task = dataclasses.replace(TASK, load_data=load_data)
        run = tiny_run(tmp_path / "run", task)
        evaluate(
            run, task, FixedThresholds((0.3,)), overrides=CPU, live=False, draw=False, name="mine"
        )
        deployed = write(tmp_path / "model", run, task)
        assert early_exit.load(deployed, threads=1).classes == names
        assert_same_answers(deployed, run, task, sorted(photos.rglob("*.png")))

    def evaluated_with(self, run: Path, criterion: str) -> None:
        """Evaluates the run as `mine` with a criterion whose scores are 1 or more often."""
        goal = FixedThresholds((1.0,), criterion=criterion, calibrate=False)
        evaluate(run, TASK, goal, overrides=CPU, live=False, draw=False, name="mine")

    def test_a_criterion_that_keeps_state(self, evaluated_copy, photos, tmp_path):
        self.evaluated_with(evaluated_copy, "patience")
        deployed = write(tmp_path / "model", evaluated_copy, TASK)
        assert_same_answers(deployed, evaluated_copy, TASK, sorted(photos.rglob("*.png")))

    def test_a_criterion_of_ones_own_is_in_the_files(
        self, evaluated_copy, photos, tmp_path, monkeypatch
    ):
        """They are read by a process that does not know it."""

        @declare(lowest=0.0, unit="the gap of the logits")
        def gap(logits, _state=None):
            best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
            return logits, best - second, None

        monkeypatch.setitem(CRITERIA, "gap", gap)
        self.evaluated_with(evaluated_copy, "gap")
        deployed = write(tmp_path / "model", evaluated_copy, TASK)
        files = sorted(photos.rglob("*.png"))
        expected = early_exit.load(evaluated_copy, "mine", task=TASK)(files)
        monkeypatch.delitem(CRITERIA, "gap")
        found = early_exit.load(deployed, threads=1)(files)
        assert [one.exit for one in found] == [one.exit for one in expected]
        assert_names(refusal(CRITERIA["gap"], None), "gap")
        CRITERIA["gap"] = gap  # for monkeypatch to remove

    def test_a_network_without_exits(self, photos, tmp_path):
        run = tiny_run(tmp_path / "run", TASK, exits=())
        evaluate(run, TASK, FixedThresholds(()), overrides=CPU, live=False, draw=False, name="mine")
        deployed = write(tmp_path / "model", run, TASK)
        assert len(Manifest.read(deployed).segments) == 1
        assert_same_answers(deployed, run, TASK, sorted(photos.rglob("*.png")))

    def test_a_disabled_exit_is_in_no_file(self, evaluated_copy, photos, tmp_path):
        evaluation = evaluated_copy / "eval" / "mine"
        policy = early_exit.Policy.load(evaluation / "policy.yaml")
        goal = FixedPolicy(dataclasses.replace(policy, enabled=(False, True)))
        shutil.rmtree(evaluation)
        evaluate(
            evaluated_copy, TASK, goal, overrides=CPU, live=False, draw=False, name=evaluation.name
        )
        deployed = write(tmp_path / "model", evaluated_copy, TASK)
        manifest = json.loads((deployed / NAME).read_text())
        assert [one["last"] for one in manifest["segments"]] == [1, 2]
        assert_same_answers(deployed, evaluated_copy, TASK, sorted(photos.rglob("*.png")))
