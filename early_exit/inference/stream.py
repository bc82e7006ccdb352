"""Inference on a stream of batches: rows that remain after an exit wait until they fill a batch.

In `infer` the later segments run on ever fewer rows. Here the remaining rows of several batches are
computed together, and the answers still come batch by batch, in order. Works on torch and numpy
arrays alike and imports no torch.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.infer import (
    Answers,
    Array,
    Rows,
    RunSegment,
    advance,
    all_rows,
    check_network,
    join,
    namespace,
)
from early_exit.inference.policy import Policy
from early_exit.inference.segments import segments_of
from early_exit.model.features import concatenate

if TYPE_CHECKING:
    from torch import Tensor

    from early_exit.model.network import MultiExitNetwork

MAX_AHEAD = 100  # of 64 rows, 1000 classes: 26 MB of answers held back


class SegmentQueue:
    """Rows that wait for a segment, first in, first out; each row with its number as `Rows.index`.

    The step on them is `advance`. Numbers must ascend, in the rows of a `put` and from one `put` to
    the next.
    """

    def __init__(self, exit_index: int, segment: RunSegment) -> None:
        self.exit_index, self.segment = exit_index, segment
        self._parts: deque[tuple[Rows, int]] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def oldest(self) -> int:
        """The number of the row that has waited longest, or one below it; the queue is not empty.

        It is exact on the CPU. Reading it from another device would wait for the device, so there
        it is the lower bound that was put in.
        """
        rows, oldest = self._parts[0]
        on_host = isinstance(rows.index, np.ndarray) or rows.index.device.type == "cpu"
        return int(rows.index[0]) if on_host else oldest

    def put(self, rows: Rows, oldest: int = 0) -> None:
        """Adds rows, at least one. oldest: no number of theirs is lower."""
        self._parts.append((rows, oldest))
        self._count += len(rows.index)

    def take(self, count: int) -> Rows:
        """Removes up to `count` rows, those that have waited longest; at least one waits."""
        taken: list[Rows] = []
        missing = count = min(count, self._count)
        while missing:
            rows, oldest = self._parts.popleft()
            size = len(rows.index)
            if size > missing:  # views: nothing is copied until the rest is taken
                self._parts.appendleft((rows.select(slice(missing, None)), oldest))
                rows, size = rows.select(slice(missing)), missing
            taken.append(rows)
            missing -= size
        self._count -= count
        return join_rows(taken)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other; all with a state, or none."""
    if len(parts) == 1:
        return parts[0]
    states = [rows.state for rows in parts]
    array = namespace(parts[0].index)
    return Rows(
        array.concatenate([rows.index for rows in parts]),
        concatenate([rows.features for rows in parts], array.concatenate),
        None if states[0] is None else array.concatenate(states),
    )


