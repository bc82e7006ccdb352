"""Seconds of the model per answer when rows always wait, without HTTP: the first part of
benchmarks/serving.py. Imports no torch."""

import itertools
import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
from serving_arms import Arm

from early_exit.inference.infer import Rows, RunSegment, advance, all_rows
from early_exit.inference.policy import Policy
from early_exit.inference.stream import join_rows
from early_exit.serving.batch_size import pick_max_batch
from early_exit.serving.engine import Engine, EngineSettings
from early_exit.serving.request import RowAnswer

PATIENCE = 600  # seconds, of an engine that ends
IDEAL = "ideal"


@dataclass(frozen=True)
class Saturated:
    """One arm, or the ideal, at one batch size, measured once."""

    seconds: float
    """Per answer, in the runs of segments, with the choice and the regrouping of rows."""
    rows: tuple[float, ...] = ()
    """The mean rows of a run of each segment."""


Found = dict[int, dict[str, list[Saturated]]]
"""By batch size and arm, one per turn."""


def measure(
    arms: Sequence[Arm],
    images: np.ndarray,
    batch_sizes: Sequence[int],
    core: int,
    seconds: float,
    turns: int,
    settings: EngineSettings,
) -> tuple[Found, int]:
    """All arms, and the ideal of the last one's segments, at each batch size, in turns in random
    order, in a process of its own on one processor. Also gives the batch size that the server would
    pick for the last arm.

    images: (I, C, H, W) uint8; seconds: of each measurement, after the warm-up; settings: of
    the engine, but for the batch size, and one worker.
    """
    pin = partial(os.sched_setaffinity, 0, (core,))
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=pin) as pool:
        return pool.submit(
            measure_here, arms, images, batch_sizes, seconds, turns, settings
        ).result()


def measure_here(
    arms: Sequence[Arm],
    images: np.ndarray,
    batch_sizes: Sequence[int],
    seconds: float,
    turns: int,
    settings: EngineSettings,
) -> tuple[Found, int]:
    """As `measure`, in this process."""
    loaded = {arm.name: arm.load() for arm in arms}
    model, segments, policy = loaded[arms[-1].name]
    images = model.manifest.input.array(images)
    shares, reaching = rows_that_reach(segments, policy, images, max(batch_sizes))
    measurements = {
        (size, name): partial(
            saturate, own, own_policy, images, replace(settings, max_batch=size, workers=1), seconds
        )
        for size in batch_sizes
        for name, (_, own, own_policy) in loaded.items()
    }
    for size in batch_sizes:
        measurements[size, IDEAL] = partial(
            ideal, segments, policy, shares, reaching, size, seconds
        )
    found: Found = {size: {name: [] for name in (*loaded, IDEAL)} for size in batch_sizes}
    order = random.Random(0)
    for _ in range(turns):
        for size, name in order.sample(list(measurements), len(measurements)):
            found[size][name].append(measurements[size, name]())
    return found, pick_max_batch(segments, images[:1], policy)


def saturate(
    segments: Sequence[tuple[int, RunSegment]],
    policy: Policy,
    images: np.ndarray,
    settings: EngineSettings,
    seconds: float,
) -> Saturated:
    """An engine in which each answer is followed by a new row at once, so that the first segment's
    queue is always filled. Images are submitted one by one, again and again in order."""
    in_flight = (len(segments) + 2) * settings.max_batch
    engine = Engine(segments, policy, replace(settings, max_rows=in_flight))
    numbers, failures, ended = itertools.count(), [], False

    def submit() -> None:
        number = next(numbers) % len(images)
        engine.submit(images[number : number + 1], on_answer)

    def on_answer(answer: RowAnswer | Exception) -> None:
        if isinstance(answer, Exception):
            failures.append(answer)
        elif not ended:
            submit()

    def wait(least_seconds: float) -> None:
        """Until every row in flight now has been answered, and for some seconds at least."""
        begin, answers = time.monotonic(), sum(engine.snapshot().answered)
        while not failures and (
            time.monotonic() - begin < least_seconds
            or sum(engine.snapshot().answered) - answers < 2 * in_flight
        ):
            time.sleep(0.02)

    try:
        for _ in range(in_flight):
            submit()
        wait(0)
        before = engine.snapshot()
        wait(seconds)
        after = engine.snapshot()
    finally:
        ended = True
        engine.close(PATIENCE)
    if failures:
        raise failures[0]
    answers = sum(after.answered) - sum(before.answered)
    runs, rows = (
        np.subtract(getattr(after, name), getattr(before, name)) for name in ("runs", "rows")
    )
    means = tuple((rows / np.maximum(runs, 1)).tolist())
    return Saturated((sum(after.seconds) - sum(before.seconds)) / answers, means)


def rows_that_reach(
    segments: Sequence[tuple[int, RunSegment]], policy: Policy, images: np.ndarray, count: int
) -> tuple[list[float], list[Rows | None]]:
    """The share of the images that reaches each segment, and `count` of their rows there, repeated
    if they are fewer; None if there are none."""
    counts = [0] * len(segments)
    kept: list[list[Rows]] = [[] for _ in segments]
    for begin in range(0, len(images), 64):
        rows: Rows | None = all_rows(images[begin : begin + 64], begin)
        for position, (exit_index, segment) in enumerate(segments):
            if rows is None:
                break
            if sum(len(part.index) for part in kept[position]) < count:
                kept[position].append(rows)
            counts[position] += len(rows.index)
            rows, _ = advance(segment, rows, policy, exit_index)
    joined = [join_rows(parts) if parts else None for parts in kept]
    repeated = [rows and rows.select(np.arange(count) % len(rows.index)) for rows in joined]
    return [reached / len(images) for reached in counts], repeated


def ideal(
    segments: Sequence[tuple[int, RunSegment]],
    policy: Policy,
    shares: Sequence[float],
    reaching: Sequence[Rows | None],
    size: int,
    seconds: float,
) -> Saturated:
    """The segments alone at full batches: the share of rows that reaches each, times its seconds
    per row, the mean over calls after one that is not timed."""
    total = 0.0
    for (exit_index, segment), share, rows in zip(segments, shares, reaching, strict=True):
        if rows is None:
            continue
        full = rows.select(slice(size))
        times: list[float] = []
        temperature, end = policy.temperatures[exit_index], time.monotonic() + seconds / len(shares)
        segment(full.features, temperature, full.state)
        while not times or time.monotonic() < end:
            begin = time.perf_counter()
            segment(full.features, temperature, full.state)
            times.append(time.perf_counter() - begin)
        total += share * statistics.fmean(times) / size
    return Saturated(total)
