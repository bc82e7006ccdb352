"""Files that are written whole or not at all.

Calls that a file system lacks (NFS, CIFS, mounts of object stores, macOS) are skipped.
"""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from early_exit.system.disk_errors import (
    IN_USE,
    UNSUPPORTED,
    write_error,
    write_errors,
    written_by_library,
)

PAUSES = (0.1, 0.4, 1.5)  # seconds between attempts to replace what another process has open


class _Writer:
    """A file that is written; the error of its own writing is kept, because libraries may replace
    it by another one (`torch.save` does)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """As of a file."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """As of a file."""
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file, to be written in sequence, that appears at `path` only when it is complete and
    on the disk. Its permissions are those of any new file (the umask).

    Raises the errors of `write_errors`, for the errors of its own writing alone.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "xb")
    writer = _Writer(file)
    try:
        try:
            yield cast(IO[bytes], writer)
        except Exception as error:
            if own := writer.error or written_by_library(error):
                raise write_error(path, own) from None
            raise
        with write_errors(path):
            file.flush()
            _sync(file.fileno())
            file.close()
            move(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8, whole or not at all. The bytes of a file's name that are
    not UTF-8 are written as `\\udcff`."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def reserve(path: Path) -> None:
    """Reserves the disk space of a file of the size that it has. Without it, a process that writes
    to the file's memory map would end with a bus error when the disk is full."""
    size, zeros = path.stat().st_size, bytes(1 << 20)
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except AttributeError:  # macOS
            pass
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        head = file.read(4096)
        for start in range(0, size, len(zeros)):
            file.seek(start)
            file.write(zeros[: size - start])
        file.seek(0)
        file.write(head)


def rename(source: Path, target: Path) -> None:
    """`os.replace`, which waits a moment for other processes to close the files."""
    for pause in PAUSES:
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if error.errno not in IN_USE:
                raise
        time.sleep(pause)
    os.replace(source, target)


def move(source: Path, target: Path) -> None:
    """Renames a file, which may replace another one, or a directory. Where the file system cannot
    rename, it is copied."""
    try:
        rename(source, target)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EXDEV):
            raise
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        delete(source)


def delete(path: Path) -> None:
    """Deletes a file or directory as far as that is possible: on NFS, files that another process
    has open remain."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_directory(directory: Path) -> None:
    """Makes a rename durable. Many file systems cannot, and the files are complete in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
