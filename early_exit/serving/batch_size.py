"""The batch size of a server that is given none: by measured throughput."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from early_exit.inference.infer import RunSegment, run_segments
from early_exit.inference.policy import NEVER, Policy

SIZES = (1, 2, 4, 8, 16, 32, 64)
NEAR_BEST = 0.95  # of the best throughput: a smaller batch answers sooner
REPEATS = 5  # a size, beside a first run that is not counted
LIMIT = 10.0  # seconds in total, which a large network would exceed


def pick_max_batch(
    segments: Sequence[tuple[int, RunSegment]],
    example_images: np.ndarray,
    policy: Policy,
    sizes: Sequence[int] = SIZES,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The smallest batch size whose throughput is within 5 % of the best, all rows going to the
    final exit.

    example_images: (B, C, H, W) as the first segment takes them, B at least 1; they are repeated as
    needed. sizes: rising; those that would begin after `LIMIT` seconds are not tried.
    """
    policy, begin = policy.with_threshold(NEVER), clock()
    throughput: dict[int, float] = {}
    for size in sizes:
        if throughput and clock() - begin > LIMIT:
            break
        images = example_images[np.arange(size) % len(example_images)]
        run_segments(segments, images, policy)
        seconds: list[float] = []
        while len(seconds) < REPEATS and not (seconds and clock() - begin > LIMIT):
            start = clock()
            run_segments(segments, images, policy)
            seconds.append(clock() - start)
        throughput[size] = size / statistics.median(seconds)
    best = max(throughput.values())
    return min(size for size, found in throughput.items() if found >= NEAR_BEST * best)
