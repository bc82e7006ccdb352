"""Standard output and standard error of a program, whatever is at their other end.

What an encoding lacks is escaped. A stream that is closed, a pipe whose reader has ended, or a full
disk ends no training, and ends another program in one line.
"""

import io
import logging
import os
import sys
from typing import Any

from early_exit.errors import Unavailable
from early_exit.system.text import in_a_line


class ReaderEnded(Exception):
    """Standard output is a pipe that nobody reads any more, as in `| head`."""


class _Output(io.FileIO):
    """The file of a stream. After its first error it takes everything and writes nothing."""

    required = False
    """Whether the first error is raised: ReaderEnded or Unavailable."""
    error: OSError | None = None

    def write(self, data: Any) -> int:
        """As of any file."""
        if self.error is None:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.error = error
                if self.required:
                    self.raise_error()
        return len(data)

    def raise_error(self) -> None:
        """Raises the first error, if there was one."""
        if isinstance(self.error, BrokenPipeError):
            raise ReaderEnded
        if self.error:
            raise Unavailable(
                f"standard output cannot be written: {self.error.strerror or self.error}"
            )


class _Log(logging.StreamHandler):
    """Warnings go to standard error, and so do the other lines, or they go to standard output."""

    def __init__(self, on_stdout: bool) -> None:
        super().__init__(sys.stderr)
        self.on_stdout = on_stdout

    def format(self, record: logging.LogRecord) -> str:
        """A warning is one line, whatever the names in it."""
        text = super().format(record)
        return in_a_line(text) if record.levelno >= logging.WARNING else text

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line."""
        words = self.on_stdout and record.levelno < logging.WARNING
        self.stream = sys.stdout if words else sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Output that is required and lost ends the program also if it is a line of the log."""
        error = sys.exception()
        if isinstance(error, ReaderEnded | Unavailable):
            raise error
        super().handleError(record)


def set_up(level: int, log_on_stdout: bool) -> None:
    """Prepares the streams and the log of a program.

    log_on_stdout: whether log lines belong to the output; warnings never do.
    """
    sys.stdout, sys.stderr = _opened(sys.stdout, 1), _opened(sys.stderr, 2)
    if output := _output():
        output.required = True
    logging.basicConfig(format="%(message)s", level=level, handlers=[_Log(log_on_stdout)])


def make_optional() -> None:
    """From now on, a program goes on if nobody takes its output."""
    if output := _output():
        output.required = False


def finish(prog: str) -> None:
    """Writes what is buffered. Raises ReaderEnded or Unavailable if output was lost that is not
    optional; says in one line if a log was lost to a full disk."""
    sys.stdout.flush()
    output = _output()
    if output is None:
        return
    if output.required:
        output.raise_error()
    elif output.error and not isinstance(output.error, BrokenPipeError):
        print(
            f"{prog}: a part of the log is lost: standard output cannot be written:"
            f" {output.error.strerror}",
            file=sys.stderr,
        )


def _output() -> _Output | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Output) else None


def _opened(stream: Any, descriptor: int) -> Any:
    """A stream of the same file that escapes what its encoding lacks. One that is not a file, as in
    a notebook, stays as it is."""
    if stream is None:  # closed by whoever started the program
        # opened for reading, it fails as a closed file does, and no other file gets its number
        unwritable = _Output(os.open(os.devnull, os.O_RDONLY), "w")
        return io.TextIOWrapper(io.BufferedWriter(unwritable), "utf-8", "backslashreplace")
    try:
        stream.flush()
        raw = _Output(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
