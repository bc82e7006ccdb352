"""The errors that end a program with one line."""


class UserError(ValueError):
    """An error the user can fix.

    Its message is one line: what was found, what was expected, what to do. A script prints that
    line and exits with code 2; from Python it is an ordinary ValueError.
    """

    code = 2


class DataError(UserError):
    """The data set is not where it was looked for, or is another one than the run's.

    The library's message names no flag for the directory; each script adds its own.
    """


class Unavailable(UserError):
    """A resource is unavailable now: the disk is full, or another process uses the directory.

    The same command may succeed later, so a script exits with code 1.
    """

    code = 1


class DataUnavailable(DataError, Unavailable):
    """The data set is not where it was looked for, and cannot be downloaded now."""


class Failed(RuntimeError):
    """The program cannot continue, and its message says why in one line."""

    code = 1
    is_cause = True
    """Whether it is what went wrong, and not what follows from it in another process."""
