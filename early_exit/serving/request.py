"""A request in the engine, and what is reported to it: answers row by row, or an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowAnswer:
    """The answer for one image."""

    row: int
    """The number of the image in its request."""
    logits: np.ndarray
    """(K,) float32, as in `early_exit.inference.infer.Answers`."""
    exit_index: int
    queued: float
    """Seconds spent waiting for segments."""
    computed: float
    """Seconds of the runs that it was part of."""


class SegmentFailed(Exception):
    """A segment raised an error, which is logged."""


OnAnswer = Callable[[RowAnswer | Exception], None]


class Request:
    """Images that were submitted together. Its calls of `on_answer` never overlap.

    `cancel` is for who submitted it, the rest for the engine. numbers: of its rows in the engine;
    deadline, arrival: seconds of the engine's clock; drop: removes its rows from the queues.
    """

    def __init__(
        self,
        numbers: range,
        deadline: float,
        arrival: float,
        on_answer: OnAnswer,
        drop: Callable[[Request], None],
    ) -> None:
        self.numbers, self.arrival, self.deadline = numbers, arrival, deadline
        self._on_answer, self._drop = on_answer, drop
        self.computed = [0.0] * len(numbers)
        """Seconds of the runs that each row was part of."""
        self.has_ended = False
        """Whether it was cancelled or failed: nothing more is reported."""
        self._calling = threading.RLock()

    def cancel(self) -> None:
        """Ends the request: nothing more is reported once this returns. Rows that wait are dropped
        at once, those in a running batch when it ends."""
        if self._end():
            self._drop(self)

    def _end(self) -> bool:
        """Makes this the end of what is reported; False if it had ended before. Waits for a call of
        `on_answer` in another thread."""
        with self._calling:
            had_ended, self.has_ended = self.has_ended, True
            return not had_ended

    def fail(self, error: Exception) -> None:
        """Ends the request with an error."""
        if self._end():
            self._drop(self)
            self._call(error)

    def report(self, answer: RowAnswer) -> None:
        """Gives an answer to `on_answer`, unless the request has ended."""
        with self._calling:
            if not self.has_ended:
                self._call(answer)

    def _call(self, answer: RowAnswer | Exception) -> None:
        try:
            self._on_answer(answer)
        except Exception:
            log.exception("on_answer of a request raised an error; the engine continues")
