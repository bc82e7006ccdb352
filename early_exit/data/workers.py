"""Worker processes that decode and augment images.

A batch is requested by the keys of its images. The key alone determines the pixels, so it does not
matter which worker decodes an image, and an epoch can be resumed at any step.
"""

import atexit
import multiprocessing.process
import signal
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from early_exit.data.decoding import Unreadable
from early_exit.data.sources import Source, Transform
from early_exit.data.splits import seed_of
from early_exit.system.signals import STOPPING, held_back
from early_exit.system.text import in_a_line


class ImageKey(NamedTuple):
    """Which image to decode, and how to augment it."""

    source: str
    row: int
    seed_and_epoch: tuple[int, int] | None
    """Seed the augmentation; None: the image is not augmented."""


@dataclass(frozen=True)
class UnreadableFile:
    """A file that cannot be decoded, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{in_a_line(self.name)} ({self.reason})"


class Sample(NamedTuple):
    """A decoded image."""

    image: Tensor
    """(H, W, 3) uint8."""
    target: int
    name: str
    notice: str
    """The warning about its file, or "". It is sent to the main process, which logs it once."""


class ImageDataset(Dataset):
    """Decodes and transforms the image of a key.

    sources: the images by the name of their source. The transforms map PIL images to PIL images.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        train_transform: Transform,
        eval_transform: Transform,
    ) -> None:
        self.sources = sources
        self.train_transform = train_transform
        self.eval_transform = eval_transform

    def __getitem__(self, key: ImageKey) -> Sample | UnreadableFile:
        """The image; or the file, if it cannot be decoded."""
        source = self.sources[key.source]
        try:
            if key.seed_and_epoch is None:
                image, notice = source.image(key.row, self.eval_transform)
            else:
                image, notice = self._augmented(key, key.seed_and_epoch)
        except Unreadable as error:
            return UnreadableFile(error.name, error.reason)
        return Sample(image, int(source.targets[key.row]), source.name(key.row), notice)

    def _augmented(self, key: ImageKey, seed_and_epoch: tuple[int, int]) -> tuple[Tensor, str]:
        """The image as the key's seed, epoch and row augment it, and the warning about its file."""
        in_worker = get_worker_info() is not None
        # the transforms draw from torch's global generator, whose state only workers may change
        with nullcontext() if in_worker else torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(*seed_and_epoch, key.row, 1))
            return self.sources[key.source].image(key.row, self.train_transform)


class Batch(NamedTuple):
    """The decoded images of a batch, and the files that could not be decoded."""

    images: Tensor | None
    """(B, H, W, 3) uint8; None if no file of the batch could be decoded."""
    targets: Tensor | None
    """(B,)"""
    unreadable: list[UnreadableFile]
    notices: list[tuple[str, str]]
    """The name of each file with a warning, and the warning."""


def collate(items: list[Sample | UnreadableFile]) -> Batch:
    """The batch made of what `ImageDataset` returned."""
    unreadable = [item for item in items if isinstance(item, UnreadableFile)]
    decoded = [item for item in items if not isinstance(item, UnreadableFile)]
    if not decoded:
        return Batch(None, None, unreadable, [])
    images, targets = default_collate([(sample.image, sample.target) for sample in decoded])
    notices = [(sample.name, sample.notice) for sample in decoded if sample.notice]
    return Batch(images, targets, unreadable, notices)


class RequestedBatches:
    """A batch sampler that gives the keys set last.

    It is not the pool itself: the loader refers to its sampler, and workers shut down cleanly only
    if the pool is freed by its reference count, without a cycle.
    """

    keys: Iterable[list[ImageKey]] = ()

    def __iter__(self) -> Iterator[list[ImageKey]]:
        return iter(self.keys)


class WorkerPool:
    """Worker processes that start with the first batch and then serve every split and epoch.

    workers: their number; 0: images are decoded in this process. pin_memory: whether batches are
    put into page-locked memory, for a GPU.
    """

    def __init__(self, dataset: ImageDataset, workers: int, pin_memory: bool) -> None:
        self._sampler = RequestedBatches()
        self._shuts_down_at_exit = False
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # the global generator's state must not change
        )

    def read(self, keys: Iterable[list[ImageKey]]) -> Iterator[Batch]:
        """The batches of these keys, in order. Ends an iteration that is not finished."""
        self._sampler.keys = keys
        with held_back():  # from the workers that start here, until they ignore them
            batches = iter(self._loader)
        if self._loader.num_workers and not self._shuts_down_at_exit:
            self._shuts_down_at_exit = True
            atexit.register(_shut_down, weakref.ref(batches))
        return batches


def _shut_down(batches: weakref.ref) -> None:
    """Kills the workers that still run at exit, as after an error: Python would end them by a
    signal, which they ignore, and wait for ever, also for one that hangs on its storage."""
    running = batches()
    if running is None:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would report them as lost
    for worker in running._workers:
        worker.kill()
    for worker in running._workers:
        worker.join(timeout=1)
        if worker.is_alive():  # the system cannot end it now
            multiprocessing.process._children.discard(worker)  # type: ignore[attr-defined]


def ignore_signals(_worker: int) -> None:
    """Makes a worker ignore the signals that stop a program. They are often sent to the whole
    process group, and the main process needs its workers until it has saved its state."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
