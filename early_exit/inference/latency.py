"""Latency: inference with exits beside the plain network and static ones, measured in one run.

The measurements are interleaved, so that a machine that slows down slows all of them, each repeat
in another order; medians over repeats; each call after one that is not timed; with the device
synchronised before the clock is read. Heads, decisions and the selection of rows lie inside the
timed region.
"""

import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from early_exit.inference.infer import Array, Rows, RunSegment, advance, all_rows, run_segments
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.segments import Segment
from early_exit.model.features import Features
from early_exit.model.network import Stage

Timer = Callable[..., float]
"""Makes calls, one after the other, and returns the seconds they took, the device synchronised."""
T = TypeVar("T")
PLAIN = "plain"


@dataclass(frozen=True)
class BatchSeconds:
    """Seconds per batch over a sample of batches, each the median of its repeats."""

    p50: float
    p95: float
    total: float


@dataclass(frozen=True)
class Timing:
    """Seconds at one batch size."""

    batch_size: int
    images: int
    repeats: int
    plain: BatchSeconds
    """The plain backbone."""
    live: BatchSeconds
    """With exits taken."""
    ideal: BatchSeconds
    """The sum of the segments' own times, called one after the other, heads and criterion included,
    each at the number of rows that reached it."""
    no_exit_taken: BatchSeconds
    """With all enabled exits computed and none taken."""
    without_heads: BatchSeconds | None
    """The stages' bodies alone at the number of rows that reached them, without heads, decisions
    and the selection of rows, in eager torch; None in other runtimes. BranchyNet's public code adds
    up these times (`branchynet/net.py` of github.com/kunglab/branchynet)."""
    segment_seconds: tuple[float, ...]
    """By exit: the time of the segment that ends there with all rows, its head included; 0 for a
    disabled exit. Medians over batches."""
    speedup_range: tuple[float, float]
    """The lowest and the highest speed-up over repeats, of all batches together."""
    networks: dict[str, BatchSeconds] = field(default_factory=dict)
    """Static networks, by name."""

    @property
    def batches(self) -> float:
        """The number of batches."""
        return self.images / self.batch_size

    @property
    def speedup(self) -> float:
        """How many times faster than the plain network."""
        return self.plain.total / self.live.total

    @property
    def speedup_without_heads(self) -> float | None:
        """How many times faster than the plain network if heads and decisions were free."""
        return self.plain.total / self.without_heads.total if self.without_heads else None

    @property
    def fraction_of_ideal(self) -> float:
        """The ideal time over the measured one: 1 if comparing scores and selecting rows cost
        nothing."""
        return self.ideal.total / self.live.total

    @property
    def overhead(self) -> float:
        """What the exits cost on top of the plain network when none is taken, as a fraction."""
        return self.no_exit_taken.total / self.plain.total - 1

    @property
    def segment_shares(self) -> tuple[float, ...]:
        """Each segment's share of the seconds of all segments."""
        total = sum(self.segment_seconds)
        return tuple(seconds / total for seconds in self.segment_seconds)


@dataclass(frozen=True)
class SegmentInput:
    """What one segment takes in inference with exits."""

    exit_index: int
    segment: RunSegment
    rows: Rows
    temperature: float

    def run(self) -> object:
        """Calls the segment."""
        return self.segment(self.rows.features, self.temperature, self.rows.state)


def segment_inputs(
    segments: Sequence[tuple[int, RunSegment]], images: Array, policy: Policy
) -> list[SegmentInput]:
    """What each segment takes under `policy`, up to the last one that any row reaches."""
    rows = all_rows(images)
    inputs = []
    for exit_index, segment in segments:
        inputs.append(SegmentInput(exit_index, segment, rows, policy.temperatures[exit_index]))
        remaining, _ = advance(segment, rows, policy, exit_index)
        if remaining is None:
            break
        rows = remaining
    return inputs


def stage_inputs(segments: Sequence[SegmentInput]) -> list[tuple[Stage, Features]]:
    """The stages of the segments, each with the features it takes; none in a runtime other than
    eager torch, whose segments have no stages."""
    inputs: list[tuple[Stage, Features]] = []
    for item in segments:
        if not isinstance(item.segment, Segment):
            return []
        features = item.rows.features
        for stage in item.segment.stages:
            inputs.append((stage, features))
            features, _ = stage(features, with_logits=False)
    return inputs


Sample = dict[str, float]
"""Seconds of one batch, measured once, by what was measured."""


