"""Files that are written whole or not at all, and the errors of the disk."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from early_exit.errors import Unavailable, UserError
from early_exit.system import disk_errors, files


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
        assert list(tmp_path.iterdir()) == []


class TestStrangeFileSystems:
    @pytest.mark.parametrize("number", disk_errors.UNSUPPORTED)
    @pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
    def test_calls_that_it_does_not_have(self, tmp_path, lacking, call, number):
        lacking(call, number)
        for text in ("old", "new"):
            files.write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("number", disk_errors.IN_USE)
    def test_a_file_that_another_process_has_open_for_a_moment(
        self, tmp_path, lacking, monkeypatch, number
    ):
        """CIFS does not replace it until it is closed."""
        monkeypatch.setattr(files, "PAUSES", (0, 0))
        attempts = []
        lacking("replace", number, lambda *_: attempts.append(1) or len(attempts) < 3)
        files.write_text(tmp_path / "file", "text")
        assert (tmp_path / "file").read_text() == "text" and len(attempts) == 3

    def test_a_name_that_is_too_long(self, tmp_path):
        assert disk_errors.is_writable(tmp_path / ("x" * 200))
        assert not disk_errors.is_writable(tmp_path / ("x" * 250))

    def test_the_root_has_nothing_above_it(self):
        assert disk_errors.is_writable(Path("/")) == os.access("/", os.W_OK)

    def test_a_disk_that_fails_is_an_error(self, tmp_path, lacking):
        lacking("fsync", errno.EIO)
        with pytest.raises(Unavailable, match=str(tmp_path / "file")):
            files.write_text(tmp_path / "file", "text")
        assert list(tmp_path.iterdir()) == []

    def test_permissions_are_not_changed(self, tmp_path, lacking):
        lacking("chmod", errno.EPERM)
        files.write_text(tmp_path / "file", "text")

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
        with pytest.raises(UserError) as caught, disk_errors.write_errors(tmp_path):
            raise OSError(number, "the reason")
        assert type(caught.value) is kind
        assert str(tmp_path) in str(caught.value) and "the reason" in str(caught.value)

    def test_an_error_without_a_number(self, tmp_path):
        with pytest.raises(Unavailable, match="7 requested and 3 written"):
            with disk_errors.write_errors(tmp_path):
                raise OSError("7 requested and 3 written")

    @pytest.mark.parametrize("kind", [RuntimeError, KeyError, KeyboardInterrupt])
    def test_other_errors_pass(self, tmp_path, kind):
        with pytest.raises(kind), disk_errors.write_errors(tmp_path):
            raise kind("mine")

    def test_a_user_error_is_not_wrapped_again(self, tmp_path):
        with pytest.raises(UserError, match=r"^mine$"), disk_errors.write_errors(tmp_path):
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError:
                raise UserError("mine") from None
