"""What the runs of the segments took, and how long a new row is expected to wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FADING = 0.98  # of earlier runs when one is added: about the last 50 count


class Load:
    """Runs, rows and seconds per segment.

    The expected wait counts recent runs alone: a busy segment runs larger batches, which take less
    time per row.
    """

    def __init__(self, num_segments: int) -> None:
        self.runs = [0] * num_segments
        self.rows = [0] * num_segments
        self.seconds = [0.0] * num_segments
        self._recent = np.zeros((num_segments, 3))
        """Rows, seconds, and rows that remained."""

    def add(self, position: int, rows: int, seconds: float, remaining: int) -> None:
        """Adds a run of the segment at `position`. remaining: the rows that did not exit."""
        self.runs[position] += 1
        self.rows[position] += rows
        self.seconds[position] += seconds
        self._recent[position] = FADING * self._recent[position] + (rows, seconds, remaining)

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
