"""Runs as processes of their own, ended by signals and kills, then finished."""

import itertools
import json
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    TASK,
    TINY,
    assert_names,
    assert_same_run,
    finish,
    start,
)

from cifar10 import trainer
from early_exit.training import checkpoint
from early_exit.training.checkpoint import NAME

LONG = (*TINY, "--epochs", "6", "--deterministic", "-p", "1")  # of six steps each


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The run of the LONG flags, never stopped. Not to be changed."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TASK", TASK)
        trainer.main([*LONG, "--save-dir", str(directory)])
    torch.use_deterministic_algorithms(before)
    return directory


@pytest.mark.slow
class TestProcesses:
    """One run, ended three times by three signals and then let finish."""

    @pytest.fixture(scope="class")
    @classmethod
    def ends(cls, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
        """Exit code, stderr, and a copy of the directory at each end."""
        root = tmp_path_factory.mktemp("processes")
        flags = (*LONG, "--save-dir", root / "run", "--resume", "auto")
        ends = {}
        for name, batch in (("SIGTERM", 8), ("SIGINT", 13), ("SIGKILL", 4), ("none", 0)):
            done = finish(start("tests/helpers.py", name, batch, *flags, cwd=root))
            ends[name] = done.returncode, done.stderr, root / name
            shutil.copytree(root / "run", root / name)
        return ends

    @pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
    def test_a_signal_that_asks_is_one_line_and_its_code(self, ends, name, code):
        returncode, message, _ = ends[name]
        assert returncode == code
        assert message.startswith("trainer.py: ") and message.count("\n") == 1
        assert_names(message, code - 128)
        assert "--resume" in message

    # batch 8 is step 2 of epoch 1, batch 9 + 13 = 22 is step 4 of epoch 3, counted from 0
    @pytest.mark.parametrize(("name", "epoch", "step"), [("SIGTERM", 1, 3), ("SIGINT", 3, 5)])
    def test_it_is_saved_after_that_very_step(self, ends, name, epoch, step):
        position = checkpoint.load(ends[name][2])["position"]
        assert position == {"phase": 0, "epoch": epoch, "step": step}

    def test_after_a_kill_the_last_whole_epoch_is_there(self, ends):
        code, _, directory = ends["SIGKILL"]
        assert code == -signal.SIGKILL
        position = checkpoint.newest(directory)[1]["position"]
        assert position == {"phase": 0, "epoch": 4, "step": 0}

    def test_the_end_is_the_same_as_without_them(self, ends, uninterrupted):
        code, message, directory = ends["none"]
        assert (code, message) == (0, "")
        assert_same_run(directory, uninterrupted)


LIMIT = 600  # seconds, for a process that hangs


def wait_for(process, event: Callable[[str], bool]) -> bool:
    """Reads what a process writes until `event` is true of a line; false if it ends before."""
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    try:
        return any(event(line) for line in process.stdout)
    finally:
        watchdog.cancel()


def wait_until(process, event: Callable[[], bool]) -> bool:
    """Looks until `event` is true; false if the process ends before."""
    end = time.monotonic() + LIMIT
    while not event():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the process hangs"
        time.sleep(0.001)
    return True


@pytest.mark.slow
class TestManyKills:
    """Killed from outside, wherever that catches it."""

    def test_at_random_moments(self, uninterrupted, tmp_path):
        """After a random number of lines; a resumed run writes one for every step."""
        rng, caught = random.Random(0), 0
        flags = ("none", 0, *LONG, "--save-dir", tmp_path / "run", "--resume", "auto")
        for _ in range(8):
            lines = itertools.count(1)
            process = start("tests/helpers.py", *flags, cwd=tmp_path)
            wanted = rng.randrange(10, 30)
            caught += wait_for(process, lambda _: next(lines) == wanted)  # noqa: B023
            process.kill()
            finish(process)
        assert caught >= 2
        done = finish(start("tests/helpers.py", *flags, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_while_a_checkpoint_is_written(self, uninterrupted, tmp_path):
        """Killed as soon as the file under its temporary name is seen."""
        flags = ("none", 0, *LONG, "--save-dir", tmp_path / "run", "--resume", "auto")

        def half_written() -> set[Path]:
            return {*(tmp_path / "run").glob(f".{NAME}.new.*")}

        caught = 0
        for _ in range(5):
            before = half_written()  # by the process that was killed last
            process = start("tests/helpers.py", *flags, cwd=tmp_path)
            caught += wait_until(process, lambda: half_written() - before)  # noqa: B023
            process.kill()
            finish(process)
        assert caught >= 1
        done = finish(start("tests/helpers.py", *flags, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_the_script_itself_on_the_whole_digits(self, tmp_path):
        flags = (
            "--dataset",
            "digits",
            "--epochs",
            "2",
            "-b",
            "128",
            "--regime",
            "mixed",
            "--backbone-epochs",
            "1",
            "--deterministic",
            "--threads",
            "1",
            "--amp",
            "off",
            "--device",
            "cpu",
            "-p",
            "1",
        )
        script, resumed = "cifar10/trainer.py", ("--save-dir", tmp_path / "run", "--resume", "auto")
        whole = start(script, *flags, "--save-dir", tmp_path / "whole", cwd=tmp_path)
        assert finish(whole).returncode == 0
        # in the first epoch, at its fifth step; and after the first epoch of the second phase
        path = tmp_path / "run" / "metrics.jsonl"
        moments = (
            lambda line: re.search(r"\b5\b.{1,4}\b9\b", line),
            lambda _: path.exists() and '"joint"' in path.read_text(),
        )
        for moment in moments:
            process = start(script, *flags, *resumed, cwd=tmp_path)
            assert wait_for(process, moment)
            process.kill()
            finish(process)
        done = finish(start(script, *flags, *resumed, cwd=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        flags = ("--threads", "1", "--timing-images", "32", "--batch-sizes", "8")
        done = finish(start("cifar10/eval.py", "run", *flags, cwd=tmp_path))
        assert done.returncode == 0 and "Traceback" not in done.stderr
        (directory,) = (tmp_path / "run" / "eval").iterdir()
        assert str(directory.relative_to(tmp_path) / "report.md") in done.stdout
        assert json.loads((directory / "report.json").read_text())["live"]["images"] == 360
        assert (directory / "accuracy_vs_macs.png").exists()
