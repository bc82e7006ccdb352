"""A run of an MSDNet, whose segments hand on tuples of maps: resumed, evaluated, deployed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    SIDE,
    Crash,
    assert_same_run,
    at_batch,
    crash,
    finish,
    quick_report,
    tiny_data,
)

import early_exit
from cifar10.msdnet import MSDNet
from early_exit import export
from early_exit.choosing.goals import FixedThresholds
from early_exit.choosing.record import ExitRecord
from early_exit.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.infer import infer
from early_exit.inference.runtimes import openvino
from early_exit.inference.runtimes.network import RuntimeNetwork, to_numpy
from early_exit.inference.runtimes.table import find_runtime
from early_exit.manifest import Manifest
from early_exit.model.network import MultiExitNetwork
from early_exit.task import Task
from early_exit.training.train import train

pytestmark = pytest.mark.slow

CONFIG = Config(
    data=DataConfig(dataset="digits"),
    model=ModelConfig(
        arch="msdnet6", exits=("block1", "block2", "block3"), head=("msdnet", "conv", "pooled")
    ),
    optim=OptimConfig(epochs=2, batch_size=8, lr=0.05),
    run=RunConfig(amp="off", device="cpu", threads=1),
)
# A process without torch.
PREDICT = """
import runpy, sys

sys.modules["torch"] = sys.modules["torchvision"] = None
sys.argv[0] = "predict"
runpy.run_module("early_exit.predict", run_name="__main__", alter_sys=True)
"""


def build_network(config, num_classes):
    """A narrow MSDNet of four blocks, which end with 3, 2, 1 and 1 maps."""
    backbone = MSDNet((1, 2, 2, 1), num_classes, (3, SIDE, SIDE), channels=8, growth=4)
    return MultiExitNetwork(
        backbone,
        backbone.units(),
        backbone.default_exits if config.model.exits is None else config.model.exits,
        head=config.model.head,
        num_classes=num_classes,
        example=torch.zeros(1, 3, SIDE, SIDE),
    )


TASK = Task(build_network, tiny_data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an evaluation `mine`, in which the first seven images of test take several exits:
    each threshold is in a gap between their scores that rounding does not cross. Not to be
    changed."""
    directory = tmp_path_factory.mktemp("msdnet") / "run"
    train(CONFIG, TASK, runs=directory, run_dir=directory)
    quick_report(directory, TASK)
    record = ExitRecord.load(directory / "records" / "test-off")
    thresholds = []
    for logits in torch.from_numpy(record.logits[:7, :3]).unbind(1):
        scores = logits.softmax(dim=-1).amax(dim=-1).sort().values
        widest = int(scores.diff()[1:5].argmax()) + 1
        thresholds.append(float(scores[widest : widest + 2].mean()))
    goal = FixedThresholds(tuple(thresholds), calibrate=False)
    evaluate(directory, TASK, goal, overrides=CPU, live=False, draw=False, name="mine")
    return directory


@pytest.fixture(scope="module")
def classify(run):
    """The run as a classifier in torch."""
    return early_exit.load(run, "mine", task=TASK, device="cpu")


@pytest.fixture(scope="module")
def images(classify):
    """The first 40 images of test as the network takes them."""
    pixels = tiny_data(CONFIG.data).splits["test"].images[:40]
    mean, std = (
        torch.tensor(classify.loaded.normalisation[name]).view(3, 1, 1) for name in ("mean", "std")
    )
    return (pixels / 255 - mean) / std


