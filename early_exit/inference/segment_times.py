"""The seconds of segments by the number of rows: what a policy costs in a runtime.

Disabling an exit merges two stages into one segment and saves a call, so segments are measured, not
stages. Any subset of the candidate exits can then be priced.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from early_exit.inference.infer import Array, Rows, advance, all_rows
from early_exit.inference.latency import make_timer, turns
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.segments import spans

LEAST = 3  # turns


@dataclass(frozen=True)
class SegmentTimes:
    """Seconds of segments by the number of rows, and of the plain network."""

    batch_size: int
    sizes: tuple[int, ...]
    """Numbers of rows, up to the batch size."""
    seconds: dict[tuple[int, int], tuple[float, ...]]
    """(sizes,), by the segment's first and last stage: head and decision included, without the
    selection of the rows that remain."""
    plain: float
    """Of a whole batch."""

    def allows(self, exit_index: int) -> bool:
        """Whether an early exit is a candidate: segments that end there were measured."""
        return any(last == exit_index for _, last in self.seconds)

    def of(self, enabled: Sequence[bool], shares: np.ndarray) -> np.ndarray:
        """Seconds (P,) of a batch: the sum of every segment's time at the mean number of rows that
        reach it.

        enabled: of the early exits, candidates only; shares: (P, exits) of the batch that exit at
        each exit.
        """
        exited = np.cumsum(shares, axis=1)
        total = np.zeros(len(shares))
        for first, last in spans(enabled):
            reach = 1 - (exited[:, first - 1] if first else 0.0)
            rows = (self.batch_size * np.broadcast_to(reach, len(shares))).clip(0)
            total += np.interp(rows, (0, *self.sizes), (0.0, *self.seconds[first, last]))
        return total


def all_spans(candidates: Sequence[int], num_exits: int) -> list[tuple[int, int]]:
    """Every segment between two exits, if these early exits may be enabled: n (n + 1) / 2 for n
    exits, the final one included. Each as the indices of its first and its last stage."""
    ends = [*sorted(candidates), num_exits - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [(first, last) for first in starts for last in ends if last >= first]


def segment_times(
    network: RuntimeNetwork,
    images: Tensor,
    criterion: str,
    spans_to_time: Sequence[tuple[int, int]],
    *,
    repeats: int = 21,
    seconds: float = 15.0,
) -> SegmentTimes:
    """Measures segments on 1, 2, 4, ... rows of a batch, and the plain network on the whole batch,
    in turns, each in another order.

    images: the batch (B, C, H, W); spans_to_time: the first and the last stage of each segment,
    such as those of `all_spans`, or `early_exit.inference.segments.spans` for one policy. Medians
    of `repeats`, or of as many as about `seconds` allow and at least three.
    """
    batch_size, array = len(images), network.runtime.array(images)
    final = network.network.num_exits - 1
    ends = sorted({last for _, last in spans_to_time})
    sizes = sorted({*(2**power for power in range(batch_size.bit_length())), batch_size})
    never = Policy(
        exit_names=network.network.exit_names, thresholds=(NEVER,) * final, criterion=criterion
    )
    timer = make_timer(network)
    calls: dict[tuple[int, int, int] | None, Callable[[], object]] = {}
    """By the first and the last stage and the number of rows; None: the plain network."""
    with network.runtime.context():
        inputs = _inputs(network, array, never, ends)
        calls[None] = partial(network.plain(), array)
        for first, last in spans_to_time:
            segment = network.segment(first, last, criterion)
            for size in sizes:
                rows = inputs[first].select(slice(size))
                calls[first, last, size] = partial(advance, segment, rows, never, last)
        samples: dict[tuple[int, int, int] | None, list[float]] = {key: [] for key in calls}
        began = time.perf_counter()
        for turn, order in enumerate(turns(calls, repeats, random.Random(0))):
            if turn >= LEAST and time.perf_counter() - began > seconds:
                break
            for key in order:
                samples[key].append(timer(calls[key]))
    medians = {key: float(np.median(values)) for key, values in samples.items()}
    return SegmentTimes(
        batch_size,
        tuple(sizes),
        {span: tuple(medians[*span, size] for size in sizes) for span in spans_to_time},
        medians[None],
    )


def _inputs(
    network: RuntimeNetwork, array: Array, never: Policy, ends: Sequence[int]
) -> dict[int, Rows]:
    """All rows as they reach each stage that follows a candidate exit, by its index."""
    rows = all_rows(array)
    inputs = {}
    for first, last in zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True):
        inputs[first] = rows
        if last != ends[-1]:
            remaining, _ = advance(network.segment(first, last, never.criterion), rows, never, last)
            assert remaining is not None  # no exit is taken
            rows = remaining
    return inputs
