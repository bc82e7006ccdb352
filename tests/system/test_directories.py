"""Directories that are written whole or not at all."""

import errno
import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from early_exit.system import directories, disk_errors, files


class TestMadeWhole:
    def test_it_takes_the_place_of_an_earlier_one(self, tmp_path):
        for name in ("old", "new"):
            with directories.atomic_directory(tmp_path / "made") as partial:
                (partial / name).write_text("")
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_a_failure_keeps_the_earlier_one_and_nothing_else(self, tmp_path):
        with directories.atomic_directory(tmp_path / "made") as partial:
            (partial / "old").write_text("")
        with (
            pytest.raises(KeyboardInterrupt),
            directories.atomic_directory(tmp_path / "made") as partial,
        ):
            (partial / "new").write_text("")
            raise KeyboardInterrupt
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["old"]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_the_remains_of_a_killed_process_are_overwritten(self, tmp_path):
        (tmp_path / ".made.partial").mkdir()
        (tmp_path / ".made.partial" / "stray").write_text("")
        with directories.atomic_directory(tmp_path / "made") as partial:
            (partial / "new").write_text("")
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]

    @pytest.mark.parametrize("error", [FileNotFoundError(2, "mine"), RuntimeError("mine")])
    def test_an_error_of_something_else_is_not_of_the_directory(self, tmp_path, error):
        with (
            pytest.raises(type(error), match="mine"),
            directories.atomic_directory(tmp_path / "made"),
        ):
            raise error
        assert list(tmp_path.iterdir()) == []


def whole(directory) -> str:
    """The one file of a directory that was written whole; its content tells that it is."""
    (path,) = directory.iterdir()
    assert path.read_text() == f"all of {path.name}"
    return path.name


def write(directory, name: str) -> None:
    with directories.atomic_directory(directory) as partial:
        (partial / name).write_text(f"all of {name}")


def write_many(directory: Path, name: str) -> None:
    for _ in range(40):
        write(directory, name)


def test_processes_that_write_it_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path / "made", n)) for n in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert whole(tmp_path / "made") in "abc"
    write(tmp_path / "made", "last")
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


def test_what_another_process_writes_is_not_deleted(tmp_path):
    with directories.atomic_directory(tmp_path / "made") as partial:
        write(tmp_path / "made", "inner")
        (partial / "outer").write_text("all of outer")
    assert whole(tmp_path / "made") == "outer"


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
            directories.restore_all(directory.parent)  # as the next reader does
            seen.add(whole(directory) if directory.exists() else None)
            write(directory, "newest")
            assert whole(directory) == "newest"
            assert list(directory.parent.iterdir()) == [directory]
            if not killed:
                break
        assert call > 5
        assert seen == {"old" if earlier else None, "new"}

    def test_a_reader_that_restores_the_old_one_meanwhile(self, monkeypatch, tmp_path):
        directory, move = tmp_path / "made", directories.move
        write(directory, "old")

        def moved(source, target):
            monkeypatch.setattr(directories, "move", move)
            directories.restore_all(tmp_path)
            assert whole(directory) == "old"
            move(source, target)

        monkeypatch.setattr(directories, "move", moved)
        write(directory, "new")
        assert whole(directory) == "new"
        assert list(tmp_path.iterdir()) == [directory]

    def test_one_that_is_deleted_later_does_not_come_back(self, tmp_path):
        for name in ("old", "new"):
            write(tmp_path / "made", name)
        shutil.rmtree(tmp_path / "made")
        directories.restore_all(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestStrangeFileSystems:
    @pytest.mark.parametrize("number", disk_errors.UNSUPPORTED)
    @pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
    def test_calls_that_it_does_not_have(self, tmp_path, lacking, call, number):
        lacking(call, number)
        for text in ("old", "new"):
            write(tmp_path / "made", text)
        assert whole(tmp_path / "made") == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_permissions_are_not_changed(self, tmp_path, lacking):
        lacking("chmod", errno.EPERM)
        write(tmp_path / "made", "new")

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
    def test_a_mount_point_and_a_lower_layer_are_filled(
        self, tmp_path, lacking, monkeypatch, number
    ):
        """They cannot be renamed."""
        monkeypatch.setattr(files, "PAUSES", ())
        made = tmp_path / "made"
        made.mkdir()
        for name in ("old", "new", ".hidden"):
            (made / name).write_text("")
        lacking("replace", number, lambda source, _: str(source) == str(made))
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
            with pytest.raises(Killed), directories.atomic_directory(made):
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