class Stream:
    """The state of inference on a stream: a queue per segment, and answers held back for order.

    Rows are numbered from 0 through all batches. A queue passes its rows on in order, so all rows
    that wait for a segment are older than those that wait for an earlier one.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, RunSegment]],
        policy: Policy,
        *,
        batch_size: int | None = None,
        max_wait: float | None = None,
        max_ahead: int = MAX_AHEAD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_ahead", max_ahead)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.queues = [SegmentQueue(exit_index, segment) for exit_index, segment in segments]
        self.policy, self.batch_size = policy, batch_size or 0
        self.max_wait, self.max_ahead, self.clock = max_wait, max_ahead, clock
        self.has_ended = False
        self._total = self._answered = 0
        """Rows that have arrived, and rows of the batches that were given out."""
        self._pending: deque[tuple[int, float]] = deque()
        """Batches not given out: one past the number of the last row, and when it arrived."""
        self._held: list[tuple[Array, Answers]] = []

    def put(self, images: Array) -> None:
        """Adds a batch, (B, C, H, W), B at least 1."""
        if not len(images):
            raise UserError("a batch of the stream has no images; expected at least one")
        self.batch_size = self.batch_size or len(images)
        self.queues[0].put(all_rows(images, self._total), self._total)
        self._total += len(images)
        self._pending.append((self._total, self.clock()))

    def run(self, context: Callable[[], AbstractContextManager]) -> Iterator[Answers]:
        """Runs segments until the rows that wait must wait for more; yields complete batches."""
        while (position := self.next_position()) is not None:
            with context():
                complete = self.step(position)
            yield from complete

    def next_position(self) -> int | None:
        """The segment to run next, or None to wait for more rows.

        The first one takes every batch as it comes. Of the others the latest one with a full batch
        comes first, because it frees most memory; then the earliest one whose rows have waited
        too long, so that the later ones get more of them at once.
        """
        waiting = [position for position, queue in enumerate(self.queues) if len(queue)]
        for position in reversed(waiting):
            if position == 0 or len(self.queues[position]) >= self.batch_size:
                return position
        return next(filter(self._must_run, waiting), None)

    def step(self, position: int) -> list[Answers]:
        """Runs a segment once; returns the batches that are now complete, in order."""
        queue, oldest = self.queues[position], self.queues[position].oldest
        rows = queue.take(self.batch_size if position else len(queue))
        remaining, exited = advance(queue.segment, rows, self.policy, queue.exit_index)
        if remaining is not None:
            self.queues[position + 1].put(remaining, oldest)
        if exited is not None:
            self._held.append((exited.index, exited.answers(queue.exit_index)))
        return self._complete()

    def _must_run(self, position: int) -> bool:
        """Whether the rows that wait for a segment have waited too long."""
        oldest = self.queues[position].oldest
        if self.has_ended or self._total - oldest > self.max_ahead * self.batch_size:
            return True
        if self.max_wait is None:
            return False
        batch = bisect_right(self._pending, oldest, key=lambda pending: pending[0])
        return self.clock() - self._pending[batch][1] >= self.max_wait

    def _complete(self) -> list[Answers]:
        """Removes the batches all of whose rows are answered."""
        oldest = next((queue.oldest for queue in reversed(self.queues) if len(queue)), self._total)
        ends = [0]
        while self._pending and self._pending[0][0] <= oldest:
            ends.append(self._pending.popleft()[0] - self._answered)
        if ends[-1] == 0:
            return []
        index, answers = join(self._held)
        if len(self._held) > 1:
            order = index.argsort()
            index, answers = index[order], answers.select(order)
        self._answered += ends[-1]
        rest = slice(ends[-1], None)
        self._held = [(index[rest], answers.select(rest))] if len(index) > ends[-1] else []
        return [answers.select(slice(begin, end)) for begin, end in pairwise(ends)]


def stream_segments(
    segments: Sequence[tuple[int, RunSegment]],
    batches: Iterable[Array],
    policy: Policy,
    *,
    batch_size: int | None = None,
    max_wait: float | None = None,
    max_ahead: int = MAX_AHEAD,
    clock: Callable[[], float] = time.monotonic,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Answers]:
    """The answers for each batch, in order, each as soon as all its rows are answered.

    segments: as for `run_segments`; batches: images (B, C, H, W), B at least 1, each batch read
    when the answers so far have been taken. The first segment runs on every batch as it comes, a
    later one on `batch_size` rows, by default as many as the first batch has. A later one runs on
    fewer only if

    - the stream has ended, or
    - its oldest row arrived `max_wait` seconds ago or more by the `clock`, which is read when a
      batch has arrived, or
    - more than `max_ahead` times `batch_size` rows have arrived since its oldest row. This bounds
      the answers held back for order.

    Fewer than `batch_size` rows wait for each segment when the next batch is read. context: what
    the segments run in; it is not active while the caller has the answers.

    Equal to `run_segments` on every batch, but for rounding: kernels differ with the number of
    rows. Raises UserError for an empty batch, and for a `batch_size` or `max_ahead` below 1. On a
    device other than the CPU a complete batch may be given out later, because reading which rows
    remain would wait for the device.
    """
    stream = Stream(
        segments,
        policy,
        batch_size=batch_size,
        max_wait=max_wait,
        max_ahead=max_ahead,
        clock=clock,
    )

    def run() -> Iterator[Answers]:
        for images in batches:
            stream.put(images)
            yield from stream.run(context)
        stream.has_ended = True
        yield from stream.run(context)

    return run()


def infer_stream(
    network: MultiExitNetwork,
    batches: Iterable[Tensor],
    policy: Policy,
    *,
    batch_size: int | None = None,
    max_wait: float | None = None,
    max_ahead: int = MAX_AHEAD,
    clock: Callable[[], float] = time.monotonic,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Answers]:
    """The answers for each batch of a stream, in order; equal to `infer` on each but for rounding.

    Rows that remain after an exit wait until they fill a batch. batches: images as `infer` takes
    them; the other arguments are those of `stream_segments`.
    """
    import torch

    check_network(network, policy)

    @contextmanager
    def context() -> Iterator[None]:
        with torch.inference_mode(), autocast():
            yield

    return stream_segments(
        segments_of(network, policy),
        batches,
        policy,
        batch_size=batch_size,
        max_wait=max_wait,
        max_ahead=max_ahead,
        clock=clock,
        context=context,
    )
