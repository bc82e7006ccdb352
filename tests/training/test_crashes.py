"""A killed process or a damaged checkpoint: the run goes on from the last good one."""

import itertools
import logging
import os
import re
from pathlib import Path

import pytest
from helpers import (
    Crash,
    assert_names,
    assert_same_run,
    at_batch,
    comparable_journal,
    crash,
    mixed_config,
    read_journal,
    resume_run,
    slowly,
)

from early_exit.errors import Unavailable, UserError
from early_exit.training.checkpoint import NAME, PREVIOUS


class TestCrashed:
    """A killed process: the run goes on from the last checkpoint."""

    # the first step of all, inside the first phase, the first step of the second, inside it
    @pytest.mark.parametrize("step", [0, 3, 4, *slowly(1, 6, 8)])
    def test_before_any_step(self, monkeypatch, whole, tmp_path, step):
        at_batch(monkeypatch, step, crash)
        with pytest.raises(Crash):
            resume_run(tmp_path / "run")
        resume_run(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole)

    def test_between_the_phases_of_a_frozen_run(self, monkeypatch, whole_frozen, tmp_path):
        config = mixed_config(regime="frozen")
        at_batch(monkeypatch, 3, crash)
        with pytest.raises(Crash):
            resume_run(tmp_path / "run", config)
        resume_run(tmp_path / "run", config)
        assert_same_run(tmp_path / "run", whole_frozen)

    # two epochs: the first moves two files, the second also the checkpoint before it
    @pytest.mark.parametrize("rename", range(5))
    def test_while_a_checkpoint_is_moved(self, monkeypatch, whole_joint, tmp_path, rename):
        replace, count = os.replace, itertools.count()

        def counted(source, target):
            if Path(target).name.startswith("checkpoint") and next(count) == rename:
                raise Crash
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            with pytest.raises(Crash):
                resume_run(tmp_path / "run", mixed_config(regime="joint"))
        resume_run(tmp_path / "run", mixed_config(regime="joint"))
        assert_same_run(tmp_path / "run", whole_joint)

    def test_with_a_torn_line_in_the_journal(self, monkeypatch, whole, tmp_path):
        at_batch(monkeypatch, 7, crash)
        with pytest.raises(Crash):
            resume_run(tmp_path / "run")
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"phase": "joint", "phase_in')
        resume_run(tmp_path / "run")
        assert comparable_journal(tmp_path / "run") == comparable_journal(whole)

    def test_with_a_record_that_is_ahead_of_the_checkpoint(
        self, monkeypatch, whole_joint, tmp_path
    ):
        """The record is written before the checkpoint; save_every may put epochs between them."""
        config = mixed_config(regime="joint", save_every=2)
        at_batch(monkeypatch, 4, crash)
        with pytest.raises(Crash):
            resume_run(tmp_path / "run", config)
        assert len(read_journal(tmp_path / "run")) == 1
        resume_run(tmp_path / "run", config)
        assert [record["epoch"] for record in read_journal(tmp_path / "run")] == [0, 1]
        assert_same_run(tmp_path / "run", whole_joint)

    def test_half_files_are_swept_away(self, monkeypatch, tmp_path):
        at_batch(monkeypatch, 7, crash)
        with pytest.raises(Crash):
            resume_run(tmp_path / "run")
        (tmp_path / "run" / f".{NAME}.new.x1y2").write_bytes(b"half")
        resume_run(tmp_path / "run")
        assert not list((tmp_path / "run").glob(f".{NAME}*"))


class TestDamage:
    def test_a_torn_newest_falls_back_with_a_warning_and_finishes(self, half, whole, caplog):
        half.joinpath(PREVIOUS).write_bytes((half / NAME).read_bytes())
        content = (half / NAME).read_bytes()
        (half / NAME).write_bytes(content[: len(content) // 2])
        resume_run(half)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert_names(warning, half / NAME, PREVIOUS)
        assert_same_run(half, whole)

    def test_none_whole_stops_and_is_no_fresh_start(self, half):
        for name in (NAME, PREVIOUS):
            if (half / name).exists():
                (half / name).write_bytes(b"torn")
        before = (half / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match=re.escape(str(half))):
            resume_run(half)
        assert (half / "metrics.jsonl").read_bytes() == before


def test_two_processes_in_one_run_directory_are_refused(monkeypatch, tmp_path):
    def second() -> None:
        with pytest.raises(Unavailable, match=re.escape(str(tmp_path / "run"))):
            resume_run(tmp_path / "run")
        crash()

    at_batch(monkeypatch, 1, second)
    with pytest.raises(Crash):
        resume_run(tmp_path / "run")
