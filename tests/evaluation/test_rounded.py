"""Evaluations of weights rounded to float16, and their exports."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import CPU, TASK, assert_names, bound, few_digits, refusal, tiny_network

from early_exit import compare, export
from early_exit.choosing.goals import MaxDrop
from early_exit.choosing.record import ExitRecord
from early_exit.classifier import load
from early_exit.config import Config, ModelConfig
from early_exit.evaluation.evaluate import evaluate
from early_exit.evaluation.upgrade import read_report
from early_exit.trained import trained_since
from early_exit.training import checkpoint, weight_files
from early_exit.training.exported import SETTINGS, WEIGHTS

NAME = "max-drop-0.5-max_prob-weights-float16"
QUICK = {"overrides": CPU, "live": False, "draw": False}


@pytest.fixture(scope="module")
def run(evaluated_run, tmp_path_factory):
    """A run that was evaluated with its own weights and with rounded ones. Not to be changed."""
    copy = shutil.copytree(evaluated_run, tmp_path_factory.mktemp("rounded") / "run")
    options = {**QUICK, "live": True, "batch_sizes": (8,), "timing_images": 8}
    _, directory = evaluate(copy, TASK, MaxDrop(0.005), rounded_to="float16", **options)
    assert directory.name == NAME
    return copy


@pytest.fixture(scope="module")
def copy(run, tmp_path_factory):
    """The export of the evaluation with rounded weights. Not to be changed."""
    directory = tmp_path_factory.mktemp("exported") / "copy"
    export.main([str(run), str(directory), "--eval", NAME, "--task", "helpers:TASK"])
    return directory


def by_hand(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights rounded to float16, without running statistics and counters."""
    return {
        name: value if "running_" in name or not value.is_floating_point() else value.half().float()
        for name, value in weights.items()
    }


def weights_of(classifier) -> dict[str, torch.Tensor]:
    """The state dict of its network."""
    return classifier.loaded.network.state_dict()


def test_its_record_is_of_the_rounded_network_alone(run):
    exact = ExitRecord.load(run / "records" / "test-off")
    rounded = ExitRecord.load(run / "records" / "test-off-weights-float16")
    assert "float16" in rounded.info.weights and "float16" not in exact.info.weights
    assert rounded.info.weights != exact.info.weights
    network = tiny_network(Config(model=ModelConfig(exits=("layer1", "layer2"))), 10)
    network.load_state_dict(by_hand(checkpoint.load(run)["network"]))
    work = sum(p[0].numel() for p in network.parameters() if p.ndim > 1)
    images, _ = next(iter(few_digits(0).eval_batches("test", 60)))
    with torch.no_grad():
        logits = torch.stack(network.double().eval()(images.double()), dim=1).numpy()
    limit = bound(torch.float32, work) * np.abs(logits).max()
    assert np.abs(logits - rounded.logits).max() <= limit
    assert not np.array_equal(exact.logits, rounded.logits)


def test_the_report_says_so(run):
    directory = run / "eval" / NAME
    report = read_report(directory / "report.json")
    assert report["run"]["rounded_to"] == "float16"
    assert report["run"]["weights"].endswith("rounded to float16")
    title = (directory / "report.md").read_text().splitlines()[0]
    assert "float16" in title
    others = read_report(run / "eval" / "mine" / "report.json")["run"]
    assert others["rounded_to"] is None and "float16" not in others["weights"]


def test_exits_are_taken_in_the_rounded_network(run):
    live = read_report(run / "eval" / NAME / "report.json")["live"]
    assert live["images"] == 60 and live["differing_beyond_rounding"] == 0


def test_it_is_loaded_with_rounded_weights(run):
    exact, rounded = (weights_of(load(run, name, task=TASK)) for name in ("mine", NAME))
    for name, value in by_hand(exact).items():
        assert torch.equal(rounded[name], value), name


