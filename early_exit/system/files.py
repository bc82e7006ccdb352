"""Files and directories that are written whole or not at all, and the lock of a directory."""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from early_exit.errors import Unavailable, UserError
from early_exit.system.names import in_a_line

log = logging.getLogger(__name__)

PERMANENT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def is_writable(path: Path) -> bool:
    """Whether a directory can be made or written at `path`, found out without trying to."""
    parent = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    return os.path.isdir(parent) and os.access(parent, os.W_OK)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an error while writing to `path` into one line.

    Raises UserError if that path can never be written, Unavailable if the disk is full or fails.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own on top of the file's
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kind = UserError if cause.errno in PERMANENT else Unavailable
        raise kind(f"{path} cannot be written: {cause.strerror or cause}") from None


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
    """A binary file that appears at `path` only when it is complete and on the disk.

    Raises the errors of `write_errors`.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which replaces `directory` at the end of the context.

    Raises the errors of `write_errors`.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    with write_errors(directory):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Locks the directory for this process alone; the lock ends with the process.

    If another process holds the lock: raises Unavailable, or with `wait` waits for it.
    """
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "w")
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
