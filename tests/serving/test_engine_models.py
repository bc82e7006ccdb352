"""Serving an exported model, and without torch."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from fake_segments import PATIENCE, Reported
from helpers import ROOT

import early_exit
from early_exit.inference.policy import Policy
from early_exit.manifest import Manifest
from early_exit.serving.adapt import curve_policies, val_point
from early_exit.serving.batch_size import pick_max_batch
from early_exit.serving.engine import Engine, EngineSettings

IMPORT = """
import sys
sys.modules["torch"] = None  # importing it raises an error
import early_exit.serving.engine, early_exit.serving.adapt, early_exit.serving.batch_size
"""


def test_torch_is_not_needed():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("workers", [1, 2])
def test_answers_equal_those_of_the_classifier(deployed_model, photos, runtime, workers):
    """The exits too: the threshold is in a gap of the scores that rounding does not cross."""
    pytest.importorskip(runtime)
    classify = early_exit.load(deployed_model, runtime=runtime, threads=1)
    images = np.stack([classify.read(file) for file in sorted(photos.rglob("*.png"))])
    expected = classify.answer(images)
    inputs = classify.manifest.input.array(images)
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, len(images), size) for size in rng.integers(1, 7, size=60)]
    reported = [Reported() for _ in parts]
    engine = Engine(
        classify.segments, classify.policy, EngineSettings(max_batch=8, workers=workers)
    )

    def client(number):
        for part, one in zip(parts[number::6], reported[number::6]):
            engine.submit(inputs[part], one)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert engine.close(PATIENCE)
    slack = 2 * float(np.abs(expected.logits).max()) * classify.manifest.check["tolerance"]
    for part, one in zip(parts, reported):
        found = sorted(one.all, key=lambda answer: answer.row)
        assert [answer.row for answer in found] == list(range(len(part)))
        assert [answer.exit_index for answer in found] == expected.exit_index[part].tolist()
        logits = np.stack([answer.logits for answer in found])
        assert np.abs(logits - expected.logits[part]).max() <= slack
    assert len(set(expected.exit_index.tolist())) > 1


@pytest.mark.slow
def test_a_batch_size_is_found(deployed_model):
    pytest.importorskip("onnxruntime")
    classify = early_exit.load(deployed_model, runtime="onnxruntime", threads=1)
    manifest = classify.manifest
    example = manifest.input.array(np.zeros((1, *manifest.input.shape), np.uint8))
    found = pick_max_batch(classify.segments, example, classify.policy, sizes=(1, 2, 4))
    assert found in (1, 2, 4)


@pytest.mark.slow
def test_cheaper_policies_of_an_exported_model(deployed_model):
    manifest = Manifest.read(deployed_model)
    policy = Policy.load(deployed_model / "policy.yaml")
    point = val_point(manifest, policy)
    assert point.accuracy == manifest.val["accuracy"]
    assert sum(point.exit_shares) == pytest.approx(1)
    policies = curve_policies(manifest, policy, 1.0)
    costs = [val_point(manifest, one).macs_share for one in policies]
    assert len(costs) > 2 and costs == sorted(costs, reverse=True)
    assert costs[-1] == min(row["macs_share"] for row in manifest.val_curve)