def test_its_export_has_the_weights_bit_for_bit_in_half_the_size(run, copy, photos, tmp_path):
    own, shared = load(run, NAME, task=TASK), load(copy, task=TASK)
    assert shared.policy == own.policy and shared.loaded.weights == own.loaded.weights
    for name, value in weights_of(own).items():
        assert torch.equal(weights_of(shared)[name], value), name
    files = sorted(photos.rglob("*.png"))
    assert shared(files) == own(files)
    types = {value.dtype for value in weight_files.read(copy / WEIGHTS).values()}
    assert types == {torch.float16, torch.float32, torch.int64}
    export.main([str(run), str(tmp_path / "exact"), "--eval", "mine", "--task", "helpers:TASK"])
    sizes = [(path / WEIGHTS).stat().st_size for path in (copy, tmp_path / "exact")]
    assert sizes[0] < 0.6 * sizes[1]


def test_an_export_is_evaluated_as_a_run(copy, tmp_path):
    again = shutil.copytree(copy, tmp_path / "again")
    report, _ = evaluate(again, TASK, MaxDrop(0.005), name="again", **QUICK)
    before = json.loads((copy / "eval" / NAME / "report.json").read_text())
    assert report.run.weights == before["run"]["weights"]
    assert report.run.rounded_to == "float16"
    assert report.test.accuracy == before["test"]["accuracy"]


def test_an_export_is_exported_as_a_run(copy, tmp_path):
    export.main([str(copy), str(tmp_path / "again"), "--task", "helpers:TASK"])
    for name in (WEIGHTS, SETTINGS):
        assert (tmp_path / "again" / name).read_bytes() == (copy / name).read_bytes()


def test_the_card_of_an_export_begins_with_fields(copy):
    text = (copy / "README.md").read_text()
    assert text.startswith("---\n")
    _, fields, body = text.split("---\n", 2)
    assert yaml.safe_load(fields)["license"] == "unknown"
    assert body.startswith("# ")
    assert "rounded to float16" in " ".join(body.split())


def test_a_comparison_tells_the_two_apart(run, copy, tmp_path):
    names = ["--eval", NAME, "--eval", "max-drop-0.5-max_prob"]
    compare.main([str(run), *names, "--out", str(tmp_path / "out"), "--no-plots"])
    groups = json.loads((tmp_path / "out" / "table.json").read_text())["groups"]
    assert {group["rounded_to"]: "float16" in group["goal"] for group in groups} == {
        None: False,
        "float16": True,
    }
    assert not any(one["outdated"] for group in groups for one in group["evaluations"])
    compare.main([str(copy), "--out", str(tmp_path / "exported"), "--no-plots"])
    (group,) = json.loads((tmp_path / "exported" / "table.json").read_text())["groups"]
    assert group["rounded_to"] == "float16" and not group["evaluations"][0]["outdated"]


def test_other_weights_than_those_that_were_rounded_are_noticed(run, copy):
    weights = read_report(run / "eval" / NAME / "report.json")["run"]["weights"]
    assert not trained_since(run, weights, "float16")
    assert not trained_since(copy, weights, "float16")
    assert trained_since(run, weights)  # the weights as they were trained


def test_a_weight_that_float16_cannot_hold(evaluated_copy):
    state = checkpoint.load(evaluated_copy)
    state["network"]["backbone.linear.bias"][0] = 1e5
    checkpoint.save(evaluated_copy, state)
    message = refusal(evaluate, evaluated_copy, TASK, MaxDrop(0.005), rounded_to="float16", **QUICK)
    assert_names(message, "backbone.linear.bias", "--weights")


def test_another_rounding_is_refused(evaluated_run):
    message = refusal(evaluate, evaluated_run, TASK, MaxDrop(0.005), rounded_to="int4", **QUICK)
    assert_names(message, "--weights", "int4")


@pytest.mark.slow
def test_a_deployed_model_has_the_rounded_weights(run, photos, tmp_path):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import early_exit

    arguments = ["--eval", NAME, "--task", "helpers:TASK", "--format", "onnx"]
    export.main([str(run), str(tmp_path / "model"), *arguments])
    manifest = json.loads((tmp_path / "model" / "model.json").read_text())
    assert manifest["network"]["weights"].endswith("rounded to float16")
    assert (tmp_path / "model" / "README.md").read_text().startswith("---\n")
    files = sorted(photos.rglob("*.png"))
    assert len(early_exit.load(tmp_path / "model")(files)) == 7
