"""Files and directories that are written whole or not at all, errors of the disk, the lock."""

import errno
import multiprocessing
import os
import resource
import subprocess
import sys

import pytest
import torch
from helpers import refusal

from early_exit.errors import Unavailable, UserError
from early_exit.system import files


class TestWrittenWhole:
    def test_content_arrives(self, tmp_path):
        files.write_text(tmp_path / "new" / "file", "café")
        assert (tmp_path / "new" / "file").read_text() == "café"

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_an_end_in_the_middle_keeps_the_old_file_and_nothing_else(self, tmp_path, error):
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(error), files.atomic_file(path) as file:
            file.write(b"half of the n")
            raise error
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_nothing_is_at_the_path_while_it_is_written(self, tmp_path):
        path = tmp_path / "file"
        with files.atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            assert not path.exists()
        assert path.exists()

    def test_all_may_read_it(self, tmp_path):
        files.write_text(tmp_path / "file", "text")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


class TestMadeWhole:
    def test_it_takes_the_place_of_an_earlier_one(self, tmp_path):
        for name in ("old", "new"):
            with files.atomic_directory(tmp_path / "made") as partial:
                (partial / name).write_text("")
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_a_failure_keeps_the_earlier_one_and_nothing_else(self, tmp_path):
        with files.atomic_directory(tmp_path / "made") as partial:
            (partial / "old").write_text("")
        with pytest.raises(KeyboardInterrupt), files.atomic_directory(tmp_path / "made") as partial:
            (partial / "new").write_text("")
            raise KeyboardInterrupt
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["old"]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_the_remains_of_a_killed_process_are_overwritten(self, tmp_path):
        (tmp_path / ".made.partial").mkdir()
        (tmp_path / ".made.partial" / "stray").write_text("")
        with files.atomic_directory(tmp_path / "made") as partial:
            (partial / "new").write_text("")
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]


class TestWriting:
    @pytest.fixture
    def small_files(self):
        """Files cannot grow past 64 KiB, so that writing fails in the middle of one."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_torchs_own_error_is_reported_as_the_disks(self, small_files, tmp_path):
        with pytest.raises(Unavailable) as caught, files.atomic_file(tmp_path / "file") as file:
            torch.save(torch.zeros(1 << 16), file)
        assert str(tmp_path / "file") in str(caught.value)
        assert os.strerror(errno.EFBIG) in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("number", "kind"),
        [
            (errno.ENOSPC, Unavailable),
            (errno.EDQUOT, Unavailable),
            (errno.EIO, Unavailable),
            (errno.EROFS, UserError),
            (errno.EACCES, UserError),
        ],
    )
    def test_temporary_errors_are_of_another_type_than_permanent_ones(self, tmp_path, number, kind):
        with pytest.raises(UserError) as caught, files.write_errors(tmp_path):
            raise OSError(number, "the reason")
        assert type(caught.value) is kind
        assert str(tmp_path) in str(caught.value) and "the reason" in str(caught.value)

    def test_an_error_without_a_number(self, tmp_path):
        with pytest.raises(Unavailable, match="7 requested and 3 written"):
            with files.write_errors(tmp_path):
                raise OSError("7 requested and 3 written")

    @pytest.mark.parametrize("kind", [RuntimeError, KeyError, KeyboardInterrupt])
    def test_other_errors_pass(self, tmp_path, kind):
        with pytest.raises(kind), files.write_errors(tmp_path):
            raise kind("mine")

    def test_a_user_error_is_not_wrapped_again(self, tmp_path):
        with pytest.raises(UserError, match=r"^mine$"), files.write_errors(tmp_path):
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError:
                raise UserError("mine") from None


class TestLock:
    def test_a_second_holder_is_refused(self, tmp_path):
        with files.locked(tmp_path):
            message = refusal(files.locked(tmp_path).__enter__)
        assert str(tmp_path) in message and "--save-dir" in message

    def test_another_process_holds_it_until_it_ends_however_that_is(self, tmp_path):
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
                files.locked(tmp_path).__enter__()
            process.kill()
        with files.locked(tmp_path):
            assert (tmp_path / ".lock").exists()

    def test_it_is_free_afterwards(self, tmp_path):
        with files.locked(tmp_path):
            pass
        with files.locked(tmp_path):
            pass

    def test_it_is_free_after_an_error(self, tmp_path):
        with pytest.raises(ZeroDivisionError), files.locked(tmp_path):
            raise ZeroDivisionError
        with files.locked(tmp_path):
            pass

    def test_it_makes_the_directory(self, tmp_path):
        with files.locked(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()

    def test_a_forked_child_does_not_keep_it(self, tmp_path):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def linger():
            theirs.send([file.closed for file in files._held])
            theirs.recv()  # until the test ends

        child = context.Process(target=linger, daemon=True)
        with files.locked(tmp_path):
            child.start()
            assert ours.recv() == [True]
            with pytest.raises(Unavailable, match=str(tmp_path)):
                files.locked(tmp_path).__enter__()
        with files.locked(tmp_path):
            assert child.is_alive()
        child.kill()

    def test_a_file_system_without_locks_is_warned_of(self, tmp_path, monkeypatch, caplog):
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", none)
        with files.locked(tmp_path):
            assert str(tmp_path) in caplog.text and "No locks available" in caplog.text

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        message = refusal(files.locked(tmp_path / "file" / "run").__enter__)
        assert str(tmp_path / "file" / "run") in message
