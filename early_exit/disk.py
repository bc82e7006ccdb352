"""The disk: files and directories that appear whole or not at all, and the lock of a directory."""

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
from typing import IO

from early_exit.errors import Unavailable, UserError

log = logging.getLogger(__name__)

NEVER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is inside writes to `path`: says in one line why it could not.

    Raises UserError where that place cannot be written at all, Unavailable where the disk is full
    or fails.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own on top of the file's
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kind = UserError if cause.errno in NEVER else Unavailable
        raise kind(f"{path} cannot be written: {cause.strerror or cause}") from None


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when all of it is on the disk; raises what
    `writing` does."""
    with writing(path):
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
    with written_whole(path) as file:
        file.write(text.encode())


@contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which then takes the place of `directory`; raises what `writing`
    does."""
    partial = directory.with_name(f".{directory.name}.partial")
    with writing(directory):
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
    """Holds the directory for this process alone; ends with the process, however that ends.

    Where another process holds it: Unavailable, or with `wait` until that one is done.
    """
    with writing(directory):
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
                "the file system of %s keeps no locks (%s): see to it that one process alone"
                " writes there", directory, error.strerror,
            )
        _held.append(file)
        _let_children_go()
        try:
            yield
        finally:
            _held.remove(file)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


_held: list[IO[str]] = []


@functools.cache
def _let_children_go() -> None:
    """A lock belongs to every process that was forked while it was held, until all have closed it;
    so they do at once, and a worker that outlives its parent does not keep the directory."""
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])
