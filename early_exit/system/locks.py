"""The lock of a directory, which one process holds."""

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from early_exit.errors import Unavailable
from early_exit.system.disk_errors import write_errors

log = logging.getLogger(__name__)


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
            _lock(file, directory, wait)
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


def _lock(file: IO[str], directory: Path, wait: bool) -> None:
    """Locks a file. Raises OSError if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise Unavailable(
                f"{directory} is in use by another process; wait for it, or choose another"
                " --save-dir"
            ) from None
        log.info("waiting for another process that uses %s", directory)
        fcntl.flock(file, fcntl.LOCK_EX)


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
