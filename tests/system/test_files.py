"""Files and directories that are written whole or not at all, errors of the disk, the lock."""

import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

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

    @pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
    def test_who_may_read_it_is_what_the_umask_says(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            files.write_text(tmp_path / "file", "text")
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask

    def test_the_bytes_of_a_name_that_are_not_utf_8_are_escaped(self, tmp_path):
        files.write_text(tmp_path / "file", os.fsdecode(b"caf\xe9 \xc3\xa9"))
        assert (tmp_path / "file").read_bytes() == b"caf\\udce9 \xc3\xa9"

    @pytest.mark.parametrize("error", [FileNotFoundError(2, "mine"), RuntimeError("mine")])
    def test_an_error_of_something_else_is_not_of_the_file(self, tmp_path, error):
        with pytest.raises(type(error), match="mine"), files.atomic_file(tmp_path / "file"):
            raise error
        with pytest.raises(type(error), match="mine"), files.atomic_directory(tmp_path / "made"):
            raise error
        assert list(tmp_path.iterdir()) == []


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


def whole(directory) -> str:
    """The one file of a directory that was written whole; its content tells that it is."""
    (path,) = directory.iterdir()
    assert path.read_text() == f"all of {path.name}"
    return path.name


def write(directory, name: str) -> None:
    with files.atomic_directory(directory) as partial:
        (partial / name).write_text(f"all of {name}")


class Killed(BaseException):
    pass


class TestKilled:
    """A process that is killed while it replaces a directory does nothing more, no cleaning."""

    CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "open")

    def run_until_killed(self, monkeypatch, directory, call: int) -> bool:
        """Replaces `directory` and is killed before a system call; false if there is none."""
        count = itertools.count()

        def counted(name):
            real = getattr(os, name)

            def counting(*arguments, **options):
                if next(count) >= call:
                    raise Killed
                return real(*arguments, **options)

            return counting

        with monkeypatch.context() as patch:
            for name in self.CALLS:
                patch.setattr(os, name, counted(name))
            try:
                write(directory, "new")
            except Killed:
                return True
        return False

    @pytest.mark.parametrize("earlier", [True, False])
    def test_nothing_is_lost_whenever_that_is(self, monkeypatch, tmp_path, earlier):
        seen = set()
        for call in itertools.count():
            directory = tmp_path / str(call) / "made"
            directory.parent.mkdir()
            if earlier:
                write(directory, "old")
            killed = self.run_until_killed(monkeypatch, directory, call)
            files.restore_all(directory.parent)  # as the next reader does
            seen.add(whole(directory) if directory.exists() else None)
            write(directory, "newest")
            assert whole(directory) == "newest"
            assert list(directory.parent.iterdir()) == [directory]
            if not killed:
                break
        assert call > 5
        assert seen == {"old" if earlier else None, "new"}

    def test_a_reader_that_restores_the_old_one_meanwhile(self, monkeypatch, tmp_path):
        directory, move = tmp_path / "made", files.move
        write(directory, "old")

        def moved(source, target):
            monkeypatch.setattr(files, "move", move)
            files.restore_all(tmp_path)
            assert whole(directory) == "old"
            move(source, target)

        monkeypatch.setattr(files, "move", moved)
        write(directory, "new")
        assert whole(directory) == "new"
        assert list(tmp_path.iterdir()) == [directory]

    def test_one_that_is_deleted_later_does_not_come_back(self, tmp_path):
        for name in ("old", "new"):
            write(tmp_path / "made", name)
        shutil.rmtree(tmp_path / "made")
        files.restore_all(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestStrangeFileSystems:
    @pytest.fixture
    def lacking(self, monkeypatch):
        """Makes a call of `os` fail with an error, for some of its arguments."""

        def lack(name: str, number: int, when=lambda *_: True):
            real = getattr(os, name)

            def call(*arguments, **options):
                if when(*arguments):
                    raise OSError(number, os.strerror(number))
                return real(*arguments, **options)

            monkeypatch.setattr(os, name, call)

        return lack

    @pytest.mark.parametrize("number", files.UNSUPPORTED)
    @pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
    def test_calls_that_it_does_not_have(self, tmp_path, lacking, call, number):
        lacking(call, number)
        for text in ("old", "new"):
            files.write_text(tmp_path / "file", text)
            write(tmp_path / "made", text)
        assert (tmp_path / "file").read_text() == "new"
        assert whole(tmp_path / "made") == "new"
        assert {path.name for path in tmp_path.iterdir()} == {"file", "made"}

    def test_a_disk_that_fails_is_an_error(self, tmp_path, lacking):
        lacking("fsync", errno.EIO)
        with pytest.raises(Unavailable, match=str(tmp_path / "file")):
            files.write_text(tmp_path / "file", "text")
        assert list(tmp_path.iterdir()) == []

    def test_permissions_are_not_changed(self, tmp_path, lacking):
        lacking("chmod", errno.EPERM)
        files.write_text(tmp_path / "file", "text")
        write(tmp_path / "made", "new")

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
    def test_a_mount_point_and_a_lower_layer_are_filled(self, tmp_path, lacking, number):
        """They cannot be renamed."""
        made = tmp_path / "made"
        made.mkdir()
        for name in ("old", "new", ".hidden"):
            (made / name).write_text("")
        lacking("rename", number, lambda source, _: str(source) == str(made))
        write(made, "new")
        (made / ".hidden").unlink()
        assert whole(made) == "new"
        assert list(tmp_path.iterdir()) == [made]

    def test_a_directory_in_one_that_cannot_be_written(self, tmp_path, lacking):
        made = tmp_path / "made"
        write(made, "old")
        lacking("mkdir", errno.EACCES, lambda path, *_: os.path.dirname(path) == str(tmp_path))
        write(made, "new")
        assert whole(made) == "new"

    def test_files_that_cannot_be_deleted_do_not_matter(self, tmp_path, monkeypatch):
        """NFS keeps those that another process has open."""
        made = tmp_path / "made"
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            for name in ("a", "b", "c"):
                write(made, name)
                assert whole(made) == name
            with pytest.raises(Killed), files.atomic_directory(made):
                raise Killed
            write(made, "d")
        assert whole(made) == "d"
        write(made, "e")
        assert list(tmp_path.iterdir()) == [made]

    def test_a_link_is_replaced_and_what_it_refers_to_stays(self, tmp_path):
        write(tmp_path / "elsewhere", "old")
        (tmp_path / "made").symlink_to(tmp_path / "elsewhere")
        write(tmp_path / "made", "new")
        assert whole(tmp_path / "made") == "new" and whole(tmp_path / "elsewhere") == "old"
        assert {path.name for path in tmp_path.iterdir()} == {"made", "elsewhere"}

    @pytest.mark.parametrize("number", [None, *files.UNSUPPORTED])
    def test_space_is_reserved_without_the_call_for_it(self, tmp_path, monkeypatch, number):
        """None: macOS does not have the function."""

        def lacking(*_):
            raise OSError(number, os.strerror(number))

        if number is None:
            monkeypatch.delattr(os, "posix_fallocate", raising=False)
        else:
            monkeypatch.setattr(os, "posix_fallocate", lacking, raising=False)
        path, size = tmp_path / "file", 3_000_000
        with path.open("wb") as file:
            file.write(b"head")
            file.truncate(size)
        if path.stat().st_blocks * 512 >= size:
            pytest.skip("this file system has no files with holes")
        files.reserve(path)
        assert path.stat().st_blocks * 512 >= size and path.stat().st_size == size
        assert path.read_bytes().rstrip(b"\0") == b"head"

    def test_a_lock_of_a_colleague_can_be_taken(self, tmp_path, monkeypatch):
        """It may be read, but not written."""
        path_open = Path.open

        def refused(path, mode="r", *arguments, **options):
            if mode != "r":
                raise PermissionError(errno.EACCES, "not yours")
            return path_open(path, mode, *arguments, **options)

        (tmp_path / ".lock").touch()
        monkeypatch.setattr(Path, "open", refused)
        with files.locked(tmp_path), pytest.raises(Unavailable):
            files.locked(tmp_path).__enter__()


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
