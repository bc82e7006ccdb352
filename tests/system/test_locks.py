"""The lock of a directory."""

import errno
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import refusal

from early_exit.errors import Unavailable
from early_exit.system import locks


def test_a_second_holder_is_refused(tmp_path):
    with locks.locked(tmp_path):
        message = refusal(locks.locked(tmp_path).__enter__)
    assert str(tmp_path) in message and "--save-dir" in message


def test_another_process_holds_it_until_it_ends_however_that_is(tmp_path):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{holder}; print('held', flush=True); input()",
            tmp_path / ".lock",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Unavailable, match=str(tmp_path)):
            locks.locked(tmp_path).__enter__()
        process.kill()
    with locks.locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_it_is_free_afterwards(tmp_path):
    with locks.locked(tmp_path):
        pass
    with locks.locked(tmp_path):
        pass


def test_it_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locks.locked(tmp_path):
        raise ZeroDivisionError
    with locks.locked(tmp_path):
        pass


def test_it_makes_the_directory(tmp_path):
    with locks.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()


def test_a_forked_child_does_not_keep_it(tmp_path):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def linger():
        theirs.send([file.closed for file in locks._held])
        theirs.recv()  # until the test ends

    child = context.Process(target=linger, daemon=True)
    with locks.locked(tmp_path):
        child.start()
        assert ours.recv() == [True]
        with pytest.raises(Unavailable, match=str(tmp_path)):
            locks.locked(tmp_path).__enter__()
    with locks.locked(tmp_path):
        assert child.is_alive()
    child.kill()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.locked(tmp_path):
        assert str(tmp_path) in caplog.text and "No locks available" in caplog.text


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(locks.locked(tmp_path / "file" / "run").__enter__)
    assert str(tmp_path / "file" / "run") in message


def test_a_lock_of_a_colleague_can_be_taken(tmp_path, monkeypatch):
    """It may be read, but not written."""
    path_open = Path.open

    def refused(path, mode="r", *arguments, **options):
        if mode != "r":
            raise PermissionError(errno.EACCES, "not yours")
        return path_open(path, mode, *arguments, **options)

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(Path, "open", refused)
    with locks.locked(tmp_path), pytest.raises(Unavailable):
        locks.locked(tmp_path).__enter__()
