"""Every runtime gives the answers and exits of eager torch, in batches of any size."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from helpers import bound, skip_without

from early_exit.inference.infer import infer
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.runtimes import openvino
from early_exit.inference.runtimes.network import RuntimeNetwork, to_numpy
from early_exit.inference.runtimes.table import find_runtime

# The terms that a logit is summed up from: 3x3 convolutions of 3 channels, of 16 (four), of 32
# (two) and of 64, a mean of 16 pixels, a classifier of 64 features, BatchNorm and ReLU.
TERMS = 9 * (3 + 4 * 16 + 2 * 32 + 64) + 16 + 64 + 32
COUNT = 33
MAX_PROB = Policy(
    exit_names=("stem", "layer1", "layer2", "final"),
    thresholds=(NEVER,) * 3,
    temperatures=(0.5, 0.8, 1.0, 1.3),
)
PATIENCE = dataclasses.replace(MAX_PROB, criterion="patience", thresholds=(2.0, 1.0, 1.0))
ALL, ONE_DISABLED, ONE_ENABLED = (True,) * 3, (True, False, True), (False, True, False)


@pytest.fixture(scope="module")
def clear_images(exact_net, images):
    """33 images on whose classes no rounding of float32 decides at any exit."""
    with torch.no_grad():
        logits = torch.stack(exact_net(images[:100].double()), dim=1)
    limit = 2 * bound(torch.float32, TERMS) * float(logits.abs().max())
    second, best = logits.sort(dim=-1).values[..., -2:].unbind(-1)
    clear = images[:100][(best - second > limit).all(dim=1)][:COUNT]
    assert len(clear) == COUNT
    return clear


@pytest.fixture(scope="module")
def max_prob(exact_net, clear_images):
    """A policy with each threshold in the widest gap between scores around the median."""
    with torch.no_grad():
        logits = exact_net(clear_images.double())
    thresholds = []
    for index, exit_logits in enumerate(logits[:-1]):
        probs = (exit_logits / MAX_PROB.temperatures[index]).softmax(dim=1)
        scores = np.sort(probs.amax(dim=1).numpy())[COUNT // 4 : -COUNT // 4]
        widest = np.diff(scores).argmax()
        thresholds.append(float(scores[widest : widest + 2].mean()))
        # a probability changes by at most half of what the logits do
        limit = bound(torch.float32, TERMS) * float(exit_logits.abs().max())
        assert np.diff(scores)[widest] / 2 > limit / MAX_PROB.temperatures[index]
    return dataclasses.replace(MAX_PROB, thresholds=tuple(thresholds))


@pytest.fixture(scope="module")
def built(trained_net):
    """The network in a runtime, built once."""
    found = {}

    def build(name):
        if name == "compile" and shutil.which("g++") is None:
            pytest.skip("no C++ compiler")
        if name.startswith("o"):
            pytest.importorskip("onnxscript")
            pytest.importorskip(name.partition("-")[0])
        if name == "openvino-bf16" and "BF16" not in openvino.capabilities():
            pytest.skip("OpenVINO has no bfloat16 on this processor")
        if name not in found:
            example = torch.zeros(2, 3, 16, 16)
            found[name] = RuntimeNetwork(trained_net, find_runtime(name, threads=1), example)
        return found[name]

    return build


def assert_equal(run, net, images, policy):
    """The same answers and exits as eager torch, at 1, 7 and 33 rows; several exits are taken."""
    for rows in (1, 7, 33):
        expected, found = infer(net, images[:rows], policy), run.infer(images[:rows], policy)
        assert to_numpy(found.exit_index).tolist() == expected.exit_index.tolist()
        assert to_numpy(found.classes).tolist() == expected.classes.tolist()
    assert len(set(expected.exit_index.tolist())) > 1


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "enabled"),
    [
        ("torch", ALL),
        ("torch", ONE_DISABLED),
        ("onnxruntime", ONE_ENABLED),
        slow("onnxruntime", ALL),
        slow("onnxruntime", ONE_DISABLED),
        slow("openvino", ALL),
        slow("openvino", ONE_DISABLED),
        slow("compile", ONE_DISABLED),
    ],
)
def test_max_prob_takes_the_same_exits(built, trained_net, clear_images, max_prob, name, enabled):
    policy = dataclasses.replace(max_prob, enabled=enabled)
    assert_equal(built(name), trained_net, clear_images, policy)


@pytest.mark.parametrize(
    ("name", "enabled"),
    [
        ("torch", ALL),
        ("torch", ONE_DISABLED),
        slow("onnxruntime", ALL),
        slow("onnxruntime", ONE_DISABLED),
        slow("openvino", ALL),
        slow("openvino", ONE_DISABLED),
        slow("compile", ONE_DISABLED),
    ],
)
def test_patience_takes_the_same_exits(built, trained_net, clear_images, name, enabled):
    policy = dataclasses.replace(PATIENCE, enabled=enabled)
    assert_equal(built(name), trained_net, clear_images, policy)


@pytest.mark.parametrize(
    "name",
    ["torch-bf16", slow("compile-bf16"), slow("onnxruntime"), slow("openvino-bf16")],
)
def test_the_score_is_computed_in_float32(built, clear_images, name):
    """From the logits that the exit gives, in whatever precision: not in bfloat16, which is off by
    up to 2^-9 of a probability."""
    if "bf16" in name:
        skip_without(torch.bfloat16)
    run = built(name)
    with run.runtime.context():
        _, logits, answer, score, _ = run.segment(0, 0, "max_prob")(
            run.runtime.array(clear_images), 0.5, None
        )
    exact = to_numpy(logits).astype(np.float64) / 0.5
    shifted = np.exp(exact - exact.max(axis=1, keepdims=True))
    expected = shifted.max(axis=1) / shifted.sum(axis=1)
    # the exponent of x is off by x epsilon, then four classes are added
    terms = 16 + 2 * int(np.abs(exact).max())
    assert np.abs(to_numpy(score) - expected).max() <= bound(torch.float32, terms)
    assert np.abs(to_numpy(answer) - exact).max() <= bound(torch.float32, 1) * np.abs(exact).max()


def test_segments_may_be_built_in_inference_mode(tiny_net, images):
    """As the record of all exits does; tensors of inference mode are never traced."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.inference_mode():
        network = RuntimeNetwork(tiny_net, find_runtime("onnxruntime"), images[:2].clone())
        first = network.segment(0, 0, "max_prob")
    assert network.segment(0, 0, "max_prob") is first
    network.segment(1, 1, "max_prob")
