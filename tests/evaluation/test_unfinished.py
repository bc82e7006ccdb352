"""A run that is not finished, or was trained on since, says so wherever its numbers are shown."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from helpers import CPU, TASK, assert_names, run_main, tiny_run

from early_exit import compare, export
from early_exit.choosing.goals import MaxDrop
from early_exit.classifier import load
from early_exit.config import OptimConfig
from early_exit.evaluation.evaluate import evaluate
from early_exit.evaluation.stored import read_evaluation
from early_exit.evaluation.upgrade import read_report
from early_exit.training import checkpoint

HOW_FAR = "epoch 1 of 3, phase joint"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A run after one epoch of three, with a running average, evaluated. Not to be changed."""
    optim = OptimConfig(epochs=3, batch_size=8, lr=0.05, ema=0.9)
    run = tiny_run(tmp_path_factory.mktemp("unfinished") / "run", TASK, optim)
    state = checkpoint.load(run)
    checkpoint.save(run, {**state, "position": {"phase": 0, "epoch": 1, "step": 0}})
    (run / checkpoint.PREVIOUS).unlink()
    evaluate(run, TASK, MaxDrop(0.0), overrides=CPU, live=False, draw=True, name="mine")
    return run


@pytest.fixture
def run(evaluated, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(evaluated, tmp_path / "run")


def report_file(run: Path) -> Path:
    return run / "eval" / "mine" / "report.json"


def finish(run: Path, changed: bool) -> None:
    """Ends the training of a run, with weights that changed or not."""
    state = checkpoint.load(run)
    average = {name: value + 1 if changed else value for name, value in state["average"].items()}
    end = {"phase": 1, "epoch": 0, "step": 0}
    checkpoint.save(run, {**state, "position": end, "average": average})


def test_its_report_and_page_begin_with_it(run):
    assert json.loads(report_file(run).read_text())["run"]["unfinished"] == HOW_FAR
    for name in ("report.md", "report.html"):
        text = report_file(run).with_name(name).read_text()
        assert "not finished" in text and HOW_FAR in text
        assert text.index(HOW_FAR) < text.index(" on test at ")
    assert "running average" in report_file(run).with_name("report.md").read_text()


def test_older_reports_say_it_in_their_weights(run):
    values = json.loads(report_file(run).read_text())
    assert values["run"].pop("unfinished") and values["choice"].pop("left_out") == []
    report_file(run).write_text(json.dumps(values))
    assert read_report(report_file(run))["run"]["unfinished"] == HOW_FAR
    values["run"]["weights"] = "weights 0123456789abcdef of the last epoch, running average"
    report_file(run).write_text(json.dumps(values))
    assert read_report(report_file(run))["run"]["unfinished"] is None
    assert read_evaluation(report_file(run)).cautions == []


def test_a_comparison_marks_it(run, tmp_path, monkeypatch, capsys, caplog):
    arguments = (run, "--no-plots", "--out", tmp_path / "out")
    code, out, _ = run_main(compare.main, "compare", monkeypatch, capsys, *arguments)
    assert code == 0 and f"not finished: {HOW_FAR}" in out
    assert any(HOW_FAR in entry.message for entry in caplog.records if entry.levelname == "WARNING")
    for name in ("table.md", "table.csv", "table.json"):
        assert HOW_FAR in (tmp_path / "out" / name).read_text()
    (found,) = json.loads((tmp_path / "out" / "table.json").read_text())["groups"]
    assert [(e["unfinished"], e["outdated"]) for e in found["evaluations"]] == [(HOW_FAR, False)]


@pytest.mark.parametrize("changed", [False, True])
def test_a_comparison_tells_whether_the_run_was_trained_on_since(run, changed):
    finish(run, changed)
    (evaluation,) = compare.read_evaluations([run], [])
    assert evaluation.outdated == changed


def test_a_report_without_its_checkpoint_is_compared(run):
    (run / checkpoint.NAME).unlink()
    assert not compare.read_evaluations([run], [])[0].outdated
    (run / checkpoint.NAME).write_bytes(b"torn")
    assert not compare.read_evaluations([run], [])[0].outdated


def test_whoever_uses_its_weights_is_warned(run, tmp_path, caplog):
    load(run, task=TASK)
    export.main([str(run), str(tmp_path / "export"), "--task", "helpers:TASK"])
    load(tmp_path / "export", task=TASK)
    warned = [entry.message for entry in caplog.records if entry.levelno == logging.WARNING]
    assert sum(HOW_FAR in message for message in warned) == 3
    assert_names((tmp_path / "export" / "README.md").read_text(), "not finished", HOW_FAR)


def test_a_finished_run_says_nothing(run, caplog):
    finish(run, changed=False)
    evaluate(run, TASK, MaxDrop(0.0), overrides=CPU, live=False, draw=False, name="mine")
    assert json.loads(report_file(run).read_text())["run"]["unfinished"] is None
    load(run, task=TASK)
    assert "not finished" not in report_file(run).with_name("report.md").read_text() + caplog.text
