"""The engine: rows of many requests, run segment by segment in worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.inference.infer import RunSegment
from early_exit.inference.policy import Policy


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs."""

    max_batch: int
    workers: int = 1
    max_wait: float = 0.0
    max_rows: int = 1024
    target: float = 0.25


@dataclass(frozen=True)
class RowAnswer:
    """The answer for one image of a request."""

    row: int
    logits: np.ndarray
    exit_index: int
    queued: float
    computed: float


class Overloaded(Exception):
    """Too many rows are in flight."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SegmentFailed(Exception):
    """A segment raised."""


class Request:
    """Images that were submitted."""

    def cancel(self) -> None:
        """Nothing more is reported."""
        raise NotImplementedError


@dataclass(frozen=True)
class EngineState:
    """Counts of an engine."""

    waiting: tuple[int, ...]
    in_flight: int
    answered: tuple[int, ...]
    runs: tuple[int, ...]
    rows: tuple[int, ...]
    seconds: tuple[float, ...]


class Engine:
    """See the module."""

    policy: Policy
    expected_wait: float

    def __init__(
        self,
        segments: Sequence[tuple[int, RunSegment]],
        policy: Policy,
        settings: EngineSettings,
    ) -> None:
        raise NotImplementedError

    def submit(
        self, images: np.ndarray, on_answer: Callable[[RowAnswer | Exception], None]
    ) -> Request:
        """Submits images."""
        raise NotImplementedError

    def set_policy(self, policy: Policy) -> None:
        """The policy of rows submitted from now on."""
        raise NotImplementedError

    def close(self, timeout: float) -> bool:
        """Answers what is in flight."""
        raise NotImplementedError

    def stalled_for(self) -> float:
        """Seconds."""
        raise NotImplementedError

    def snapshot(self) -> EngineState:
        """The counts now."""
        raise NotImplementedError
