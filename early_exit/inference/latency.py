"""Latency: inference with exits beside the plain network, measured in one run.

The measurements are interleaved, so that a machine that slows down slows all of them; medians over
repeats; after a warm-up; with the device synchronised before the clock is read. Heads, decisions
and the selection of rows lie inside the timed region.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from early_exit.inference.infer import Rows, advance, infer
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segments import Segment, segments_of
from early_exit.model.features import Features, select_rows
from early_exit.model.network import MultiExitNetwork, Stage
from early_exit.system.device import synchronize

Autocast = Callable[[], AbstractContextManager]
Timer = Callable[[Callable[[], object]], float]
"""Calls a function and returns the seconds it took, the device synchronised."""


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
    """The sum of the segments' own times, heads and criterion included, each at the number of rows
    that reached it."""
    no_exit_taken: BatchSeconds
    """With all enabled exits computed and none taken."""
    without_heads: BatchSeconds
    """The stages' bodies alone at the number of rows that reached them, without heads, decisions
    and the selection of rows. BranchyNet's public code adds up these times
    (`branchynet/net.py` of github.com/kunglab/branchynet)."""
    stage_seconds: tuple[float, ...]
    """Each stage's own time with all rows, its head included: medians over batches."""

    @property
    def batches(self) -> float:
        """The number of batches."""
        return self.images / self.batch_size

    @property
    def speedup(self) -> float:
        """How many times faster than the plain network."""
        return self.plain.total / self.live.total

    @property
    def speedup_without_heads(self) -> float:
        """How many times faster than the plain network if heads and decisions were free."""
        return self.plain.total / self.without_heads.total

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
    def stage_shares(self) -> tuple[float, ...]:
        """Each stage's share of the seconds of all stages."""
        total = sum(self.stage_seconds)
        return tuple(seconds / total for seconds in self.stage_seconds)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each stage by the number of rows, and of the plain network."""

    batch_size: int
    sizes: tuple[int, ...]
    """Numbers of rows, up to the batch size."""
    seconds: tuple[tuple[float, ...], ...]
    """(stages, sizes), head and decision included."""
    without_head: tuple[tuple[float, ...], ...]
    """(stages, sizes), with the exit disabled."""
    plain: float
    """Of a whole batch."""
    others: dict[str, float] = field(default_factory=dict)
    """Of a whole batch by other networks, measured in turns with the plain one."""

    def of(self, enabled: Sequence[bool], shares: np.ndarray) -> np.ndarray:
        """Seconds (P,) of a batch: the sum of every stage's time at the mean number of rows that
        reach it.

        enabled: of the early exits; shares: (P, exits) of the batch that exit at each exit.
        """
        exited_before = np.cumsum(shares, axis=1) - shares
        total = np.zeros(len(shares))
        times = zip((*enabled, True), self.seconds, self.without_head, strict=True)
        for reach, (is_enabled, with_head, without) in zip(
            (1 - exited_before).T, times, strict=True
        ):
            seconds = with_head if is_enabled else without
            rows = (self.batch_size * reach).clip(0)
            total += np.interp(rows, (0, *self.sizes), (0.0, *seconds))
        return total


@torch.inference_mode()
def stage_times(
    network: MultiExitNetwork,
    images: Tensor,
    criterion: str,
    *,
    autocast: Autocast,
    others: Mapping[str, nn.Module] | None = None,
    repeats: int = 21,
    seconds: float = 15.0,
) -> StageTimes:
    """Measures each stage, with its exit enabled and disabled, on 1, 2, 4, ... rows of a batch, and
    the plain network and the `others` on the whole batch.

    images: the batch (B, C, H, W). Medians of `repeats`, or of as many as about `seconds` allow and
    at least three.
    """
    network.eval()
    others = others or {}
    batch_size = len(images)
    sizes = sorted({*(2**power for power in range(batch_size.bit_length())), batch_size})
    policy = Policy(
        exit_names=network.exit_names,
        thresholds=(NEVER,) * (network.num_exits - 1),
        criterion=criterion,
    )
    timer = _timer(images.device)

    def measure_enabled(index: int, features: Features) -> float:
        segment = Segment((network.stages[index],), criterion)
        rows = Rows(torch.arange(_count(features), device=images.device), features)
        return timer(lambda: advance(segment, rows, policy, index))

    def measure_disabled(index: int, features: Features) -> float:
        if index == network.num_exits - 1:  # the final exit cannot be disabled
            return measure_enabled(index, features)
        return timer(lambda: network.stages[index](features, with_logits=False))

    wholes: list[list[float]] = []
    enabled: list[list[list[float]]] = []
    disabled: list[list[list[float]]] = []
    with autocast():
        inputs = all_stage_inputs(network, images)
        began = time.perf_counter()
        for turn in range(2 + repeats):  # the first two are the warm-up
            if turn >= 5 and time.perf_counter() - began > seconds:
                break
            networks = (network.backbone, *others.values())
            wholes.append([timer(partial(net, images)) for net in networks])
            for measure_stage, samples in (
                (measure_enabled, enabled),
                (measure_disabled, disabled),
            ):
                samples.append(
                    [
                        [measure_stage(index, select_rows(rows, slice(size))) for size in sizes]
                        for index, rows in enumerate(inputs)
                    ]
                )
    plain, *rest = np.median(wholes[2:], axis=0).tolist()
    return StageTimes(
        batch_size,
        tuple(sizes),
        tuple(map(tuple, np.median(enabled[2:], axis=0).tolist())),
        tuple(map(tuple, np.median(disabled[2:], axis=0).tolist())),
        plain,
        dict(zip(others, rest, strict=True)),
    )


def all_stage_inputs(network: MultiExitNetwork, images: Tensor) -> list[Features]:
    """The features that each stage takes if no row exits."""
    inputs: list[Features] = [images]
    for stage in network.stages[:-1]:
        features, _ = stage(inputs[-1], with_logits=False)
        inputs.append(features)
    return inputs


@dataclass(frozen=True)
class SegmentInput:
    """What one segment takes in live inference."""

    segment: Segment
    rows: Rows
    temperature: float


def segment_inputs(network: MultiExitNetwork, images: Tensor, policy: Policy) -> list[SegmentInput]:
    """What each segment takes under `policy`, up to the last one that any row reaches."""
    rows = Rows(torch.arange(len(images), device=images.device), images)
    inputs = []
    for exit_index, segment in segments_of(network, policy):
        inputs.append(SegmentInput(segment, rows, policy.temperatures[exit_index]))
        remaining, _ = advance(segment, rows, policy, exit_index)
        if remaining is None:
            break
        rows = remaining
    return inputs


def stage_inputs(segments: Sequence[SegmentInput]) -> list[tuple[Stage, Features]]:
    """The stages of the segments, each with the features it takes."""
    inputs = []
    for item in segments:
        features = item.rows.features
        for stage in item.segment.stages:
            inputs.append((stage, features))
            features, _ = stage(features, with_logits=False)
    return inputs


@dataclass(frozen=True)
class Sample:
    """Seconds of one batch, measured once."""

    plain: float
    live: float
    ideal: float
    no_exit_taken: float
    without_heads: float
    stages: tuple[float, ...]


@torch.inference_mode()
def measure(
    network: MultiExitNetwork,
    batches: list[Tensor],
    policy: Policy,
    *,
    autocast: Autocast,
    repeats: int = 5,
    seconds: float = 15.0,
) -> Timing:
    """Times the batches, as many of them as about `seconds` allow and at least one.

    batches: tensors (B, 3, H, W), normalised, all of the same size, on the network's device.
    """
    network.eval()
    medians: list[Sample] = []
    with autocast():
        measure_batch(network, batches[0], policy, repeats)  # the warm-up
        began = time.perf_counter()
        for images in batches:
            medians.append(median(measure_batch(network, images, policy, repeats)))
            if time.perf_counter() - began > seconds:
                break
    return Timing(
        batch_size=len(batches[0]),
        images=len(medians) * len(batches[0]),
        repeats=repeats,
        stage_seconds=tuple(np.median([sample.stages for sample in medians], axis=0).tolist()),
        **{
            name: batch_seconds([getattr(sample, name) for sample in medians])
            for name in ("plain", "live", "ideal", "no_exit_taken", "without_heads")
        },
    )


def measure_batch(
    network: MultiExitNetwork, images: Tensor, policy: Policy, repeats: int
) -> list[Sample]:
    """Times one batch `repeats` times, all quantities in turns."""
    never = policy.with_threshold(NEVER)
    segments = segment_inputs(network, images, policy)
    bodies = stage_inputs(segments)
    stages = list(zip(network.stages, all_stage_inputs(network, images), strict=True))
    enabled = [policy.is_enabled(exit_index) for exit_index in range(policy.num_exits)]
    timer = _timer(images.device)
    return [
        Sample(
            plain=timer(lambda: network.backbone(images)),
            live=timer(lambda: infer(network, images, policy)),
            no_exit_taken=timer(lambda: infer(network, images, never)),
            ideal=sum(timer(partial(_run, item)) for item in segments),
            without_heads=sum(timer(partial(stage, features, False)) for stage, features in bodies),
            stages=tuple(
                timer(partial(stage, features, with_logits))
                for (stage, features), with_logits in zip(stages, enabled, strict=True)
            ),
        )
        for _ in range(repeats)
    ]


def median(samples: Sequence[Sample]) -> Sample:
    """The median of each quantity."""
    return Sample(
        **{
            item.name: np.median(
                [getattr(sample, item.name) for sample in samples], axis=0
            ).tolist()
            for item in fields(Sample)
        }
    )


def batch_seconds(values: Sequence[float]) -> BatchSeconds:
    """The quantiles and the sum of the seconds of several batches."""
    p50, p95 = np.percentile(values, [50, 95]).tolist()
    return BatchSeconds(p50, p95, float(sum(values)))


def _run(item: SegmentInput) -> object:
    return item.segment(item.rows.features, item.temperature, item.rows.state)


def _count(features: Features) -> int:
    return len(features[0]) if isinstance(features, tuple) else len(features)


def _timer(device: torch.device) -> Timer:
    def timed(call: Callable[[], object]) -> float:
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - began

    return timed
