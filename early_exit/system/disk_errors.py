"""What a disk says: which errors pass, what a file system does not have, what can be written."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from early_exit.errors import Unavailable, UserError
from early_exit.system.text import in_a_line

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
# On CIFS, what another process has open cannot be renamed or replaced.
IN_USE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY)


def kind_of(error: OSError) -> type[UserError]:
    """The type of the line for an error: Unavailable if it may pass."""
    return UserError if error.errno in PERMANENT else Unavailable


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an error while writing to `path` into one line. The block only writes there.

    Raises UserError if that path can never be written, Unavailable if the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from None


def write_error(path: Path, error: OSError) -> UserError:
    """The line of an error while writing to `path`."""
    # the final name, not the temporary one of a directory that is being written
    path = Path(re.sub(r"/\.([^/]+)\.partial(\.[0-9a-f]{8})?(?=/|$)", r"/\1", str(path)))
    return kind_of(error)(f"{path} cannot be written: {error.strerror or error}")


def read_error(shown: str, error: OSError) -> UserError:
    """The line of an error while reading a file or a folder."""
    return kind_of(error)(f"{shown} cannot be read ({error.strerror or error})")


def written_by_library(error: BaseException) -> OSError | None:
    """The error of a library that writes by itself to a full or lost disk. It names no file; that
    of a file that cannot be opened does."""
    lost = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    if isinstance(error, OSError) and error.filename is None and error.errno in lost:
        return error
    return None


def is_writable(path: Path) -> bool:
    """Whether a directory can be made or written at `path`, found out without trying to."""
    path = path.absolute()
    above = next((place for place in path.parents if os.path.exists(place)), path)  # of / none
    try:
        os.lstat(above / f".{path.name}.partial.{'0' * 8}")  # as it is while it is written
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
            return False
    parent = next(place for place in (path, *path.parents) if os.path.exists(place))
    return os.path.isdir(parent) and os.access(parent, os.W_OK)


def status(path: Path) -> os.stat_result | None:
    """`os.stat` of a path; None if there is nothing. Raises UserError if that cannot
    be found out, as in a folder of another user, Unavailable if the disk does not answer."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise read_error(in_a_line(path), error) from None
