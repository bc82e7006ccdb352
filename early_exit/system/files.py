"""Files and directories that are written whole or not at all, and the lock of a directory.

What a file system does not have (NFS, CIFS, mounts of object stores, macOS) is done without.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import yaml

from early_exit.errors import Unavailable, UserError
from early_exit.system.text import in_a_line

log = logging.getLogger(__name__)

PERMANENT = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.ELOOP,
)
# A system or a file system that does not have a call says so with one of these.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
# A mount point, or a directory of a lower layer of an overlay, cannot be renamed.
NOT_RENAMED = (*UNSUPPORTED, errno.EBUSY, errno.EXDEV)


def is_writable(path: Path) -> bool:
    """Whether a directory can be made or written at `path`, found out without trying to."""
    parent = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    return os.path.isdir(parent) and os.access(parent, os.W_OK)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an error while writing to `path` into one line. The block only writes there.

    Raises UserError if that path can never be written, Unavailable if the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from None


def _write_error(path: Path, error: OSError) -> UserError:
    kind = UserError if error.errno in PERMANENT else Unavailable
    # the name that the user knows, not the one that a directory has while it is written
    path = Path(re.sub(r"/\.([^/]+)\.partial(\.[0-9a-f]{8})?(?=/|$)", r"/\1", str(path)))
    return kind(f"{path} cannot be written: {error.strerror or error}")


def _written_by_library(error: BaseException) -> OSError | None:
    """The error of a library that writes by itself to a full or lost disk. It names no file; that
    of a file that cannot be opened does."""
    lost = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    if isinstance(error, OSError) and error.filename is None and error.errno in lost:
        return error
    return None


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


def status(path: Path) -> os.stat_result | None:
    """What the system knows about a path; None if there is nothing. Raises UserError if that cannot
    be found out, as in a folder of another user."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{in_a_line(path)} cannot be read ({error.strerror or error})") from None


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
            if own := writer.error or _written_by_library(error):
                raise _write_error(path, own) from None
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
    _sync_directory(path.parent)


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


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which replaces `directory` at the end of the context.

    It is written as `.NAME.partial`. At the end, an earlier directory is renamed to `.NAME.old`,
    then the new one gets its name, then the old one is deleted. After a kill between the renames,
    `restore` gives the old one its name back. Raises the errors of `write_errors`, for the errors
    of making and moving the directory alone.
    """
    directory = Path(os.path.abspath(directory))
    with write_errors(directory):
        restore(directory)
        partial = _make_partial(directory)
    try:
        yield partial
        _sync_directory(partial)
        with write_errors(directory):
            _put_in_place(partial, directory)
    except BaseException as error:
        restore(directory)
        _remove(partial)
        if own := _written_by_library(error):
            raise _write_error(directory, own) from None
        raise
    _sweep(directory)
    _sync_directory(directory.parent)


def restore(directory: Path) -> None:
    """Gives an earlier directory its name back if a process was killed while it replaced it."""
    old = _old(directory)
    if os.path.lexists(old) and not os.path.lexists(directory):
        with contextlib.suppress(OSError):
            old.rename(directory)


def restore_all(parent: Path) -> None:
    """`restore` for every directory in `parent`."""
    with contextlib.suppress(OSError):
        for old in parent.glob(".*.old"):
            restore(parent / old.name[1 : -len(".old")])


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _make_partial(directory: Path) -> Path:
    """An empty directory beside `directory`, or in it if nothing can be made beside it."""
    _sweep(directory)
    partial = _unused(directory.with_name(f".{directory.name}.partial"))
    try:
        partial.mkdir(parents=True)
    except OSError:
        if not directory.is_dir():
            raise
        _remove(directory / ".partial")
        partial = _unused(directory / ".partial")
        partial.mkdir()
    return partial


def _put_in_place(partial: Path, directory: Path) -> None:
    """Moves a complete directory to its place."""
    if partial.parent == directory or not _put_aside(directory):
        _replace_content(partial, directory)
        return
    while True:
        try:
            move(partial, directory)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _put_aside(directory)  # another process has just restored it
    if os.path.lexists(old := _old(directory)):
        # under this name it is never restored, not even if it is deleted only in part
        old.rename(_unused(directory.with_name(f".{directory.name}.deleted")))


def _put_aside(directory: Path) -> bool:
    """Renames an earlier directory to its old name; whether that is possible."""
    if not os.path.lexists(directory):
        return True
    old = _old(directory)
    if os.path.lexists(old):  # of a process that was killed after it had replaced the directory
        old.rename(_unused(directory.with_name(f".{directory.name}.deleted")))
    try:
        directory.rename(old)
    except OSError as error:
        if error.errno not in NOT_RENAMED:
            raise
        return False
    return True


def _replace_content(partial: Path, directory: Path) -> None:
    """For a directory that cannot be renamed: moves in the new content, then deletes the rest."""
    new = {path.name for path in partial.iterdir()}
    for name in sorted(new):
        target = directory / name
        if target.is_dir() and not target.is_symlink():
            _remove(target)
        move(partial / name, target)
    _remove(partial)
    for path in directory.iterdir():
        if path.name not in new and not path.name.startswith("."):
            _remove(path)


def move(source: Path, target: Path) -> None:
    """Renames a file, which may replace another one, or a directory. Where the file system cannot
    rename, it is copied."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EXDEV):
            raise
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        _remove(source)


def _sweep(directory: Path) -> None:
    """Deletes what earlier writers of a directory left, as far as that is possible."""
    left = re.compile(rf"\.{re.escape(directory.name)}\.(partial|deleted)(\.[0-9a-f]{{8}})?")
    with contextlib.suppress(OSError):
        for path in directory.parent.iterdir():
            if left.fullmatch(path.name):
                _remove(path)
    if os.path.lexists(directory):
        _remove(_old(directory))


def _remove(path: Path) -> None:
    """Deletes a file or directory as far as that is possible: on NFS, files that another process
    has open remain."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _unused(path: Path) -> Path:
    """`path`, or a similar name if there is something at `path` that cannot be deleted."""
    if not os.path.lexists(path):
        return path
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}")


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable. Many file systems cannot, and the files are complete in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Locks the directory for this process alone; the lock ends with the process.

    If another process holds the lock: raises Unavailable, or with `wait` waits for it.
    """
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = _open_lock(directory / ".lock")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Unavailable(
                f"{directory} is in use by another process; wait for it, or choose another"
                " --save-dir"
            ) from None
        except OSError as error:
            log.warning(
                "the file system of %s has no locks (%s): make sure that only one process writes"
                " there",
                directory,
                error.strerror,
            )
        _held.append(file)
        _close_in_children()
        try:
            yield
        finally:
            _held.remove(file)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _open_lock(path: Path) -> IO[str]:
    """The lock file; that of another user of a shared directory may only be readable."""
    try:
        return path.open("a")
    except PermissionError:
        if not path.exists():
            raise
        return path.open()


_held: list[IO[str]] = []


@functools.cache
def _close_in_children() -> None:
    """Closes the locks in forked processes: a lock is held until every process that inherited it
    has closed it, so a worker that outlives its parent would keep the directory locked."""
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The mapping in a YAML file in UTF-8 or UTF-16; an empty file gives an empty one.

    kind: what the file is, for messages. Raises UserError if it cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; {kind} must be a mapping")
    return values
