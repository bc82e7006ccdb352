"""report.json: its format number, and files of older versions."""

import json
from dataclasses import fields

import pytest
from helpers import ROOT

from early_exit.errors import UserError
from early_exit.evaluation.comparison import table
from early_exit.evaluation.groups import group_runs
from early_exit.evaluation.labels import labelled
from early_exit.evaluation.report import (
    FORMAT,
    Choice,
    ClassRow,
    CurveSeconds,
    Environment,
    ExitRow,
    LiveResult,
    Report,
    RunInfo,
)
from early_exit.evaluation.stored import read_evaluation
from early_exit.evaluation.upgrade import read_report, upgraded

OLD = {
    "run": "demo",
    "dataset": "digits",
    "arch": "resnet20",
    "regime": "joint",
    "chosen_by": "max drop 0.5 points",
    "thresholds_given": False,
    "policy_given": False,
    "criterion": "max_prob",
    "calibrated": True,
    "val_from": "held out from train",
    "val_images": 180,
    "test_images": 360,
    "weights": "weights 0123 of the last epoch",
    "precision": "float32",
    "device": "CPU",
    "plain_macs": 100,
    "exits": [
        {"name": "final", "on": True, "taken": 1.0, "taken_accuracy": 0.9, "gain_auroc": None}
    ],
    "classes": [{"name": "0", "taken": [1.0]}],
    "timing": [
        {"promise": 1, "full": 2, "trunk": 3, "kept": 0.9, "trunk_speedup": 1.5, "plain": 4}
    ],
    "live": {"images": 360, "differing": 0},
    "cuts": {"count": 3},
    "statics": [{"name": "resnet32"}],
    "pace": [{"batch_size": 1, "alone": [1.0], "statics": {"resnet32": 1.2}}],
    "guarantee": {"words": "", "lost": 0.1, "plain": {"accuracy": 0.9}, "plain_lost": 0.2},
    "door": "cifar10.trainer:DOOR",
    "settings": {"run": {"seed": 0}},
    "versions": {"torch": "2.14"},
    "command": "python cifar10/eval.py runs/demo",
}


def test_a_report_of_version_0_1_is_upgraded():
    new = upgraded(OLD)
    assert new["format"] == FORMAT
    assert new["run"] == {
        "name": "demo",
        "task": "cifar10",
        "dataset": "digits",
        "arch": "resnet20",
        "regime": "joint",
        "weights": OLD["weights"],
        "settings": OLD["settings"],
        "unfinished": None,
        "rounded_to": None,
    }
    assert new["choice"]["goal"] == OLD["chosen_by"] and new["choice"]["test_images"] == 360
    assert new["environment"]["command"] == OLD["command"]
    assert new["exits"][0] == {
        "name": "final",
        "enabled": True,
        "exited": 1.0,
        "exited_accuracy": 0.9,
        "continuing_auroc": None,
    }
    assert new["classes"][0]["exited"] == [1.0]
    assert new["timing"][0] == {
        "ideal": 1,
        "no_exit_taken": 2,
        "without_heads": 3,
        "fraction_of_ideal": 0.9,
        "speedup_without_heads": 1.5,
        "plain": 4,
    }
    assert new["environment"]["runtime"] == "torch"
    assert new["live"] == {"images": 360, "differing": 0, "rounding": 1e-5}
    assert new["cuts"] == {"count": 3, "speedup": None, "lost": None}
    assert new["static_networks"] == OLD["statics"]
    assert new["curve_seconds"][0]["at_exit"] == [1.0]
    assert new["guarantee"]["unguaranteed_lost"] == 0.2
    assert not {"door", "chosen_by", "statics", "pace", "precision"} & set(new)


def test_the_sections_of_an_upgraded_report_are_those_of_today():
    new = upgraded(OLD)
    for section, kind in (("run", RunInfo), ("choice", Choice), ("environment", Environment)):
        assert set(new[section]) == {field.name for field in fields(kind)}
    assert set(new) <= {field.name for field in fields(Report)}
    assert set(new["exits"][0]) <= {field.name for field in fields(ExitRow)}
    assert set(new["classes"][0]) <= {field.name for field in fields(ClassRow)}


def test_upgrading_changes_nothing_that_was_given():
    before = json.dumps(OLD)
    upgraded(OLD)
    assert json.dumps(OLD) == before


def test_a_report_of_today_is_read_as_it_is():
    values = {"format": FORMAT, "run": {}}
    assert upgraded(values) == values


@pytest.mark.parametrize(
    ("precision", "runtime"),
    [("float32", "torch"), ("bfloat16", "torch-bf16"), ("float16", "torch-fp16")],
)
def test_before_there_were_runtimes_it_was_torch_in_the_reports_precision(precision, runtime):
    old = {
        "format": FORMAT,
        "environment": {"device": "CPU", "precision": precision},
        "timing": [{"batch_size": 1}],
        "cuts": None,
        "live": None,
    }
    before = json.dumps(old)
    new = upgraded(old)
    assert new["environment"] == {"device": "CPU", "precision": precision, "runtime": runtime}
    assert new["cuts"] is new["live"] is None
    assert new["timing"] == old["timing"] and new["verdicts"] == new["runtimes"] == []
    assert json.dumps(old) == before


def test_what_a_report_of_today_says_of_its_runtime_is_kept():
    values = {
        "format": FORMAT,
        "environment": {"runtime": "openvino-bf16", "precision": "bfloat16"},
        "timing": [
            {
                "segment_seconds": [1.0, 0.0, 6.0, 1.0],
                "speedup_range": [1.1, 1.2],
                "networks": {"a": 1},
            }
        ],
        "cuts": {"speedup": {"mean": 1.1, "std": 0.1}, "lost": {"mean": 0.1, "std": 0.0}},
        "live": {"rounding": 0.01},
        "verdicts": [{"kind": "exits"}],
        "runtimes": [{"runtime": "torch"}],
    }
    assert upgraded(values) == values


def test_a_report_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"report.json.* {FORMAT + 1}"):
        read_report(path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": "two"}',
        '{"format": 0}',
        '{"format": 2, "run": []}',
        "null",
        '{"a": NaN}',
    ],
)
def test_what_is_not_a_report_is_one_line(text, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"report\.json") as caught:
        read_report(path)
    assert "\n" not in str(caught.value)


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(UserError, match=r"report\.json"):
        read_report(tmp_path / "report.json")


OLD_PATH = ROOT / "tests" / "evaluation" / "report_format_1.json"  # of a ResNet-20, by 0.1


def test_an_old_report_has_the_sections_of_today():
    """And all that today's classes have, of those that runtimes changed, but for the timing."""
    report = read_report(OLD_PATH)
    assert set(report["environment"]) == {field.name for field in fields(Environment)}
    assert set(report["live"]) == {field.name for field in fields(LiveResult)}
    assert set(report) <= {field.name for field in fields(Report)}
    for row in report["curve_seconds"]:
        assert set(row) == {field.name for field in fields(CurveSeconds)}


def test_an_old_report_is_compared():
    found = read_evaluation(OLD_PATH)
    groups = labelled(group_runs([found], False), None)
    assert found.speedups and found.accuracy.mean > 0.8
    assert f"{100 * found.accuracy.mean:.2f}" in table(groups)


def test_the_reports_in_the_repository_are_read():
    paths = list((ROOT / "cifar10" / "pretrained").glob("*/eval/*/report.json"))
    assert paths and all(read_report(path)["run"]["task"] == "cifar10" for path in paths)
