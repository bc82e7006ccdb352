"""Directories that are written whole or not at all."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from early_exit.system.disk_errors import (
    UNSUPPORTED,
    write_error,
    write_errors,
    written_by_library,
)
from early_exit.system.files import delete, move, rename, sync_directory

# A mount point, or a directory of a lower layer of an overlay, cannot be renamed.
NOT_RENAMED = (*UNSUPPORTED, errno.EBUSY, errno.EXDEV)
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which replaces `directory` at the end of the context.

    It is written as `.NAME.partial.*`. At the end, an earlier directory is renamed to `.NAME.old`,
    then the new one gets its name, then the old one is deleted. After a kill between the renames,
    `restore` gives the old one its name back. Of two processes that write it at the same time, the
    later one wins. Raises the errors of `write_errors`, for the errors of making and moving the
    directory alone.
    """
    directory = Path(os.path.abspath(directory))
    with write_errors(directory):
        restore(directory)
        _sweep(directory)
        partial, descriptor = _make_partial(directory)
    try:
        yield partial
        sync_directory(partial)
        with write_errors(directory):
            _put_in_place(partial, directory)
    except BaseException as error:
        restore(directory)
        delete(partial)
        if own := written_by_library(error):
            raise write_error(directory, own) from None
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    _sweep(directory)
    sync_directory(directory.parent)


def restore(directory: Path) -> None:
    """Gives an earlier directory its name back if a process was killed while it replaced it."""
    old = _old(directory)
    if os.path.lexists(old) and not os.path.lexists(directory):
        with contextlib.suppress(OSError):
            os.replace(old, directory)


def restore_all(parent: Path) -> None:
    """`restore` for every directory in `parent`."""
    with contextlib.suppress(OSError):
        for old in parent.glob(".*.old"):
            restore(parent / old.name[1 : -len(".old")])


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _new_name(directory: Path, kind: str) -> Path:
    """A name beside a directory that nothing has."""
    return directory.with_name(f".{directory.name}.{kind}.{secrets.token_hex(4)}")


def _make_partial(directory: Path) -> tuple[Path, int | None]:
    """An empty directory beside `directory`, or in it if nothing can be made beside it; and the
    descriptor that holds its lock."""
    while True:
        partial = _new_name(directory, "partial")
        try:
            partial.mkdir(parents=True)
        except OSError:
            if not directory.is_dir():
                raise
            partial = directory / partial.name
            partial.mkdir()
        with contextlib.suppress(BlockingIOError):  # another process is deleting it
            descriptor = _lock(partial)
            if partial.exists():
                return partial, descriptor


def _lock(directory: Path) -> int | None:
    """Locks a directory; returns the descriptor that holds the lock, or None if the file system has
    no such locks. Raises BlockingIOError if another process has locked it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _put_in_place(partial: Path, directory: Path) -> None:
    """Moves a complete directory to its place."""
    while partial.parent != directory and _put_aside(directory):
        try:
            move(partial, directory)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            continue  # another process has just restored the old one, or put its own there
        _retire(_old(directory))
        return
    _replace_content(partial, directory)


def _put_aside(directory: Path) -> bool:
    """Renames an earlier directory to its old name; whether that is possible."""
    while os.path.lexists(directory):
        _retire(_old(directory))  # of a process that was killed after it had replaced the directory
        try:
            rename(directory, _old(directory))
        except OSError as error:
            if error.errno in NOT_RENAMED:
                return False
            if error.errno not in (errno.ENOENT, *TAKEN):  # another process was faster
                raise
    return True


def _retire(old: Path) -> None:
    """Gives an old directory a name under which it is never restored, not even if it is deleted
    only in part."""
    if os.path.lexists(old):
        with contextlib.suppress(FileNotFoundError):
            rename(old, _new_name(old.with_name(old.name[1 : -len(".old")]), "deleted"))


def _replace_content(partial: Path, directory: Path) -> None:
    """For a directory that cannot be renamed: moves in the new content, then deletes the rest."""
    new = {path.name for path in partial.iterdir()}
    for name in sorted(new):
        target = directory / name
        if target.is_dir() and not target.is_symlink():
            delete(target)
        move(partial / name, target)
    delete(partial)
    for path in directory.iterdir():
        if path.name not in new and not path.name.startswith("."):
            delete(path)


def _sweep(directory: Path) -> None:
    """Deletes what earlier writers of a directory left, as far as that is possible."""
    left = re.compile(rf"\.{re.escape(directory.name)}\.(partial|deleted)(\.[0-9a-f]{{8}})?")
    for parent in (directory.parent, directory):
        with contextlib.suppress(OSError):
            for path in parent.iterdir():
                if left.fullmatch(path.name):
                    _delete_unlocked(path)
    if os.path.lexists(directory):
        delete(_old(directory))


def _delete_unlocked(path: Path) -> None:
    """Deletes a directory, unless another process still writes it."""
    with contextlib.suppress(BlockingIOError):
        descriptor = _lock(path)
        try:
            delete(path)
        finally:
            if descriptor is not None:
                os.close(descriptor)
