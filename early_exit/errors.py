"""The errors that end a program in one line."""


class UserError(ValueError):
    """A mistake in what was asked for or given, which the user can mend.

    Its message is one line: what was found, what was expected, what to do. The command line
    prints that line and leaves with exit code 2; from Python it is an ordinary ValueError.
    """

    code = 2


class Unavailable(UserError):
    """What the machine does not give now: room on a disk, a directory that another process holds.

    Nothing is wrong in what was asked for, so the same command may succeed later: exit code 1.
    """

    code = 1
