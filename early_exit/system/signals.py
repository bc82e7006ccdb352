"""SIGTERM and SIGINT: stopping where the state can be saved."""

import signal


class Stopped(BaseException):
    """A signal asked the program to end and the state is saved; `code` is the exit code.

    Not an Exception, so that no `except Exception` swallows it.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + signum


def exit_on_sigterm() -> None:
    """Makes SIGTERM raise Stopped, as SIGINT raises KeyboardInterrupt.

    Without a handler the first process of a container ignores SIGTERM.
    """

    def stop(signum: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Stopped(f"stopped by signal {signum}; there was nothing to save", signum)

    signal.signal(signal.SIGTERM, stop)


class Interrupted(BaseException):
    """A signal arrived while `StopSignals` was told to raise at once."""


class StopSignals:
    """A context in which SIGTERM and SIGINT only set `signum`; the loop checks it between steps.

    A second signal changes nothing, so it cannot tear a file that is being written. Where the loop
    may take long to check (a compilation) and there is nothing to save, it calls
    `raise_if_signalled`: until `raise_at_once` is cleared, the first signal raises Interrupted.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.raise_at_once = False

    def __enter__(self) -> "StopSignals":
        self._previous = {
            number: signal.signal(number, self._record)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_signalled(self) -> None:
        """Makes the first signal raise Interrupted; one that came earlier raises it now."""
        self.raise_at_once = True
        if self.signum is not None:
            raise Interrupted

    def _record(self, signum: int, _frame: object) -> None:
        if self.signum is None:
            self.signum = signum
            if self.raise_at_once:
                raise Interrupted
