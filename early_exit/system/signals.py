"""SIGTERM, SIGINT and SIGHUP: stopping where the state can be saved."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from early_exit.system import torchrun

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 5.0  # seconds that the next images are waited for after a signal

NOTHING_SAVED = "stopped by signal {}; there was nothing to save"

Item = TypeVar("Item")
Handler = Callable[[int, object], None]


class Stopped(BaseException):
    """A signal asked the program to end and the state is saved; `code` is the exit code.

    Not an Exception, so that no `except Exception` swallows it.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + signum


def end_at_once(prog: str, signum: int) -> NoReturn:
    """Ends the program by one line, without what Python does at its end."""
    line = f"{prog}: {NOTHING_SAVED.format(signum)}"
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
    with suppress(Exception):  # what it needs may be half imported
        torchrun.say_last(line)
    os._exit(128 + signum)


@contextmanager
def ending_at_once(prog: str) -> Iterator[None]:
    """A context in which signals end the program: imports can swallow an exception."""
    with _handled_by(lambda signum, _frame: end_at_once(prog, signum)):
        yield


def raise_on_signals(prog: str) -> None:
    """Makes SIGTERM and SIGHUP raise Stopped, and SIGINT KeyboardInterrupt. Another Ctrl-C ends the
    program; another SIGTERM changes nothing.

    Without a handler the first process of a container ignores SIGTERM.
    """

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_IGN)  # once is enough
        _leave_closed_terminal()
        raise Stopped(NOTHING_SAVED.format(signum), signum)

    def interrupt(signum: int, _frame: object) -> None:
        signal.signal(signum, lambda signum, _frame: end_at_once(prog, signum))
        raise KeyboardInterrupt

    for number in _not_ignored():
        signal.signal(number, interrupt if number == signal.SIGINT else stop)


def _not_ignored() -> list[signal.Signals]:
    """The signals that stop a program. nohup ignores SIGHUP for it, and a shell script SIGINT for
    what it runs in the background."""
    return [
        number
        for number in STOPPING
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    ]


@contextmanager
def _handled_by(
    handler: Handler, others: Mapping[signal.Signals, Handler] | None = None
) -> Iterator[None]:
    """A context with this handler for the signals that stop a program. A thread other than the
    main one, as of a server or a notebook, cannot handle signals: they do there what they did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {**dict.fromkeys(_not_ignored(), handler), **(others or {})}
    previous = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _leave_closed_terminal() -> None:
    """Discards further output if it went to a terminal that was closed: writing would fail."""
    for stream in (0, 1, 2):
        try:
            os.ttyname(stream)
        except OSError as error:
            if error.errno == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)


@contextmanager
def held_back() -> Iterator[None]:
    """A context in which signals wait, and which processes that start in it never get."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupted(BaseException):
    """A signal arrived while `StopSignals.raise_at_once` was set, or the images that the
    program waited for did not come after it."""


class StopSignals:
    """A context in which the signals that stop a program only set `signum`; the loop checks it
    between steps.

    A second signal changes nothing, so it cannot tear a file that is being written. Where the loop
    may take long to check (a compilation) and there is nothing to save, it calls
    `raise_if_signalled`: until `raise_at_once` is cleared, the first signal raises Interrupted, and
    again every PATIENCE seconds, because Python drops an exception raised within a `__del__` or
    another callback.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.raise_at_once = False
        self._waiting = False

    def __enter__(self) -> StopSignals:
        self._handlers = _handled_by(self._record, {signal.SIGALRM: self._give_up})
        self._handlers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._handlers.__exit__(None, None, None)

    def raise_if_signalled(self) -> None:
        """Makes the first signal raise Interrupted; one that came earlier raises it now."""
        self.raise_at_once = True
        if self.signum is not None:
            raise Interrupted

    def wait_for(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. Raises Interrupted if a signal came and the next one does not come for
        PATIENCE seconds, as if a worker process hangs on its storage."""
        iterator = iter(items)
        while True:
            self._waiting = True
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def _record(self, signum: int, _frame: object) -> None:
        if self.signum is None:
            self.signum = signum
            _leave_closed_terminal()
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
            if self.raise_at_once:
                raise Interrupted

    def _give_up(self, _signum: int, _frame: object) -> None:
        if self._waiting or self.raise_at_once:
            raise Interrupted
