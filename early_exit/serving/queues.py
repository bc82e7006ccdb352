"""Rows that wait for segments, and which of them run next. No threads, no clock of its own.

Rows are numbered in the order in which they arrived (`Rows.index`), which is that of their
deadlines.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from early_exit.inference.infer import Rows
from early_exit.inference.policy import Policy


class WaitingRows:
    """Rows that wait for one segment under one policy, in order of their numbers.

    Rows of several workers' runs may be put in any order; the numbers of one `put` ascend.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._parts: list[tuple[int, float, Rows]] = []
        """A heap of first number, when the rows were put, and rows."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def first(self) -> int:
        """The lowest number; at least one row waits."""
        return self._parts[0][0]

    @property
    def since(self) -> float:
        """When the row that has waited longest was put; at least one row waits."""
        return min(since for _, since, _ in self._parts)

    def put(self, rows: Rows, now: float) -> None:
        """Adds rows, at least one."""
        heapq.heappush(self._parts, (int(rows.index[0]), now, rows))
        self._count += len(rows.index)

    def take(self, count: int) -> list[Rows]:
        """Removes the `count` rows of the lowest numbers, or all, in order. They are views: nothing
        is copied."""
        taken = []
        missing = count = min(count, self._count)
        while missing:
            _, since, rows = heapq.heappop(self._parts)
            end = min(missing, len(rows.index))
            if self._parts:  # where the next part's numbers begin
                end = min(end, int(np.searchsorted(rows.index, self._parts[0][0])))
            if end < len(rows.index):
                rest = rows.select(slice(end, None))
                heapq.heappush(self._parts, (int(rest.index[0]), since, rest))
                rows = rows.select(slice(end))
            taken.append(rows)
            missing -= end
        self._count -= count
        return taken

    def discard(self, numbers: range) -> list[int]:
        """Removes the rows whose numbers are in a range, and returns their numbers."""
        kept, removed = [], []
        for first, since, rows in self._parts:
            if first >= numbers.stop or rows.index[-1] < numbers.start:
                kept.append((first, since, rows))
                continue
            is_removed = (rows.index >= numbers.start) & (rows.index < numbers.stop)
            removed += rows.index[is_removed].tolist()
            if not is_removed.all():
                rest = rows.select(np.flatnonzero(~is_removed))  # a copy, which frees the others
                kept.append((int(rest.index[0]), since, rest))
        heapq.heapify(kept)
        self._parts, self._count = kept, self._count - len(removed)
        return removed


@dataclass(frozen=True)
class Batch:
    """Rows that run together."""

    position: int
    """Of the segment."""
    policy: Policy
    parts: list[Rows]
    """In order of their numbers."""

    @property
    def numbers(self) -> list[int]:
        """Of all rows."""
        return np.concatenate([rows.index for rows in self.parts]).tolist()


class Queues:
    """The rows that wait for every segment.

    Of the segments whose rows fill a batch, and of the later ones whose rows have waited `patience`
    seconds, the last one runs, because it ends requests and frees memory. If there are none, the
    row with the earliest deadline decides, and of equal deadlines that at the later segment. The
    segment runs on the rows that wait for it in order of their deadlines, up to `max_batch`.

    Deadlines alone would fill no batch but those of the first segment: rows that remain are older
    than all that wait for it, so they would run at once, ever fewer of them. Temperature and
    thresholds are those of a whole run, so only rows of one policy run together, first those of the
    policy of the earliest row.

    max_wait: seconds that fewer than `max_batch` rows are held back, from when the first of them
    was put; patience: seconds that they wait for a later segment while others run, from then on;
    deadline_of: the deadline of a row by its number; it never falls as numbers rise.
    """

    def __init__(
        self,
        num_segments: int,
        max_batch: int,
        max_wait: float,
        patience: float,
        deadline_of: Callable[[int], float],
    ) -> None:
        self._max_batch, self._max_wait, self._patience = max_batch, max_wait, patience
        self._deadline_of = deadline_of
        self._waiting: list[list[WaitingRows]] = [[] for _ in range(num_segments)]
        """By segment, those of every policy; none is empty."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows that wait for each segment."""
        return tuple(sum(map(len, groups)) for groups in self._waiting)

    @property
    def counts_by_thresholds(self) -> dict[tuple[float, ...], list[int]]:
        """Rows that wait for each segment, by the thresholds of their policy."""
        counts: dict[tuple[float, ...], list[int]] = {}
        for position, groups in enumerate(self._waiting):
            for group in groups:
                of_policy = counts.setdefault(group.policy.thresholds, [0] * len(self._waiting))
                of_policy[position] += len(group)
        return counts

    def put(self, position: int, policy: Policy, rows: Rows, now: float) -> None:
        """Adds rows, at least one, that wait for the segment at `position` from now on."""
        groups = self._waiting[position]
        group = next((group for group in groups if group.policy == policy), None)
        if group is None:
            group = WaitingRows(policy)
            groups.append(group)
        group.put(rows, now)

    def take(self, now: float, hold_back: bool = True) -> Batch | None:
        """Removes the rows that run next; None if no rows wait or all are held back.

        hold_back: False if no more rows will be put.
        """
        ready = [
            (position, group)
            for position, groups in enumerate(self._waiting)
            for group in groups
            if not hold_back or len(group) >= self._max_batch or self._due(group) <= now
        ]
        if not ready:
            return None
        full = [
            position
            for position, group in ready
            if len(group) >= self._max_batch or (position and group.since + self._patience <= now)
        ]
        if full:
            chosen = max(full)
        else:
            _, last = min((self._deadline_of(group.first), -position) for position, group in ready)
            chosen = -last
        group = min(
            (group for position, group in ready if position == chosen),
            key=lambda group: group.first,
        )
        parts = group.take(self._max_batch)
        if not group:
            self._waiting[chosen].remove(group)
        return Batch(chosen, group.policy, parts)

    def next_due(self) -> float | None:
        """When the next rows that are held back are due; None if no rows wait."""
        return min((self._due(group) for groups in self._waiting for group in groups), default=None)

    def discard(self, numbers: range) -> list[int]:
        """Removes the rows whose numbers are in a range, and returns their numbers."""
        removed = [
            n for groups in self._waiting for group in groups for n in group.discard(numbers)
        ]
        self._waiting = [[group for group in groups if group] for groups in self._waiting]
        return removed

    def _due(self, group: WaitingRows) -> float:
        return group.since + self._max_wait