def measure(
    network: RuntimeNetwork,
    batches: Iterable[Tensor],
    policy: Policy,
    *,
    others: Mapping[str, nn.Module] | None = None,
    repeats: int = 5,
    seconds: float = 15.0,
) -> Timing | None:
    """Times the batches, as many of them as about `seconds` allow and at least one; None if there
    are none.

    batches: tensors (B, 3, H, W), normalised, all of the same size, on the network's device;
    others: static networks, timed in turns with the plain one.
    """
    samples: list[list[Sample]] = []  # (batches, repeats)
    size, spent = 0, 0.0
    network.segments(policy)  # building takes seconds
    for module in (None, *(others or {}).values()):
        network.plain(module)
    with network.runtime.context():
        drawn = random.Random(0)
        for images in batches:
            began = time.perf_counter()
            samples.append(measure_batch(network, images, policy, others or {}, repeats, drawn))
            size, spent = len(images), spent + time.perf_counter() - began
            if spent > seconds:
                break
    return summary(samples, size, policy, list(others or ())) if samples else None


def measure_batch(
    network: RuntimeNetwork,
    images: Tensor,
    policy: Policy,
    others: Mapping[str, nn.Module],
    repeats: int,
    drawn: random.Random,
) -> list[Sample]:
    """Times one batch `repeats` times, all quantities in turns, each turn in an order that is drawn
    at random."""
    array, never = network.runtime.array(images), policy.with_threshold(NEVER)
    segments = network.segments(policy)
    taken = segment_inputs(segments, array, policy)
    calls: dict[str, Sequence[Callable[[], object]]] = {
        PLAIN: [partial(network.plain(), array)],
        "live": [partial(run_segments, segments, array, policy)],
        "no_exit_taken": [partial(run_segments, segments, array, never)],
        "ideal": [item.run for item in taken],
    }
    if bodies := stage_inputs(taken):
        calls["without_heads"] = [partial(stage, features, False) for stage, features in bodies]
    for item in segment_inputs(segments, array, never):
        calls[f"segment {item.exit_index}"] = [item.run]
    for name, module in others.items():
        calls[f"network {name}"] = [partial(network.plain(module), array)]
    timer = make_timer(network)
    return [{name: timer(*calls[name]) for name in order} for order in turns(calls, repeats, drawn)]


def turns(names: Collection[T], count: int, drawn: random.Random) -> Iterator[list[T]]:
    """The order of measurements in each of `count` turns, drawn at random.

    A call is faster after one that used the same weights, and one fixed order favours it.
    """
    for _ in range(count):
        yield drawn.sample(list(names), len(names))


def summary(
    samples: Sequence[Sequence[Sample]], batch_size: int, policy: Policy, others: Sequence[str]
) -> Timing:
    """The timing that samples (batches, repeats) give."""

    def values(name: str) -> np.ndarray:
        return np.array([[sample[name] for sample in turns] for turns in samples])

    def seconds(name: str) -> BatchSeconds:
        medians = np.median(values(name), axis=1)
        p50, p95 = np.percentile(medians, [50, 95]).tolist()
        return BatchSeconds(p50, p95, float(medians.sum()))

    first = samples[0][0]
    ratios = values(PLAIN).sum(axis=0) / values("live").sum(axis=0)  # of each repeat
    return Timing(
        batch_size=batch_size,
        images=len(samples) * batch_size,
        repeats=len(samples[0]),
        plain=seconds(PLAIN),
        live=seconds("live"),
        ideal=seconds("ideal"),
        no_exit_taken=seconds("no_exit_taken"),
        without_heads=seconds("without_heads") if "without_heads" in first else None,
        segment_seconds=tuple(
            float(np.median(np.median(values(f"segment {index}"), axis=1)))
            if f"segment {index}" in first
            else 0.0
            for index in range(policy.num_exits)
        ),
        speedup_range=(float(ratios.min()), float(ratios.max())),
        networks={name: seconds(f"network {name}") for name in others},
    )


def make_timer(network: RuntimeNetwork) -> Timer:
    """The timer of a runtime. It makes all calls once before it times them one by one: what was
    timed in between has filled the caches, and the threads of another network's pool were asleep.
    That alone made a ResNet-56 with exits a quarter slower at batch 1."""

    def timed(*calls: Callable[[], object]) -> float:
        for call in calls:
            call()
        network.runtime.synchronize()
        seconds = 0.0
        for call in calls:
            began = time.perf_counter()
            call()
            network.runtime.synchronize()
            seconds += time.perf_counter() - began
        return seconds

    return timed
