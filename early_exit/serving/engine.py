"""The engine of a server: worker threads run the segments on rows of different requests together.

A free worker takes a full batch of the last segment that has one, or else the rows with the
earliest deadline and whatever waits with them (`early_exit.serving.queues`), so an idle engine runs
a row at once and a busy one fills its batches. A row is answered as soon as it exits. No HTTP, no
event loop and no torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.infer import Rows, RunSegment, advance, all_rows
from early_exit.inference.policy import Policy
from early_exit.inference.segments import spans
from early_exit.inference.stream import join_rows
from early_exit.serving.load import Load, LoadState
from early_exit.serving.queues import Batch, Queues
from early_exit.serving.request import OnAnswer, Request, RowAnswer, SegmentFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """How an engine runs segments."""

    max_batch: int
    """Rows of one run of a segment, at most."""
    workers: int = 1
    """Threads that run segments."""
    max_wait: float = 0.0
    """Seconds that a batch smaller than `max_batch` may be held back while workers are free."""
    max_rows: int = 1024
    """Rows in flight (submitted, not answered), at most."""
    target: float = 0.25
    """Seconds; the deadline of a row is its arrival plus this."""
    patience: float = 0.25
    """Of `target`: how long rows wait for a full batch of a later segment while others run."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "workers", "max_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.max_wait >= 0:
            raise UserError(f"max_wait must be at least 0 seconds, got {self.max_wait}")
        if not self.target > 0:
            raise UserError(f"target must be more than 0 seconds, got {self.target}")
        if not self.patience >= 0:
            raise UserError(f"patience must be at least 0, got {self.patience}")


@dataclass(frozen=True)
class EngineState:
    """What an engine does at one moment, and what it has done. Tuples are by segment, but
    `answered` is by exit, of all exits."""

    waiting: tuple[int, ...]
    """Rows that wait for each segment."""
    in_flight: int
    """Rows submitted, not answered."""
    answered: tuple[int, ...]
    """Rows answered at each exit."""
    runs: tuple[int, ...]
    """Of each segment so far; failed ones are not counted."""
    rows: tuple[int, ...]
    """Of these runs together."""
    seconds: tuple[float, ...]
    """Of these runs together."""


class Overloaded(Exception):
    """Too many rows are in flight."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds until the rows that wait now are expected to be answered."""


