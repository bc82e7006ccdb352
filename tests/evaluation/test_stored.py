"""Evaluations read back from reports."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_names, refusal
from reports import made_report, timing

from early_exit.evaluation.report import (
    Choice,
    CurvePoint,
    Cuts,
    Environment,
    ExitRow,
    Report,
    RunInfo,
)
from early_exit.evaluation.stored import Value, find_reports, read_evaluation
from early_exit.inference.latency import BatchSeconds, Timing


def test_a_run_an_evaluation_or_a_report(made_run):
    directory = made_run("net", evaluation="a")
    for path in (directory, directory / "eval" / "a", directory / "eval" / "a" / "report.json"):
        assert find_reports(path, ()) == [directory / "eval" / "a" / "report.json"]


def test_evaluations_are_taken_by_name_in_the_order_asked_for(made_run):
    directory = made_run("net", evaluation="a")
    for name in ("b", "c", ".d.partial"):
        (directory / "eval" / name).mkdir()
        (directory / "eval" / name / "report.json").write_text(json.dumps(made_report()))
    assert [path.parent.name for path in find_reports(directory, ())] == ["a", "b", "c"]
    assert [path.parent.name for path in find_reports(directory, ("c", "a"))] == ["c", "a"]
    assert_names(refusal(find_reports, directory, ("e",)), directory, "e", "a", "b", "c")


def test_a_run_without_evaluation_is_told_the_command(tmp_path):
    (tmp_path / "versions.json").write_text(json.dumps({"command": ["folder/trainer.py", "-b"]}))
    assert f"python folder/eval.py {tmp_path}" in refusal(find_reports, tmp_path, ())
    (tmp_path / "versions.json").unlink()
    assert f"python eval.py {tmp_path}" in refusal(find_reports, tmp_path, ())
    assert_names(refusal(find_reports, tmp_path / "absent", ()), tmp_path / "absent")


@pytest.mark.parametrize("text", ["", '{"run": "torn', '{"test": NaN}', "[]", "7", "\xff"])
def test_a_torn_or_foreign_report_is_named(made_run, text):
    path = made_run("net") / "eval" / "budget-50" / "report.json"
    path.write_bytes(text.encode("latin-1"))
    message = refusal(read_evaluation, path)
    assert_names(message, path, "eval.py")


@pytest.mark.parametrize("field", ["exits", "curve", "test", "plain_macs", "run", "choice"])
def test_an_incomplete_report_is_named_with_what_it_lacks(made_run, field):
    path = made_run("net") / "eval" / "budget-50" / "report.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != field}))
    assert_names(refusal(read_evaluation, path), path, f"'{field}'", "eval.py")
    path.write_text(json.dumps({**values, field: None}))
    assert_names(refusal(read_evaluation, path), path, "eval.py")


@pytest.mark.parametrize(("section", "field"), [("run", "dataset"), ("choice", "goal")])
def test_a_section_without_what_is_needed_is_named(made_run, section, field):
    path = made_run("net") / "eval" / "budget-50" / "report.json"
    values = json.loads(path.read_text())
    del values[section][field]
    path.write_text(json.dumps(values))
    assert_names(refusal(read_evaluation, path), path, f"'{field}'", "eval.py")


def test_an_older_report_needs_no_more_than_what_is_read(made_run):
    path = made_run("net") / "eval" / "budget-50" / "report.json"
    values = json.loads(path.read_text())
    for section, field in (
        (values["choice"], "criterion"),
        (values["choice"], "calibrated"),
        (values["environment"], "device"),
        (values["run"], "name"),
        (values, "cuts"),
        (values, "timing"),
    ):
        del section[field]
    path.write_text(json.dumps(values))
    assert read_evaluation(path).accuracy == Value(0.9)


def test_a_report_of_version_0_1_is_read_as_one_of_today(made_run):
    path = made_run("net", timing=[timing(8, 3.0, 2.0)]) / "eval" / "budget-50" / "report.json"
    today, values = read_evaluation(path), json.loads(path.read_text())
    run, choice, environment = (values.pop(name) for name in ("run", "choice", "environment"))
    del values["format"]
    old = {**run, **choice, **environment, **values}
    old |= {"run": old.pop("name"), "chosen_by": old.pop("goal"), "door": "cifar10.trainer:DOOR"}
    path.write_text(json.dumps(old))
    for name, value in vars(read_evaluation(path)).items():
        assert np.array_equal(value, getattr(today, name)), name


def test_what_is_read_is_what_a_report_has():
    values = made_report()
    fields = {
        Report: values.keys(),
        RunInfo: values["run"].keys(),
        Choice: values["choice"].keys(),
        Environment: values["environment"].keys(),
        ExitRow: ("name", "accuracy"),
        CurvePoint: ("test",),
        Cuts: ("count", "accuracy", "macs_share", "final_accuracy"),
        BatchSeconds: ("total",),
        Timing: ("batch_size", "plain", "live"),
    }
    for kind, names in fields.items():
        assert set(names) <= {field.name for field in dataclasses.fields(kind)}


def test_a_relative_path_tells_the_run_too(made_run, monkeypatch):
    run = made_run("mine", seed=3)
    (directory,) = (run / "eval").iterdir()
    for where, path in (
        (run / "eval", directory.name),
        (directory, "."),
        (directory, "report.json"),
        (run, "."),
    ):
        monkeypatch.chdir(where)
        (report,) = find_reports(Path(path), ())
        found = read_evaluation(report)
        assert (found.run, found.seed, found.name) == (run, 3, directory.name)
