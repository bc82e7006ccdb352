"""How every command starts and ends: whatever happens in between is one line and an exit code.

A script calls `run` before its own imports, which take seconds and can fail or be stopped too.
Therefore this module imports next to nothing at its top, and runs on older versions of Python.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from early_exit.errors import Failed, UserError
from early_exit.system import signals, streams, torchrun
from early_exit.system.text import in_a_line

PYTHON = (3, 11)  # as in setup.cfg


def run(
    main: Callable[[Sequence[str] | None], None] | str,
    prog: str,
    *,
    log_on_stdout: bool = False,
    needs_torch: bool = True,
) -> NoReturn:
    """Runs a script's `main` and exits: 0 done, 2 bad usage or bad data, 143, 130 or 129 stopped by
    a signal (the last line states what was saved), 1 anything else.

    main: the function, or the name of its module, which is then imported here. prog: the name of
    the script, with which the last line begins. log_on_stdout: whether the log is what the script
    prints, as that of a training; otherwise it goes to standard error. Warnings always do.
    needs_torch: whether the script always uses torch and torchvision, which are then checked first.
    """
    try:
        _open_closed_streams()
        with signals.ending_at_once(prog):
            main = _import(main, needs_torch)
        signals.raise_on_signals(prog)
        streams.set_up(logging.WARNING if torchrun.rank() else logging.INFO, log_on_stdout)
        _call(main, prog)
    except streams.ReaderEnded:
        sys.exit(1)
    except Exception as error:
        _end(prog, _explained(error))
    except KeyboardInterrupt:
        _end(prog, signals.Stopped("interrupted", signal.SIGINT))
    except signals.Stopped as stopped:
        _end(prog, stopped)
    sys.exit(0)


def _import(main: Callable | str, needs_torch: bool) -> Callable:
    """The function, after everything that has to be imported for it."""
    if sys.version_info < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        raise UserError(f"Python {wanted} or newer is needed, this is {sys.version.split()[0]}")
    try:
        os.getcwd()
    except OSError:  # MKL would end the process
        raise UserError("the working directory is gone; change to one that exists") from None
    import importlib

    if needs_torch:
        from early_exit.system.provenance import check_torchvision

        check_torchvision()
    return importlib.import_module(main).main if isinstance(main, str) else main


def _call(main: Callable, prog: str) -> None:
    """Calls `main`, and writes what it has printed, also if it exits by itself, as for --help."""
    try:
        main(None)
    except SystemExit:
        streams.finish(prog)
        raise
    streams.finish(prog)


def _explained(error: Exception) -> UserError | Failed:
    """The error as one with a line and an exit code; prints the traceback of one that is an error
    in the program."""
    if isinstance(error, (UserError, Failed)):
        return error
    import traceback

    from early_exit.system import failures

    explained = failures.explain(error)
    if explained:
        return explained
    traceback.print_exception(type(error), error, error.__traceback__)
    return Failed(
        "this is an error in the program; please report it, with the lines above, on the project's"
        " page of issues"
    )


def _end(prog: str, ended: UserError | Failed | signals.Stopped) -> NoReturn:
    """Prints the one line and exits. One of several processes exits at once, because the
    communication with the others cannot be shut down by one of them."""
    stopped = isinstance(ended, signals.Stopped)
    line = in_a_line(" ".join(f"{prog}: {ended}".splitlines()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until the line is printed
    streams.make_optional()  # the first error is the one to tell
    sys.stdout.flush()
    if not stopped:
        _wait_for_the_main_process()
    if not (stopped and torchrun.local_rank()):  # one process prints it for its machine
        print(line, file=sys.stderr, flush=True)
        if getattr(ended, "is_cause", True):
            torchrun.say_last(line)
    if stopped:
        _wait_for_the_main_process()
    signal.signal(signal.SIGINT, lambda *_: os._exit(ended.code))
    if torchrun.world_size() > 1:
        os._exit(ended.code)
    sys.exit(ended.code)


def _wait_for_the_main_process() -> None:
    """Lets the main one of several processes print its line, usually the same, and exit first:
    torchrun ends the others as soon as one exits."""
    if torchrun.rank() > 0:
        import time

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)


def _open_closed_streams() -> None:
    """Opens standard streams that were closed, which other files would take the place of."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # using a closed input or output is an error
            modes = {"stdin": os.O_WRONLY, "stdout": os.O_RDONLY, "stderr": os.O_RDWR}
            os.dup2(os.open(os.devnull, modes[name]), number)
            setattr(sys, name, open(number, "w" if number else "r"))
