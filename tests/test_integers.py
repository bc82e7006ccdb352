"""Models in 8-bit integers, from an evaluation to answers without torch: the files are the network
that was evaluated, and run in its runtime alone."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from helpers import CPU, ROOT, TASK, assert_names, refusal

import early_exit
from early_exit import export, predict
from early_exit.choosing.goals import FixedThresholds
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import plain_tensors
from early_exit.inference.runtimes.table import INTEGERS, NEEDED_TO_BUILD, split_name
from early_exit.inference.segments import segment_of, spans
from early_exit.manifest import Manifest

pytestmark = pytest.mark.slow
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from early_exit.predict import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module", params=INTEGERS)
def runtime(request):
    """The name of a runtime in 8-bit integers."""
    for package in (split_name(request.param)[0], "onnxruntime", *NEEDED_TO_BUILD[request.param]):
        pytest.importorskip(package)
    return request.param


@pytest.fixture(scope="module")
def run(runtime, evaluated_run, tmp_path_factory):
    """A run that was evaluated in it, as `mine`."""
    directory = tmp_path_factory.mktemp("integers") / "run"
    shutil.copytree(evaluated_run, directory)
    policy = Policy.load(directory / "eval" / "mine" / "policy.yaml")
    goal = FixedThresholds(policy.thresholds[:1], calibrate=False)
    options = {"overrides": CPU, "live": False, "draw": False, "name": "mine"}
    evaluate(directory, TASK, goal, runtime=runtime, **options)
    return directory


@pytest.fixture(scope="module")
def classifier(run):
    """The run in the runtime that it was evaluated in."""
    return early_exit.load(run, "mine", task=TASK, device="cpu", overrides={"run": {"threads": 1}})


@pytest.fixture(scope="module", params=["uint8", "float"])
def model(request, run, tmp_path_factory):
    """The run as a deployed model, which takes pixels or normalised images."""
    directory = tmp_path_factory.mktemp("integers") / "model"
    flags = ["--task", "helpers:TASK", "--eval", "mine", "--format", "onnx"]
    export.main([str(run), str(directory), *flags, "--input", request.param])
    return directory


@pytest.fixture
def files(photos):
    """Images of test."""
    return sorted(photos.rglob("*.png"))


def test_the_answers_are_those_of_the_run(model, classifier, runtime, files):
    deployed = early_exit.load(model, threads=1)
    found, expected = deployed(files), classifier(files)
    assert deployed.runtime == classifier.runtime.runtime.name == runtime
    assert len({one.exit for one in found}) > 1
    # a probability moves by at most twice as much as the logits, of which none reaches 40
    slack = 2 * 40 * Manifest.read(model).check["tolerance"]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.name, ours.exit, ours.macs) == (theirs.name, theirs.exit, theirs.macs)
        assert ours.confidence == pytest.approx(theirs.confidence, abs=slack)


def test_the_scales_and_weights_are_those_of_the_run(model, classifier):
    """Every array of the evaluated models is in the files; where these take pixels, the first has
    the two of the normalisation too."""
    onnx = pytest.importorskip("onnx")

    def arrays(content):
        graph = onnx.load_model_from_string(content).graph
        return Counter(
            (str(array.dtype), array.tobytes())
            for array in map(onnx.numpy_helper.to_array, graph.initializer)
        )

    network, policy, manifest = classifier.runtime, classifier.policy, Manifest.read(model)
    for segment, (first, last) in zip(manifest.segments, spans(policy.enabled), strict=True):
        part = segment_of(network.network, first, last, policy.criterion)
        with plain_tensors():
            own = network.runtime.model(part, network.example_of(first, policy.criterion))
        found, expected = arrays((model / segment.file).read_bytes()), arrays(own)
        assert any(kind == "int8" for kind, _ in expected)
        assert expected <= found
        scaled = manifest.input.type == "uint8" and first == 0
        assert (found - expected).total() == (2 if scaled else 0)


def test_the_manifest(model, run, runtime):
    onnx = pytest.importorskip("onnx")
    manifest, check = Manifest.read(model), Manifest.read(model).check
    assert (manifest.runtime, manifest.precision) == (runtime, "int8")
    assert manifest.chosen_in == {"runtime": runtime, "precision": "8-bit integers"}
    assert (check["runtime"], check["compared_with"], check["images_of"]) == (
        *(runtime, runtime),
        "train",
    )
    assert check["largest_difference"] <= check["tolerance"] <= check["from_float"] / 2
    report = json.loads((run / "eval" / "mine" / "report.json").read_text())
    assert manifest.test["accuracy"] == report["test"]["accuracy"]
    copied = Policy.load(model / "policy.yaml")
    assert copied == Policy.load(run / "eval" / "mine" / "policy.yaml")
    for segment in manifest.segments:
        imports = onnx.load(model / segment.file).opset_import
        assert {one.version for one in imports if one.domain in ("", "ai.onnx")} == {manifest.opset}
    card = " ".join((model / "README.md").read_text().split())
    assert_names(card, runtime, "8-bit integers", "float32", "train")


def test_another_runtime_is_refused(model, runtime, files):
    for other in ("onnxruntime", "openvino", *INTEGERS):
        if other != runtime:
            message = refusal(early_exit.load, model, runtime=other)
            assert_names(message, other, runtime)
            arguments = [str(model), str(files[0]), "--runtime", other]
            assert refusal(predict.main, arguments) == message


def test_any_number_of_images(model, files):
    """And arrays whose rows are not contiguous."""
    deployed = early_exit.load(model, threads=1)
    images = np.stack([deployed.read(file) for file in files])
    answers = deployed.answer(np.ascontiguousarray(images))
    assert np.array_equal(deployed.answer(np.asfortranarray(images)).logits, answers.logits)
    assert deployed.answer(images[:1]).logits.shape == (1, 10)


def test_without_torch(model, files, capsys):
    arguments = [str(model), *map(str, files), "--json", "--threads", "1"]
    predict.main(arguments)
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    ours, theirs = (
        [json.loads(line) for line in text.splitlines()]
        for text in (done.stdout, capsys.readouterr().out)
    )
    assert len(ours) == len(files)
    for found, expected in zip(ours, theirs, strict=True):
        assert found["class"] == expected["class"] and found["exit"] == expected["exit"]
