"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what was asked for or given.

    Its message is one line: what was found, what was expected, what to do. The command line
    prints that line and leaves with exit code 2; from Python it is an ordinary ValueError.
    """
