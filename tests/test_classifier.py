"""Classifying images from Python: the answers, and which runs can be loaded."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, ROOT, SIDE, TASK, Engine, assert_names, few_digits, refusal
from PIL import Image

from cifar10 import data
from early_exit import classifier, export, predict
from early_exit.choosing.record import ExitRecord
from early_exit.classifier import load, reported_test
from early_exit.config import DataConfig
from early_exit.errors import DataError
from early_exit.inference.infer import Answers, infer
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.task import TASKS
from early_exit.trained import calibration_of, load_run
from early_exit.training import checkpoint


class TestFromPython:
    def test_it_gives_the_answers_of_inference(self, evaluated_run, photos):
        classify = load(evaluated_run, "mine", task=TASK, device="cpu")
        files = [photos / "ab"[index % 2] / f"{index}.png" for index in range(7)]
        data = TASK.load_data(DataConfig(dataset="digits"))
        images = data.normalise(data.splits["test"].images[:7])
        policy = Policy.load(evaluated_run / "eval" / "mine" / "policy.yaml")
        parts = [infer(classify.loaded.network, part, policy) for part in images.split(3)]
        expected = Answers(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("logits", "exit_index", "score")
            )
        )
        found = classify(files, batch_size=3)
        assert [one.class_index for one in found] == expected.classes.tolist()
        assert [one.exit_index for one in found] == expected.exit_index.tolist()
        assert len({one.exit for one in found}) > 1  # or the order would show nothing
        confidence = expected.logits.softmax(dim=-1).amax(dim=-1).tolist()
        # some thousand products on a path from the image to a logit, each rounded
        rounding = 3000 * torch.finfo(torch.float32).eps
        assert [one.confidence for one in found] == pytest.approx(confidence, abs=rounding)
        for one in found:
            assert one.name == data.classes[one.class_index]
            assert one.macs == classify.cost.cumulative()[one.exit_index]
            assert one.macs_share == pytest.approx(one.macs / classify.cost.plain_macs)

    def test_paths_and_pil_images_give_the_same(self, evaluated_run, photos):
        classify = load(evaluated_run, "mine", task=TASK)
        path = photos / "a" / "0.png"
        assert classify([Image.open(path)]) == classify([path]) == classify([str(path)])

    def test_what_are_not_the_bytes_of_its_size_is_refused(self, evaluated_run):
        """Otherwise normalised images would be normalised again, and answered in earnest."""
        classify = load(evaluated_run, "mine", task=TASK)
        images = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
        exits = classify.answer(images).exit_index
        assert len(exits) == 2 and torch.equal(classify.answer(images.numpy()).exit_index, exits)
        mirrored = images.numpy()[:, ::-1]  # a view with a negative stride, as of BGR images
        assert len(classify.answer(mirrored).exit_index) == 2
        for wrong in (images.float(), images[..., 1:], images[:0], images[0]):
            kind = str(wrong.dtype).removeprefix("torch.")
            assert_names(refusal(classify.answer, wrong), kind, tuple(wrong.shape), SIDE, "uint8")

    def test_of_a_cut_test_set_only_the_test_half_is_left(self):
        data = few_digits(0)
        held_out = {"choice": {"val_from": "held out from train"}}
        assert reported_test(data, held_out) is data
        report = {"choice": {"val_from": "half of the official test set, cut by seed 3"}}
        assert reported_test(data, report).digest("test") == data.cut_test(3).digest("test")
        assert_names(refusal(reported_test, data, {"choice": {"val_from": "?"}}), "half", "?")
        report["choice"]["left_out"] = ["val/ape/0.JPEG"]  # the halves were cut without it
        assert_names(refusal(reported_test, data, report), "unreadable")

    def test_one_image_is_not_a_sequence(self, evaluated_run, photos):
        classify = load(evaluated_run, "mine", task=TASK)
        path = photos / "a" / "0.png"
        for one in (path, str(path), path.read_bytes(), Image.open(path)):
            message = refusal(classify, one)
            assert_names(message, type(one).__name__, "list")
            assert len(message) < 200

    def test_a_batch_has_an_image(self, evaluated_run, photos):
        classify = load(evaluated_run, "mine", task=TASK)
        for size in (0, -1):
            message = refusal(classify, [photos / "a" / "0.png"], batch_size=size)
            assert_names(message, "batch_size", size)

    def test_threads_are_set_before_anything_is_built(self, evaluated_run, monkeypatch):
        """torch.compile would compile again if they changed afterwards."""
        seen = []
        build = classifier._in_runtime
        monkeypatch.setattr(
            classifier,
            "_in_runtime",
            lambda *args: (seen.append(torch.get_num_threads()), build(*args))[1],
        )
        before = torch.get_num_threads()
        try:
            load(evaluated_run, "mine", task=TASK, overrides={"run": {"threads": before + 1}})
        finally:
            torch.set_num_threads(before)
        assert seen == [before + 1]

    def test_a_disabled_exit_costs_nothing(self, evaluated_copy):
        path = evaluated_copy / "eval" / "mine" / "policy.yaml"
        policy = dataclasses.replace(Policy.load(path), enabled=(False, True))
        policy.save(path)
        classify = load(evaluated_copy, "mine", task=TASK)
        found = classify([Image.new("RGB", (20, 20))])[0]
        assert found.macs == classify.cost.cumulative((False, True))[found.exit_index]

    def test_an_image_of_another_shape_is_cropped_and_resized(self, evaluated_run):
        """White bars to the left and right of a square are cropped."""
        classify = load(evaluated_run, task=TASK)
        picture = Image.new("RGB", (80, 40), "white")
        picture.paste(Image.new("RGB", (40, 40), "red"), (20, 0))
        expected = np.array([255, 0, 0], np.uint8)
        image = classify.read(picture)
        assert image.shape == (3, SIDE, SIDE)
        assert (image[:, :, 1:-1] == expected[:, None, None]).all()

    def test_a_task_may_prepare_images(self, evaluated_run):
        task = dataclasses.replace(
            TASK, prepare=lambda config, image: image.crop((0, 0, SIDE, SIDE))
        )
        picture = Image.new("RGB", (80, 40), "white")
        picture.paste(Image.new("RGB", (SIDE, SIDE), "red"), (0, 0))
        image = load(evaluated_run, task=task).read(picture)
        assert (image[0] == 255).all() and (image[1] == 0).all()

    def test_loading_does_not_change_random_states(self, evaluated_run):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        load(evaluated_run, task=TASK)
        assert torch.equal(torch.rand(1), expected)


def name_task(run: Path, task: str) -> None:
    """Makes the report of an evaluation name a task."""
    path = run / "eval" / "mine" / "report.json"
    report = json.loads(path.read_text())
    report["run"]["task"] = task
    path.write_text(json.dumps(report))


class TestTask:
    """Where the task of a run comes from."""

    IMAGES = (Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue"))

    def test_it_may_be_passed_by_name(self, evaluated_run):
        found = load(evaluated_run, "mine", task="helpers:TASK")(self.IMAGES)
        assert found == load(evaluated_run, "mine", task=TASK)(self.IMAGES)

    def test_it_may_be_added_to_the_known_ones(self, evaluated_copy, monkeypatch):
        name_task(evaluated_copy, "mine")
        monkeypatch.setitem(TASKS, "mine", "helpers:TASK")
        assert load(evaluated_copy, "mine")(self.IMAGES)


class TestLoad:
    def test_no_run(self, tmp_path):
        assert_names(refusal(load, tmp_path / "none"), tmp_path / "none")

    def test_a_run_that_was_not_evaluated(self, evaluated_copy):
        shutil.rmtree(evaluated_copy / "eval")
        assert_names(refusal(load, evaluated_copy), evaluated_copy)

    def test_an_unknown_evaluation(self, evaluated_run):
        message = refusal(load, evaluated_run, "none")
        assert_names(message, evaluated_run, "none", "--eval", "max-drop-0.5-max_prob", "mine")

    def test_several_evaluations_without_the_default_one(self, evaluated_copy):
        (evaluated_copy / "eval" / "max-drop-0.5-max_prob").rename(
            evaluated_copy / "eval" / "other"
        )
        assert_names(
            refusal(load, evaluated_copy, task=TASK), evaluated_copy, "--eval", "mine", "other"
        )

    def test_a_run_that_was_trained_after_its_evaluation(self, evaluated_copy):
        state = checkpoint.load(evaluated_copy)
        state["network"]["backbone.linear.bias"] += 1
        checkpoint.save(
            evaluated_copy, {key: value for key, value in state.items() if key != "format"}
        )
        assert_names(refusal(load, evaluated_copy, task=TASK), evaluated_copy)

    def test_an_evaluation_that_was_never_finished_is_none(self, evaluated_copy):
        shutil.rmtree(evaluated_copy / "eval" / "mine")
        shutil.copytree(
            evaluated_copy / "eval" / "max-drop-0.5-max_prob",
            evaluated_copy / "eval" / ".mine.partial",
        )
        (evaluated_copy / "eval" / "max-drop-0.5-max_prob").rename(
            evaluated_copy / "eval" / "other"
        )
        assert classifier.find_evaluation(evaluated_copy).name == "other"

    @pytest.mark.parametrize("content", ["{", "[]", "{}", None])
    def test_a_torn_report(self, evaluated_copy, content):
        path = evaluated_copy / "eval" / "mine" / "report.json"
        path.unlink() if content is None else path.write_text(content)
        assert str(path) in refusal(load, evaluated_copy, "mine")

    def test_a_task_that_the_report_does_not_name_must_be_passed(self, evaluated_run):
        message = refusal(load, evaluated_run, "mine")
        assert_names(message, evaluated_run / "eval" / "mine", "--task", "task=")

    @pytest.mark.parametrize("task", ["no.such.module:TASK", "helpers:NOTHING", "json:dumps", "x"])
    def test_a_passed_task_that_cannot_be_imported_is_named(self, evaluated_run, task):
        assert_names(refusal(load, evaluated_run, "mine", task=task), task)

    def test_no_module_is_imported_because_a_report_names_it(self, evaluated_copy, tmp_path):
        """Not even one that is there."""
        name_task(evaluated_copy, "trap:TASK")
        (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(tmp_path)
            assert_names(refusal(load, evaluated_copy, "mine"), "'trap:TASK'", "--task")

    def test_compile_is_the_runtime_of_that_name(self, evaluated_run, monkeypatch):
        asked = []

        def find(name, *_):
            asked.append(name)
            return EagerRuntime(name, "f32", torch.device("cpu"))

        monkeypatch.setattr("early_exit.trained.find_runtime", find)
        for run in ({"compile": True}, {"compile": True, "amp": "bf16"}, {}):
            load(evaluated_run, "mine", task=TASK, device="cpu", overrides={"run": run})
        assert asked == ["compile", "compile-bf16", "torch"]

    @pytest.mark.parametrize("run", [{"compile": True}, {"amp": "bf16"}, {"amp": "auto"}])
    def test_a_runtime_and_settings_that_say_the_same(self, evaluated_run, run):
        options = {"task": TASK, "overrides": {"run": run}, "runtime": "onnxruntime"}
        message = refusal(load, evaluated_run, "mine", **options)
        assert_names(message, "--runtime", *(f"--{name}" for name in run))

    def test_data_that_nothing_would_read(self, evaluated_run, tmp_path, photos):
        """The commands refuse it; a program that loads a run may read the data itself."""
        overrides = {"data": {"root": str(tmp_path)}}
        load(evaluated_run, "mine", task=TASK, device="cpu", overrides=overrides)
        flags = ["--task", "helpers:TASK", "--eval", "mine", "--data", str(tmp_path)]
        for command, directory in ((predict, photos), (export, tmp_path / "copy")):
            message = refusal(command.main, [str(evaluated_run), str(directory), *flags])
            assert_names(message, "--data", "torch", "remove")
        assert not (tmp_path / "copy").exists()


class TestIntegers:
    """A run in a runtime of 8-bit integers, which finds the ranges of values on images of train."""

    @pytest.fixture(autouse=True)
    def engine(self, monkeypatch):
        """The runtime is eager torch under its name."""
        monkeypatch.setattr("early_exit.trained.find_runtime", lambda name, *_: Engine(name))

    def load(self, run, task=TASK):
        """The run in it."""
        return load(run, "mine", task=task, device="cpu", runtime="onnxruntime-int8")

    def test_the_images_are_those_of_an_evaluation(self, evaluated_run):
        evaluated = load_run(evaluated_run, TASK, CPU, runtime="onnxruntime-int8")
        example = self.load(evaluated_run).runtime.example
        assert len(example) == evaluated.data.size("train")  # there are fewer than are asked for
        assert torch.equal(example, evaluated.runtime.example)

    @pytest.mark.parametrize(
        "asked", [{"runtime": "torch"}, {"overrides": {"run": {"amp": "off"}}}]
    )
    def test_a_policy_of_integers_is_not_applied_elsewhere(self, evaluated_copy, asked):
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        report["environment"]["runtime"] = "onnxruntime-int8"
        path.write_text(json.dumps(report))
        own = load(evaluated_copy, "mine", task=TASK, device="cpu")
        assert own.runtime.runtime.precision == "int8"
        message = refusal(load, evaluated_copy, "mine", task=TASK, device="cpu", **asked)
        assert_names(message, path.parent, "onnxruntime-int8", "torch", "evaluate")

    def test_data_that_are_not_there(self, evaluated_run):
        def load_data(_settings):
            raise DataError("there is no data set at /nowhere")

        task = dataclasses.replace(TASK, load_data=load_data)
        message = refusal(self.load, evaluated_run, task)
        assert_names(message, evaluated_run, "onnxruntime-int8", "train", "/nowhere", "--data")

    def test_other_images_than_those_of_the_record(self, evaluated_copy):
        recorded = ExitRecord.load(evaluated_copy / "records" / "test-off")
        path = evaluated_copy / "records" / "test-onnxruntime-int8"
        data = load_run(evaluated_copy, TASK, CPU).data
        for calibration in (calibration_of(data), "another"):
            info = dataclasses.replace(recorded.info, calibration=calibration)
            dataclasses.replace(recorded, info=info).save(path)
            if calibration != "another":
                assert self.load(evaluated_copy).runtime.runtime.precision == "int8"
        assert_names(refusal(self.load, evaluated_copy), path, "train", "evaluate")


def test_a_policy_that_was_given_to_integers_may_be_of_another_runtime(evaluated_copy):
    path = evaluated_copy / "eval" / "mine" / "report.json"
    report = json.loads(path.read_text())
    report["environment"]["runtime"] = "onnxruntime-int8"
    report["choice"]["policy_given"] = True
    path.write_text(json.dumps(report))
    classify = load(evaluated_copy, "mine", task=TASK, device="cpu", runtime="torch")
    assert classify.runtime.runtime.precision == "f32"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cifar10" / "pretrained").iterdir()), ids=lambda path: path.name
)
class TestPretrained:
    """The networks in the repository."""

    def test_it_is_small(self, path):
        files = [file for file in path.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 5_000_000

    def test_it_classifies(self, path):
        classify = load(path)
        assert classify.classes[3] == "cat"
        found = classify([Image.new("RGB", (320, 240), "blue")])[0]
        assert found.exit in classify.policy.exit_names and 0.1 < found.confidence <= 1

    def test_its_card_has_the_accuracy_of_its_report(self, path):
        card = " ".join((path / "README.md").read_text().split())
        (found,) = path.glob("eval/*/report.json")
        report = json.loads(found.read_text())
        assert_names(card, f"{100 * report['test']['accuracy']:.2f} %")

    @pytest.mark.slow
    def test_it_is_as_accurate_as_its_card_says(self, path):
        """On the test set of CIFAR-10, if it is here."""
        if not (data.ROOT / "cifar-10-batches-py").is_dir():
            pytest.skip(f"no CIFAR-10 in {data.ROOT}")
        test = data.load("cifar10").splits["test"]
        classify = load(path)
        correct = np.zeros(0, bool)
        for start in range(0, len(test), 500):
            answers = classify.answer(test.images[start : start + 500])
            answered = answers.classes == test.targets[start : start + 500]
            correct = np.concatenate([correct, answered.numpy()])
        (found,) = path.glob("eval/*/report.json")
        report = json.loads(found.read_text())
        assert correct.mean() == pytest.approx(report["test"]["accuracy"], abs=5e-4)


def test_evaluations_are_found(evaluated_run):
    assert classifier.find_evaluation(evaluated_run, "mine") == evaluated_run / "eval" / "mine"
    assert (
        classifier.find_evaluation(evaluated_run / "eval" / "mine")
        == evaluated_run / "eval" / "mine"
    )
    message = refusal(classifier.find_evaluation, evaluated_run / "eval" / "mine", "mine")
    assert_names(message, "--eval")