class Engine:
    """Runs segments on the rows of all requests, with exits taken.

    segments: as for `early_exit.inference.infer.run_segments`, callable from `workers` threads at
    the same time; clock: seconds that never go back.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, RunSegment]],
        policy: Policy,
        settings: EngineSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ends = [last for _, last in spans(policy.enabled)]
        if ends != [exit_index for exit_index, _ in segments]:
            raise UserError(
                f"the policy's segments end at exits {ends}, those given at"
                f" {[exit_index for exit_index, _ in segments]}; give the segments of this policy"
            )
        self._segments, self._policy, self._settings = list(segments), policy, settings
        self._clock = clock
        self._changed = threading.Condition()
        """Its lock guards everything below. No segment and no `on_answer` is called under it."""
        self._queues = Queues(
            len(segments),
            settings.max_batch,
            settings.max_wait,
            settings.patience * settings.target,
            lambda number: self._in_flight[number].deadline,
        )
        self._in_flight: dict[int, Request] = {}
        """The requests of all rows in flight, by the row's number."""
        self._submitted = 0
        self._running: dict[int, float] = {}
        """When the run of each busy worker began."""
        self._occupied_since: dict[int, float] = {}
        """The same, but the end of the worker's run before, if rows waited then: between two runs
        answers are sent and requests are read, which takes processor time too."""
        self._load = Load(len(segments))
        self._answered = [0] * policy.num_exits
        self._is_closed = False
        self._workers = [
            threading.Thread(
                target=self._work, args=(worker,), name=f"worker {worker}", daemon=True
            )
            for worker in range(settings.workers)
        ]
        for thread in self._workers:
            thread.start()

    def submit(self, images: np.ndarray, on_answer: OnAnswer) -> Request:
        """Puts images in the queue of the first segment.

        images: (B, C, H, W) as the first segment takes them, B at least 1, of one C, H and W in all
        requests. on_answer: called from a worker's thread, possibly before this returns: once per
        row, or with an exception that ends the request (`SegmentFailed`, or RuntimeError from
        `close`). It must not block: the worker waits for it.

        Raises Overloaded if more rows would be in flight than `max_rows`, UserError if there are no
        images or more than `max_rows`, and RuntimeError after `close`.
        """
        count, most = len(images), self._settings.max_rows
        if not 1 <= count <= most:
            raise UserError(f"a request has 1 to {most} images, got {count}; send it in parts")
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._load.arrived += count
            if len(self._in_flight) + count > most:
                raise Overloaded(
                    f"{len(self._in_flight)} images are in progress, {count} more would exceed"
                    f" {most}; try again later",
                    self.expected_wait,
                )
            now = self._clock()
            numbers = range(self._submitted, self._submitted + count)
            deadline = now + self._settings.target
            request = Request(numbers, deadline, now, on_answer, self._drop)
            self._queues.put(0, self._policy, all_rows(images, numbers.start), now)
            self._in_flight.update(dict.fromkeys(numbers, request))
            self._submitted = numbers.stop
            self._changed.notify_all()
        return request

    @property
    def policy(self) -> Policy:
        """Of rows submitted now."""
        return self._policy

    def set_policy(self, policy: Policy) -> None:
        """Changes the policy of rows submitted from now on; those submitted earlier finish under
        the policy they came with.

        Raises UserError unless exits, criterion and enabled exits are the same.
        """
        for name in ("exit_names", "criterion", "enabled"):
            old, new = getattr(self._policy, name), getattr(policy, name)
            if old != new:
                raise UserError(
                    f"{name} of the new policy is {new}, the segments are for {old}; only"
                    " thresholds and temperatures can change while they are served"
                )
        with self._changed:
            self._policy = policy

    def close(self, timeout: float) -> bool:
        """Refuses new rows, answers those in flight and ends the workers.

        timeout: seconds. Returns whether all was answered in time. If not, the remaining requests
        end with a RuntimeError, and a worker ends when its run does.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._workers:
            thread.join(max(0.0, end - time.monotonic()))
        if not any(thread.is_alive() for thread in self._workers):
            return True
        with self._changed:
            remaining = set(self._in_flight.values())
        for request in remaining:
            request.fail(RuntimeError("the engine was closed before all rows were answered"))
        return False

    def stalled_for(self) -> float:
        """The seconds for which the longest-running call of a segment has been running; 0 if none
        runs."""
        with self._changed:
            return max((self._clock() - begin for begin in self._running.values()), default=0.0)

    @property
    def expected_wait(self) -> float:
        """The seconds that a row submitted now is expected to wait for its first run, from the rows
        that wait and the measured seconds per row."""
        with self._changed:
            return self._load.expected_wait(self._queues.counts, self._settings.workers)

    def count_refused(self, count: int) -> None:
        """Counts rows that were refused before they were submitted: they arrived too."""
        with self._changed:
            self._load.arrived += count

    def load(self) -> LoadState:
        """What the choice of a policy depends on."""
        with self._changed:
            filled = len(self._in_flight) / self._settings.max_rows
            waiting = self._queues.counts_by_thresholds
            return self._load.state(waiting, self._settings.workers, filled)

    def snapshot(self) -> EngineState:
        """What the engine does now and what it has done."""
        with self._changed:
            return EngineState(
                waiting=self._queues.counts,
                in_flight=len(self._in_flight),
                answered=tuple(self._answered),
                runs=tuple(self._load.runs),
                rows=tuple(self._load.rows),
                seconds=tuple(self._load.seconds),
            )

    def _work(self, worker: int) -> None:
        """What a worker does until the engine is closed and nothing is in flight."""
        while (batch := self._next_batch(worker)) is not None:
            self._run(batch, worker)

    def _next_batch(self, worker: int) -> Batch | None:
        with self._changed:
            while True:
                now = self._clock()
                batch = self._queues.take(now, hold_back=not self._is_closed)
                if batch is not None:
                    self._running[worker] = now
                    self._occupied_since.setdefault(worker, now)
                    return batch
                self._occupied_since.pop(worker, None)
                if self._is_closed and not self._in_flight:
                    return None
                due = self._queues.next_due()
                self._changed.wait(None if due is None else min(due - now, threading.TIMEOUT_MAX))

    def _run(self, batch: Batch, worker: int) -> None:
        """Runs a segment on a batch, reports the rows that exited and queues the others."""
        exit_index, segment = self._segments[batch.position]
        answers: list[tuple[int, np.ndarray]] = []
        try:
            rows = join_rows(batch.parts)
            remaining, exited = advance(segment, rows, batch.policy, exit_index)
            if exited is not None:
                answers = list(zip(exited.index.tolist(), exited.answer, strict=True))
        except Exception as error:
            self._end_failed(batch, worker, error)
            return
        with self._changed:
            reports = self._finish(batch, worker, rows.index.tolist(), answers, remaining)
            self._changed.notify_all()
        for request, answer in reports:
            request.report(answer)

    def _finish(
        self,
        batch: Batch,
        worker: int,
        numbers: list[int],
        answers: list[tuple[int, np.ndarray]],
        remaining: Rows | None,
    ) -> list[tuple[Request, RowAnswer]]:
        """Counts a run and queues the rows that remain; returns what is to be reported. Rows of
        requests that have ended are dropped."""
        now, exit_index = self._clock(), self._segments[batch.position][0]
        seconds = now - self._running.pop(worker)
        self._load.add(
            batch.position,
            batch.policy.thresholds,
            len(numbers),
            len(numbers) - len(answers),
            seconds,
            now - self._occupied_since[worker],
        )
        self._occupied_since[worker] = now
        for number in numbers:
            request = self._in_flight[number]
            request.computed[number - request.numbers.start] += seconds
        reports = []
        for number, logits in answers:
            request = self._in_flight.pop(number)
            if not request.has_ended:
                row = number - request.numbers.start
                computed = request.computed[row]
                queued = max(0.0, now - request.arrival - computed)
                reports.append((request, RowAnswer(row, logits, exit_index, queued, computed)))
        self._answered[exit_index] += len(reports)
        if remaining is not None:
            kept = []
            for index, number in enumerate(remaining.index.tolist()):
                if self._in_flight[number].has_ended:
                    del self._in_flight[number]
                else:
                    kept.append(index)
            if len(kept) < len(remaining.index):
                remaining = remaining.select(np.array(kept, np.int64))
            if kept:
                self._queues.put(batch.position + 1, batch.policy, remaining, now)
        return reports

    def _end_failed(self, batch: Batch, worker: int, error: Exception) -> None:
        """Ends the requests of a batch whose run raised an error."""
        message = (
            f"segment {batch.position + 1} of {len(self._segments)} failed with"
            f" {type(error).__name__}"
        )
        log.error("%s", message, exc_info=error)
        with self._changed:
            del self._running[worker], self._occupied_since[worker]
            requests = {self._in_flight.pop(number) for number in batch.numbers}
            self._changed.notify_all()
        for request in requests:
            request.fail(SegmentFailed(message))

    def _drop(self, request: Request) -> None:
        """Removes the rows of a request that has ended from the queues."""
        with self._changed:
            for number in self._queues.discard(request.numbers):
                del self._in_flight[number]
                self._load.arrived -= 1
            self._changed.notify_all()
