"""The disk: whole files and directories, what a full one says, the lock."""

import errno
import multiprocessing
import os
import resource
import subprocess
import sys

import pytest
import torch
from scripts import refusal

from early_exit import disk
from early_exit.errors import Unavailable, UserError


class TestWrittenWhole:
    def test_content_arrives(self, tmp_path):
        disk.write_text(tmp_path / "new" / "file", "café")
        assert (tmp_path / "new" / "file").read_text() == "café"

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_an_end_in_the_middle_leaves_the_old_file_and_nothing_else(self, tmp_path, error):
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(error), disk.written_whole(path) as file:
            file.write(b"half of the n")
            raise error
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_nothing_is_at_the_path_while_it_is_written(self, tmp_path):
        path = tmp_path / "file"
        with disk.written_whole(path) as file:
            file.write(b"half")
            file.flush()
            assert not path.exists()
        assert path.exists()

    def test_all_may_read_it(self, tmp_path):
        disk.write_text(tmp_path / "file", "text")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


class TestMadeWhole:
    def test_it_takes_the_place_of_an_earlier_one(self, tmp_path):
        for name in ("old", "new"):
            with disk.made_whole(tmp_path / "made") as partial:
                (partial / name).write_text("")
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_a_failure_leaves_the_earlier_one_and_nothing_else(self, tmp_path):
        with disk.made_whole(tmp_path / "made") as partial:
            (partial / "old").write_text("")
        with pytest.raises(KeyboardInterrupt), disk.made_whole(tmp_path / "made") as partial:
            (partial / "new").write_text("")
            raise KeyboardInterrupt
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["old"]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_what_a_killed_process_left_is_no_hindrance(self, tmp_path):
        (tmp_path / ".made.partial").mkdir()
        (tmp_path / ".made.partial" / "stray").write_text("")
        with disk.made_whole(tmp_path / "made") as partial:
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

    def test_torchs_own_error_is_told_as_the_disks(self, small_files, tmp_path):
        with pytest.raises(Unavailable) as caught, disk.written_whole(tmp_path / "file") as file:
            torch.save(torch.zeros(1 << 16), file)
        assert str(tmp_path / "file") in str(caught.value)
        assert os.strerror(errno.EFBIG) in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("number", "kind"),
        [
            (errno.ENOSPC, Unavailable), (errno.EDQUOT, Unavailable), (errno.EIO, Unavailable),
            (errno.EROFS, UserError), (errno.EACCES, UserError),
        ],
    )
    def test_what_may_pass_is_told_from_what_will_not(self, tmp_path, number, kind):
        with pytest.raises(UserError) as caught, disk.writing(tmp_path):
            raise OSError(number, "the reason")
        assert type(caught.value) is kind
        assert str(tmp_path) in str(caught.value) and "the reason" in str(caught.value)

    def test_a_disk_that_does_not_say_its_number(self, tmp_path):
        with pytest.raises(Unavailable, match="7 requested and 3 written"):
            with disk.writing(tmp_path):
                raise OSError("7 requested and 3 written")

    @pytest.mark.parametrize("kind", [RuntimeError, KeyError, KeyboardInterrupt])
    def test_other_errors_pass(self, tmp_path, kind):
        with pytest.raises(kind), disk.writing(tmp_path):
            raise kind("mine")

    def test_what_was_told_already_is_not_told_again(self, tmp_path):
        with pytest.raises(UserError, match="^mine$"), disk.writing(tmp_path):
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError:
                raise UserError("mine") from None


class TestLock:
    def test_a_second_holder_is_refused(self, tmp_path):
        with disk.locked(tmp_path):
            message = refusal(disk.locked(tmp_path).__enter__)
        assert str(tmp_path) in message and "--save-dir" in message

    def test_another_process_holds_it_until_it_ends_however_that_is(self, tmp_path):
        holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
        with subprocess.Popen(
            [sys.executable, "-c", f"{holder}; print('held', flush=True); input()",
             tmp_path / ".lock"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(Unavailable, match=str(tmp_path)):
                disk.locked(tmp_path).__enter__()
            process.kill()
        with disk.locked(tmp_path):
            assert (tmp_path / ".lock").exists()

    def test_it_is_free_afterwards(self, tmp_path):
        with disk.locked(tmp_path):
            pass
        with disk.locked(tmp_path):
            pass

    def test_it_is_free_after_an_error(self, tmp_path):
        with pytest.raises(ZeroDivisionError), disk.locked(tmp_path):
            raise ZeroDivisionError
        with disk.locked(tmp_path):
            pass

    def test_it_makes_the_directory(self, tmp_path):
        with disk.locked(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()

    def test_a_forked_child_does_not_keep_it(self, tmp_path):
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def linger():
            theirs.send([file.closed for file in disk._held])
            theirs.recv()  # until the test ends

        child = context.Process(target=linger, daemon=True)
        with disk.locked(tmp_path):
            child.start()
            assert ours.recv() == [True]
            with pytest.raises(Unavailable, match=str(tmp_path)):
                disk.locked(tmp_path).__enter__()
        with disk.locked(tmp_path):
            assert child.is_alive()
        child.kill()

    def test_a_file_system_without_locks_is_warned_of(self, tmp_path, monkeypatch, caplog):
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(disk.fcntl, "flock", none)
        with disk.locked(tmp_path):
            assert str(tmp_path) in caplog.text and "No locks available" in caplog.text

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        message = refusal(disk.locked(tmp_path / "file" / "run").__enter__)
        assert str(tmp_path / "file" / "run") in message
