"""Names of classes and runs of any letters, through everything that is written about a run."""

import csv
import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from helpers import CPU, TASK, few_digits, tiny_run

from early_exit import compare, export, predict
from early_exit.choosing.goals import MaxDrop
from early_exit.evaluation.evaluate import evaluate
from early_exit.task import Task
from early_exit.training import checkpoint

CLASSES = (
    "two\nlines",
    os.fsdecode(b"caf\xe9"),
    "\u202eright to left",
    "\u4e2d\u6587 \U0001f600",
    "%s {0} $x^{_",
    "\"quoted' `code`",
    "-dash",
    "long " * 60,
    "<b>&amp;|*_",
    "\u2028",
)
ODD = Task(
    TASK.build_network,
    lambda settings: dataclasses.replace(few_digits(settings.split_seed), classes=CLASSES),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An evaluated run of an odd name."""
    name = "-run `%s`\n\u4e2d" + ("" if sys.platform == "darwin" else os.fsdecode(b"\xff"))
    directory = tiny_run(tmp_path_factory.mktemp("odd") / name, ODD)
    evaluate(directory, ODD, MaxDrop(0.1), overrides=CPU, live=False, name="odd \U0001f600")
    return directory


def test_the_checkpoint_and_the_report_have_the_names(run):
    (report,) = run.glob("eval/*/report.json")
    names = [row["name"] for row in json.loads(report.read_text("ascii"))["classes"]]
    assert checkpoint.load(run)["classes"] == list(CLASSES)
    assert set(names) <= set(CLASSES)


def test_the_pages_are_whole_and_in_utf_8(run):
    (directory,) = run.glob("eval/*")
    assert {"gallery.png", "report.html"} <= {path.name for path in directory.iterdir()}
    page = (directory / "report.html").read_text("utf-8")
    assert "<b>&amp;|*_" not in page and "\u202e" not in page
    lines = (directory / "report.md").read_text("utf-8").split("\n")
    (head,) = [index for index, line in enumerate(lines) if line.startswith("| class |")]
    table = lines[head : lines.index("", head)]
    assert len(table) == 2 + len(CLASSES)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


def test_predictions_are_one_line_each(run, photos, capsys, monkeypatch):
    flags = ("--device", "cpu", "--threads", "1", "--task", "helpers:TASK")
    monkeypatch.setattr("helpers.TASK", ODD)
    predict.main([str(run), str(photos), *flags])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 7 + 1
    predict.main([str(run), str(photos), "--json", *flags])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 7 and {one["class"] for one in found} <= set(CLASSES)


def test_a_comparison_and_a_copy(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("helpers.TASK", ODD)
    compare.main([str(run), "--out", str(tmp_path / "out \n")])
    rows = [*csv.reader(io.StringIO((tmp_path / "out \n" / "table.csv").read_text("utf-8")))]
    assert len(rows) == 2 and len(rows[0]) == len(rows[1])
    assert (tmp_path / "out \n" / "curves.png").exists()
    export.main([str(run), str(tmp_path / "copy"), "--task", "helpers:TASK"])
    assert (tmp_path / "copy" / "README.md").read_text("utf-8")