@pytest.fixture(scope="module")
def deployed(run, tmp_path_factory):
    """The run as a deployed model. Not to be changed."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    directory = tmp_path_factory.mktemp("deployed") / "model"
    flags = ["--eval", "mine", "--task", f"{__name__}:TASK", "--format", "onnx"]
    export.main([str(run), str(directory), *flags])
    return directory


@pytest.mark.parametrize("batch", [3, 9])
def test_resuming_equals_never_stopping(run, tmp_path, monkeypatch, batch):
    with monkeypatch.context() as patch:
        at_batch(patch, batch, crash)
        with pytest.raises(Crash):
            train(CONFIG, TASK, runs=tmp_path, run_dir=tmp_path / "run", resume="auto")
    train(CONFIG, TASK, runs=tmp_path, run_dir=tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", run)


def test_exits_are_taken_in_an_evaluation_and_timed(run, tmp_path):
    options = {"live": True, "batch_sizes": (4,), "timing_images": 8, "out": tmp_path / "out"}
    report = quick_report(run, TASK, FixedThresholds((0.2,)), **options)
    assert [row["name"] for row in report["exits"]] == ["block1", "block2", "block3", "final"]
    assert (report["live"]["images"], report["live"]["differing_beyond_rounding"]) == (60, 0)
    (timing,) = report["timing"]
    assert len(timing["segment_seconds"]) == 4


def test_a_copy_of_the_run_predicts_the_same(run, classify, photos, tmp_path):
    export.main([str(run), str(tmp_path / "copy"), "--eval", "mine", "--task", f"{__name__}:TASK"])
    files = sorted(photos.rglob("*.png"))
    copy = early_exit.load(tmp_path / "copy", task=TASK, device="cpu")
    assert copy(files) == classify(files)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_deployed_model_predicts_the_same_without_torch(classify, deployed, photos, runtime):
    pytest.importorskip(runtime)
    flags = [deployed, photos, "--json", "--runtime", runtime, "--threads", 1]
    done = finish(
        subprocess.Popen(
            [sys.executable, "-c", PREDICT, *map(str, flags)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = classify(sorted(photos.rglob("*.png")))
    assert [(one["class"], one["exit"]) for one in found] == [
        (one.name, one.exit) for one in expected
    ]
    assert len({one["exit"] for one in found}) > 1
    # a confidence moves by at most twice as much as the logits, of which the largest is below 40
    slack = 2 * 40 * Manifest.read(deployed).check["tolerance"]
    assert [one["confidence"] for one in found] == pytest.approx(
        [one.confidence for one in expected], abs=slack
    )


def in_runtime(name, classify):
    """The run's network in a runtime; the test is skipped where it is not installed."""
    if name.startswith("o"):
        pytest.importorskip("onnxscript")
        pytest.importorskip(name.partition("-")[0])
    if name == "openvino-int8":
        pytest.importorskip("nncf")
    if name == "openvino-bf16" and "BF16" not in openvino.capabilities():
        pytest.skip("OpenVINO has no bfloat16 on this processor")
    example = tiny_data(CONFIG.data).splits["train"].images
    mean, std = (
        torch.tensor(classify.loaded.normalisation[key]).view(3, 1, 1) for key in ("mean", "std")
    )
    return RuntimeNetwork(
        classify.loaded.network, find_runtime(name, threads=1), (example / 255 - mean) / std
    )


@pytest.mark.parametrize("enabled", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_seven_images_take_the_same_exits(classify, images, name, enabled):
    policy = early_exit.Policy(
        exit_names=classify.policy.exit_names,
        thresholds=classify.policy.thresholds,
        enabled=enabled,
    )
    running = in_runtime(name, classify)
    for rows in (1, 7):
        expected = infer(classify.loaded.network, images[:rows], policy)
        found = running.infer(images[:rows], policy)
        assert to_numpy(found.exit_index).tolist() == expected.exit_index.tolist()
        assert to_numpy(found.classes).tolist() == expected.classes.tolist()


def test_openvino_hands_on_each_map_channels_last(classify, images):
    pytest.importorskip("openvino")
    running = in_runtime("openvino", classify)
    features, *_ = running.segment(0, 0, "max_prob")(images[:3].numpy(), 1.0, None)
    assert [part.shape for part in features] == [(3, 16, 16, 12), (3, 8, 8, 24), (3, 4, 4, 48)]
    with torch.no_grad():
        stored, _ = classify.loaded.network.stages[0](images[:3])
    scale = max(float(part.abs().max()) for part in stored)
    for part, expected in zip(features, stored, strict=True):
        difference = np.abs(part.transpose(0, 3, 1, 2) - expected.numpy()).max()
        # the stem's 27, 72 and 144 products, then 24 of 1x1 and 72 of 3x3
        assert difference <= np.finfo(np.float32).eps * (27 + 72 + 144 + 24 + 72 + 20) * scale


def test_a_compiled_segment_takes_and_gives_tuples(classify, images):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    network = classify.loaded.network
    with torch.no_grad():
        maps, _ = network.stages[0](images[:7])
        expected, logits = network.stages[1](maps)
    running = in_runtime("compile", classify)
    segment = running.segment(1, 1, "max_prob")
    with running.runtime.context():
        found, found_logits, *_ = segment(maps, 1.0, None)
    assert [part.shape for part in found] == [part.shape for part in expected] and len(found) == 2
    assert (found_logits.argmax(1) == logits.argmax(1)).all()


@pytest.mark.parametrize("name", ["onnxruntime-int8", "openvino-bf16", "openvino-int8"])
def test_the_classes_are_mostly_the_same_in_less_precision(classify, images, name):
    running = in_runtime(name, classify)
    with torch.no_grad():
        expected = classify.loaded.network(images)
    for found, logits in zip(running(images), expected, strict=True):
        assert found.shape == logits.shape
        assert (found.argmax(1) == logits.argmax(1)).float().mean() >= 0.8
