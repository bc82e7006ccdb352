"""Evaluations of a run that is only read."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import CPU, TASK, assert_names, refusal, run_main

from early_exit import compare, export
from early_exit.choosing.goals import Budget, MaxDrop
from early_exit.classifier import load
from early_exit.evaluation.evaluate import evaluate
from early_exit.output import prepare_output, source_run
from early_exit.training import checkpoint


def contents(directory: Path) -> dict[Path, int]:
    """Every path below a directory, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in (directory, *directory.rglob("*"))}


@pytest.fixture
def read_only(evaluated_run, tmp_path, monkeypatch):
    """A run without records and evaluations, which the system says cannot be written."""
    run = shutil.copytree(evaluated_run, tmp_path / "mounted" / "run")
    for name in ("records", "eval"):
        shutil.rmtree(run / name)
    real = os.access

    def access(path, mode, **options) -> bool:
        inside = Path(path).resolve().is_relative_to(run.parent)
        return real(path, mode, **options) and not (inside and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    return run


def quickly(run: Path, out: Path | None, goal=None, **options) -> Path:
    """Evaluates without measuring; returns the directory."""
    options = {"overrides": CPU, "live": False, "draw": False, **options}
    return evaluate(run, TASK, goal or MaxDrop(0.005), out=out, **options)[1]


class TestReadOnly:
    def test_the_flag_is_named_before_anything_is_loaded(self, read_only, monkeypatch):
        monkeypatch.setattr("early_exit.evaluation.evaluate.load_run", None)
        message = refusal(quickly, read_only, None)
        assert_names(message, read_only, "--out")

    def test_the_run_is_only_read_and_the_output_stands_for_it(
        self, read_only, tmp_path, monkeypatch, capsys
    ):
        out, before = tmp_path / "out", contents(read_only)
        directory = quickly(read_only, out)
        assert directory.parent == out / "eval"
        assert {path.name for path in (out / "records").iterdir()} >= {"val-off", "test-off"}
        assert json.loads((directory / "report.json").read_text())["run"]["name"] == "run"

        assert load(out, task=TASK, device="cpu").policy.exit_names[-1] == "final"
        assert load(directory, task=TASK, device="cpu").loaded.classes
        quickly(out, None, Budget(0.8), name="second")
        monkeypatch.setattr(export, "load", lambda run, task, **_: load(run, task=TASK))
        export.main([str(out), str(tmp_path / "exported"), "--eval", "second"])
        assert (
            load(tmp_path / "exported", task=TASK).policy == load(out, "second", task=TASK).policy
        )
        code, _, err = run_main(
            compare.main, "early_exit.compare", monkeypatch, capsys, out, "--no-plots"
        )
        assert (code, err) == (0, "")
        assert contents(read_only) == before

    def test_records_of_the_run_are_used(self, evaluated_run, tmp_path):
        before = contents(evaluated_run)
        quickly(evaluated_run, tmp_path / "out")
        assert not (tmp_path / "out" / "records" / "val-off").exists()
        assert contents(evaluated_run) == before


class TestOutput:
    def test_the_run_itself(self, evaluated_copy):
        for out in (None, evaluated_copy, evaluated_copy / "eval" / ".."):
            assert prepare_output(evaluated_copy, out) == evaluated_copy
        assert source_run(evaluated_copy) == evaluated_copy
        assert not (evaluated_copy / "run.txt").exists()

    def test_a_run_that_has_no_checkpoint_yet(self, evaluated_run, evaluated_copy):
        """Otherwise it would stand for the other one from then on."""
        (evaluated_copy / checkpoint.NAME).unlink()
        message = refusal(prepare_output, evaluated_run, evaluated_copy)
        assert_names(message, evaluated_copy, "--out")
        assert not (evaluated_copy / "run.txt").exists()

    def test_the_run_of_an_output(self, evaluated_copy, tmp_path):
        out = prepare_output(evaluated_copy, tmp_path / "out")
        assert prepare_output(out) == out
        assert prepare_output(out, evaluated_copy) == evaluated_copy

    def test_of_another_run(self, evaluated_run, evaluated_copy, tmp_path):
        out = prepare_output(evaluated_run, tmp_path / "out")
        assert prepare_output(evaluated_run, out) == prepare_output(out, None) == out
        assert_names(refusal(prepare_output, evaluated_copy, out), out, evaluated_run, "--out")
        assert_names(refusal(prepare_output, evaluated_copy, evaluated_run), "--out")

    def test_a_file_is_no_output(self, evaluated_run, tmp_path):
        (tmp_path / "out").touch()
        assert_names(refusal(prepare_output, evaluated_run, tmp_path / "out"), "--out")

    def test_a_run_that_has_moved_is_named(self, evaluated_copy, tmp_path):
        out = prepare_output(evaluated_copy, tmp_path / "out")
        evaluated_copy.rename(tmp_path / "moved")
        assert_names(refusal(quickly, out, None), evaluated_copy)
