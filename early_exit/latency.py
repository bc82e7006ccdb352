"""The clock: inference with exits beside the plain network, in one run.

Interleaved, so that a machine that slows down slows all alike; medians over repeats; warmed up;
the device synchronised before the clock is read. Heads, decision and the dropping of rows lie
inside the timed region.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from early_exit.inference import Rows, advance, infer
from early_exit.network import MultiExitNetwork
from early_exit.policy import NEVER, Policy
from early_exit.runtime import synchronize

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Spread:
    """Seconds per batch over the batches of a sample, each the median of its repeats."""

    p50: float
    p95: float
    total: float


@dataclass(frozen=True)
class Timing:
    """Seconds at one batch size."""

    batch_size: int
    images: int
    repeats: int
    plain: Spread
    """The plain backbone."""
    live: Spread
    """With exits taken."""
    promise: Spread
    """The sum of each stage's own time at the number of rows it really had."""
    full: Spread
    """With exits computed and nobody leaving."""
    trunk: Spread
    """The stages' bodies alone at the number of rows they really had: without heads, decisions and
    the dropping of rows. That is what BranchyNet's public code adds up
    (`branchynet/net.py` of github.com/kunglab/branchynet)."""
    stage_seconds: tuple[float, ...]
    """Each stage's own time, its head included, with all rows: medians over batches."""

    @property
    def batches(self) -> float:
        """How many there were."""
        return self.images / self.batch_size

    @property
    def speedup(self) -> float:
        """How many times faster than the plain network."""
        return self.plain.total / self.live.total

    @property
    def trunk_speedup(self) -> float:
        """How many times faster than the plain network if heads and decisions were free."""
        return self.plain.total / self.trunk.total

    @property
    def kept(self) -> float:
        """The share of the promise that is kept: 1 if deciding and dropping rows cost nothing."""
        return self.promise.total / self.live.total

    @property
    def overhead(self) -> float:
        """What exits cost on top of the plain network when nobody leaves, as a fraction."""
        return self.full.total / self.plain.total - 1

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
    """Numbers of rows, up to the batch's."""
    seconds: tuple[tuple[float, ...], ...]
    """(stages, sizes), head and decision included."""
    bare: tuple[tuple[float, ...], ...]
    """(stages, sizes), with the head off."""
    plain: float
    """Of a whole batch."""
    others: dict[str, float] = field(default_factory=dict)
    """Of a whole batch by other networks, timed in between."""

    def of(self, enabled: Sequence[bool], shares: np.ndarray) -> np.ndarray:
        """Seconds (P,) that a batch takes of which the shares (P, exits) leave at each exit: every
        stage's time at the number of rows that reach it on average. enabled: which of the early
        heads are on."""
        gone = np.cumsum(shares, axis=1) - shares
        total = np.zeros(len(shares))
        times = zip((*enabled, True), self.seconds, self.bare, strict=True)
        for reach, (on, with_head, without) in zip((1 - gone).T, times, strict=True):
            seconds = with_head if on else without
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
    """Measures the stages, with their heads and without, on 1, 2, 4, ... rows of a batch of
    `images` (B, C, H, W), and the plain network and the `others` on all of it: interleaved, medians
    of `repeats`, or of as many as about `seconds` allow and at least three."""
    network.eval()
    batch_size = len(images)
    sizes = sorted({*(2**power for power in range(batch_size.bit_length())), batch_size})
    never = Policy(
        exit_names=network.exit_names,
        thresholds=(NEVER,) * (network.num_exits - 1),
        criterion=criterion,
    )
    off = _heads_off(network)
    timed = _timer(images.device)

    def seconds_of(policy: Policy, index: int, features: Tensor) -> float:
        rows = Rows(torch.arange(len(features), device=features.device), features)
        return timed(lambda: advance(network.stages[index], rows, policy, index))

    others = others or {}
    wholes, samples = [], []
    with autocast():
        given = stage_inputs(network, images, never)
        began = time.perf_counter()
        for turn in range(2 + repeats):  # the first two to warm up
            if turn >= 5 and time.perf_counter() - began > seconds:
                break
            wholes.append(
                [timed(lambda net=net: net(images)) for net in (network.backbone, *others.values())]
            )
            samples.append(
                [
                    [[seconds_of(policy, index, rows[:size]) for size in sizes]
                     for index, rows in given]
                    for policy in (never, off)
                ]
            )
    with_head, bare = (
        tuple(map(tuple, part.tolist())) for part in np.median(samples[2:], axis=0)
    )
    plain, *rest = np.median(wholes[2:], axis=0).tolist()
    return StageTimes(
        batch_size, tuple(sizes), with_head, bare, plain, dict(zip(others, rest, strict=True))
    )


def _heads_off(network: MultiExitNetwork) -> Policy:
    early = network.num_exits - 1
    return Policy(
        exit_names=network.exit_names, thresholds=(NEVER,) * early, enabled=(False,) * early
    )


def stage_inputs(
    network: MultiExitNetwork, images: Tensor, policy: Policy
) -> list[tuple[int, Tensor]]:
    """The features that each stage would be given under `policy`, with the stage's number."""
    rows: Rows | None = Rows(torch.arange(len(images), device=images.device), images)
    given = []
    for exit_index, stage in enumerate(network.stages):
        given.append((exit_index, rows.features))
        rows, _ = advance(stage, rows, policy, exit_index)
        if rows is None:
            break
    return given


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
    device = batches[0].device
    network.eval()
    never = policy.shared(NEVER)
    bare = _heads_off(network)
    names = ("plain", "live", "promise", "full", "trunk")
    medians: dict[str, list[float]] = {name: [] for name in names}
    stage_medians: list[list[float]] = []
    began = time.perf_counter()
    done = 0
    with autocast():
        for images in [batches[0], *batches]:  # the first is measured twice: once to warm up
            given = stage_inputs(network, images, policy)
            everyone = stage_inputs(network, images, never)
            samples: dict[str, list[float]] = {name: [] for name in medians}
            stages: list[list[float]] = []
            for _ in range(repeats):
                timed = _timer(device)
                samples["plain"].append(timed(lambda: network.backbone(images)))
                samples["live"].append(timed(lambda: infer(network, images, policy)))
                samples["full"].append(timed(lambda: infer(network, images, never)))
                parts = [_time_stage(timed, network, policy, *one) for one in given]
                samples["promise"].append(sum(parts))
                bodies = [_time_stage(timed, network, bare, *one) for one in given]
                samples["trunk"].append(sum(bodies))
                stages.append([_time_stage(timed, network, policy, *one) for one in everyone])
            done += 1
            if done == 1:
                continue
            for name, values in samples.items():
                medians[name].append(float(np.median(values)))
            stage_medians.append(np.median(stages, axis=0).tolist())
            if time.perf_counter() - began > seconds:
                break
    spreads = {
        name: Spread(
            float(np.percentile(values, 50)), float(np.percentile(values, 95)), float(sum(values))
        )
        for name, values in medians.items()
    }
    return Timing(
        batch_size=len(batches[0]),
        images=len(medians["plain"]) * len(batches[0]),
        repeats=repeats,
        stage_seconds=tuple(np.median(stage_medians, axis=0).tolist()),
        **spreads,
    )


def _time_stage(timed, network, policy, exit_index: int, features: Tensor) -> float:
    stage, on = network.stages[exit_index], policy.is_on(exit_index)
    return timed(lambda: stage(features, on))


def _timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    def timed(call: Callable[[], object]) -> float:
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - began

    return timed
