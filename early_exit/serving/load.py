"""What arrived, what the runs of the segments took, and how long a new row is expected to wait."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FADING = 0.98  # of earlier runs when one is added: about the last 50 count
LAST = 15  # runs of about one size, of which the median counts
FEW = 3  # runs of a size: one or two may have been held up

Thresholds = tuple[float, ...]
"""Of a policy: what distinguishes those that change with the load."""


@dataclass(frozen=True)
class LoadState:
    """What an engine has to do, as far as the choice of a policy depends on it."""

    arrived: int
    """Rows so far, refused ones too, without those that were dropped while they waited."""
    waiting: Mapping[Thresholds, Sequence[int]]
    """Rows that wait for each segment, by the thresholds that they came with."""
    seconds: np.ndarray
    """(segments,) per row, of all workers together, in large batches; 0 of a segment that has not
    run."""
    filled: float
    """Rows in flight as a share of those that may be, beyond which rows are refused."""
    remaining: Mapping[Thresholds, np.ndarray]
    """(segments, 2) of the last runs under these thresholds: rows, and rows that did not exit."""


class Load:
    """Arrived rows; runs, rows and seconds per segment.

    The expected wait counts recent runs alone: a busy segment runs larger batches, which take less
    time per row.
    """

    def __init__(self, num_segments: int) -> None:
        self.arrived = 0
        """As in `LoadState`."""
        self.runs = [0] * num_segments
        self.rows = [0] * num_segments
        self.seconds = [0.0] * num_segments
        self._recent = np.zeros((num_segments, 3))
        """Rows, seconds, and rows that remained."""
        self._by_size: list[dict[int, deque[float]]] = [{} for _ in range(num_segments)]
        """Seconds per row of the last runs of each segment, by the binary digits of their rows."""
        self._remaining: dict[Thresholds, np.ndarray] = {}

    def add(
        self,
        position: int,
        thresholds: Thresholds,
        rows: int,
        remaining: int,
        seconds: float,
        occupied: float,
    ) -> None:
        """Adds a run of the segment at `position`.

        remaining: the rows that did not exit; occupied: the seconds of the run and, if rows waited
        for it, since the worker's run before. Forecasts count these.
        """
        self.runs[position] += 1
        self.rows[position] += rows
        self.seconds[position] += seconds
        self._recent[position] = FADING * self._recent[position] + (rows, occupied, remaining)
        of_size = self._by_size[position].setdefault(rows.bit_length(), deque(maxlen=LAST))
        of_size.append(occupied / rows)
        of_policy = self._remaining.setdefault(thresholds, np.zeros((len(self.runs), 2)))
        of_policy[position] = FADING * of_policy[position] + (rows, remaining)

    def state(
        self, waiting: Mapping[Thresholds, Sequence[int]], workers: int, filled: float
    ) -> LoadState:
        """What the choice of a policy depends on. A queue that is long is run in large batches, so
        the seconds per row are of these, even when only small ones have run since.

        waiting: rows by segment, by the thresholds that they came with; filled: as in `LoadState`.
        """
        seconds = []
        for by_size in self._by_size:
            sizes = [size for size, runs in by_size.items() if len(runs) >= FEW] or list(by_size)
            seconds.append(statistics.median(by_size[max(sizes)]) if sizes else 0.0)
        return LoadState(
            self.arrived,
            waiting,
            np.array(seconds) / workers,
            filled,
            {thresholds: counts.copy() for thresholds, counts in self._remaining.items()},
        )

    def expected_wait(self, waiting: Sequence[int], workers: int) -> float:
        """The seconds until all rows that wait now are answered: a row that arrives now has the
        latest deadline, so they run before it, in later segments too. 0 before the first run.

        waiting: rows by segment.
        """
        total = per_row = 0.0
        for count, (rows, seconds, remaining) in zip(
            reversed(waiting), self._recent[::-1].tolist(), strict=True
        ):
            # of a row that waits for this segment: the segment, and the rest if it remains
            per_row = (seconds + remaining * per_row) / rows if rows else per_row
            total += count * per_row
        return total / workers
