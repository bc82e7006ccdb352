"""Directories that are written whole or not at all."""

import contextlib
import errno
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
from early_exit.system.files import delete, move, sync_directory

# A mount point, or a directory of a lower layer of an overlay, cannot be renamed.
NOT_RENAMED = (*UNSUPPORTED, errno.EBUSY, errno.EXDEV)


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
        sync_directory(partial)
        with write_errors(directory):
            _put_in_place(partial, directory)
    except BaseException as error:
        restore(directory)
        delete(partial)
        if own := written_by_library(error):
            raise write_error(directory, own) from None
        raise
    _sweep(directory)
    sync_directory(directory.parent)


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
        delete(directory / ".partial")
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
            delete(target)
        move(partial / name, target)
    delete(partial)
    for path in directory.iterdir():
        if path.name not in new and not path.name.startswith("."):
            delete(path)


def _sweep(directory: Path) -> None:
    """Deletes what earlier writers of a directory left, as far as that is possible."""
    left = re.compile(rf"\.{re.escape(directory.name)}\.(partial|deleted)(\.[0-9a-f]{{8}})?")
    with contextlib.suppress(OSError):
        for path in directory.parent.iterdir():
            if left.fullmatch(path.name):
                delete(path)
    if os.path.lexists(directory):
        delete(_old(directory))


def _unused(path: Path) -> Path:
    """`path`, or a similar name if there is something at `path` that cannot be deleted."""
    if not os.path.lexists(path):
        return path
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}")
