"""Inference with exits taken on test, compared with the record and timed."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from early_exit.choosing.outcome import Live, Outcome, disagreements
from early_exit.choosing.record import ExitRecord
from early_exit.data.base import Data, FileData
from early_exit.errors import UserError
from early_exit.evaluation.decoration import optional
from early_exit.evaluation.report import LiveResult
from early_exit.inference import latency
from early_exit.inference.latency import Timing
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import to_numpy
from early_exit.inference.segment_times import SegmentTimes, segment_times
from early_exit.inference.segments import spans
from early_exit.metrics import MANY_CLASSES, in_top5
from early_exit.trained import Trained, first_batch, one_by_one

log = logging.getLogger(__name__)

LIVE_BATCH = 256
GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread the most evenly


@dataclass(frozen=True)
class TimedBatch:
    """What was timed at one batch size."""

    timing: Timing
    segments: SegmentTimes | None
    """None if val has no batch of readable images."""


@dataclass(frozen=True)
class Measurements:
    """What was measured on test with exits taken."""

    live: LiveResult | None = None
    timed: tuple[TimedBatch, ...] = field(default_factory=tuple)


def measure(
    trained: Trained,
    data: Data,
    outcome: Outcome,
    test: ExitRecord,
    batch_sizes: Sequence[int],
    max_images: int,
    static_networks: Mapping[str, nn.Module],
) -> Measurements:
    """Runs test with exits taken and times it at each batch size that test fills.

    max_images: of test, that are timed; static_networks: timed in turns with the plain one, but for
    those that the runtime cannot build.
    """
    built = build_networks(trained, static_networks)
    live = run_live(trained, data, test, outcome.policy)
    rows = evenly(outcome.exit_index)
    timed = [
        time_batch(trained, data, outcome.policy, rows, batch_size, max_images, built)
        for batch_size in sorted(set(batch_sizes))
    ]
    return Measurements(live, tuple(found for found in timed if found))


def build_networks(trained: Trained, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks that the runtime can build, moved to the device and built there; the others are
    left out with one line."""
    built = {}
    for name, network in networks.items():
        network.to(trained.device).to(memory_format=trained.config.run.memory_format)
        with optional(f"the static network {name}"):
            trained.runtime.plain(network)
            built[name] = network
    return built


def run_live(
    trained: Trained, data: Data, test: ExitRecord, policy: Policy, batch_size: int = LIVE_BATCH
) -> LiveResult:
    """Inference with exits taken on all of test, compared with the record."""
    parts: list[tuple[np.ndarray, ...]] = []
    top5 = 0
    for images, target in data.eval_batches("test", batch_size):
        batch = trained.runtime.infer(images, policy)
        logits = to_numpy(batch.logits)
        parts.append(
            (
                logits.argmax(axis=-1),
                to_numpy(batch.exit_index),
                to_numpy(batch.score),
                logits.max(axis=-1),
            )
        )
        if test.num_classes > MANY_CLASSES:
            top5 += int(in_top5(torch.from_numpy(logits), target.cpu()).sum())
    if isinstance(data, FileData) and (lost := data.unreadable("test")):  # since it was recorded
        kept = np.setdiff1d(np.arange(len(test)), list(lost))
        test = test.subset(kept, "test", test.info.split_hash)
    live = Live(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    found = disagreements(test, policy, live)
    return LiveResult(
        images=len(live.answers),
        accuracy=float((live.answers == test.targets).mean()),
        top5=top5 / len(live.answers) if test.num_classes > MANY_CLASSES else None,
        differing=int(found.differs.sum()),
        differing_beyond_rounding=int(found.unexplained.sum()),
        rounding=found.rounding,
        batch_size=batch_size,
    )


def evenly(exit_index: np.ndarray) -> np.ndarray:
    """An order of the images in which any first part of them takes the exits about as all do, and
    is drawn at random otherwise. exit_index: (images,) the exit that each takes.

    Only some images are timed, and class folders begin with those of one class. The order is a
    Kronecker sequence over the images sorted by their exits: of n images, the number at an exit is
    off by a few at most.
    """
    count = len(exit_index)
    by_exit = np.lexsort((np.random.default_rng(0).permutation(count), exit_index))
    steps = np.arange(count) * GOLDEN % 1
    return by_exit[np.argsort(np.argsort(steps))]


def time_batch(
    trained: Trained,
    data: Data,
    policy: Policy,
    rows: np.ndarray,
    batch_size: int,
    max_images: int,
    static_networks: Mapping[str, nn.Module],
) -> TimedBatch | None:
    """Times whole batches of at most `max_images` images of test; None if no batch is whole.

    rows: all images of test, in the order in which they are timed.
    """
    total = min(max_images, data.size("test"))
    if total < batch_size:
        log.info(
            "test has %d images to time, fewer than a batch of %d; this size is not timed",
            total,
            batch_size,
        )
        return None
    log.info("timing %s at batch %d", trained.runtime.runtime.name, batch_size)
    batches = whole_batches(one_by_one(data, "test", rows), batch_size)
    batches = itertools.islice(batches, total // batch_size)
    timing = latency.measure(trained.runtime, batches, policy, others=static_networks)
    if timing is None:  # files are unreadable since they were recorded
        log.warning("test has no %d readable images; this size is not timed", batch_size)
        return None
    segments = None
    if batch_size <= data.size("val"):
        try:
            images = first_of_val(data, batch_size)
        except UserError as error:  # a file is unreadable since it was recorded
            log.warning("the segments are not timed at batch %d: %s", batch_size, error)
        else:
            to_time = spans(policy.enabled)
            segments = segment_times(trained.runtime, images, policy.criterion, to_time)
    else:
        log.info(
            "the segments are not timed at batch %d, for which val has too few images (%d), so the"
            " report has no curve of seconds for it",
            batch_size,
            data.size("val"),
        )
    return TimedBatch(timing, segments)


def whole_batches(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Single images (1, C, H, W) in batches of `size`; the last ones that fill none are left
    out."""
    remaining = iter(images)
    while len(batch := list(itertools.islice(remaining, size))) == size:
        yield torch.cat(batch)


def time_for_choice(
    trained: Trained,
    data: Data,
    criterion: str,
    batch_size: int,
    spans_to_time: Sequence[tuple[int, int]],
) -> SegmentTimes:
    """The times of segments on the first images of val. spans_to_time: as `segment_times` takes
    them."""
    images = first_of_val(data, batch_size)
    log.info(
        "timing %d segments in %s at batch %d",
        len(spans_to_time),
        trained.runtime.runtime.name,
        batch_size,
    )
    return segment_times(trained.runtime, images, criterion, spans_to_time)


def first_of_val(data: Data, batch_size: int) -> Tensor:
    """The first batch of val. Raises UserError if fewer images can be read."""
    images = first_batch(data, "val", batch_size)
    if images is None or len(images) < batch_size:
        raise UserError(
            f"the first batch of val has {0 if images is None else len(images)} images that can be"
            f" read, and {batch_size} are to be timed (--latency-batch)"
        )
    return images
