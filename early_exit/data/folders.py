"""Images in class folders, DIR/train/CLASS and DIR/val/CLASS, normalised on the device.

The images of a batch and their augmentation are a function of seed, epoch and step, so training can
resume in the middle of an epoch. A file that cannot be decoded is named; up to a given number of
such files is skipped.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from early_exit.config import Config, DataConfig
from early_exit.data.base import NormalisedImages
from early_exit.data.class_folders import class_folders
from early_exit.data.decoding import report
from early_exit.data.pixels import centre_crop
from early_exit.data.sources import Files, Transform, noise
from early_exit.data.splits import WHOLE, Shard, halves, index_hash, seed_of, stratified
from early_exit.data.unreadable import leave_out, unreadable_headers
from early_exit.data.workers import (
    Batch,
    ImageDataset,
    ImageKey,
    UnreadableFile,
    WorkerPool,
)
from early_exit.errors import UserError
from early_exit.system.processors import processors
from early_exit.system.text import in_a_line

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as for torchvision's weights
VAL_IMAGES = 50_000  # held out from train, or a tenth of it if that is less
DUMMY_IMAGES = 1_281_167  # as many as ImageNet has


@dataclass(frozen=True, kw_only=True)
class FolderConfig(DataConfig):
    """Where class folders are, and how their images are read."""

    workers: int | None = None
    """Decoding processes per machine; default: one per processor, at most 8 per training process;
    0: none."""
    train_crop: int = 224
    """Side of the random crops for training, in pixels."""
    val_resize: int = 256
    """Shorter side of val and test images before the centre crop, in pixels."""
    val_crop: int = 224
    """Side of the centre crop of val and test images, in pixels."""
    val_size: float | None = None
    """Images of train held out as val: a number, or a fraction below 1; default: 50,000, or a tenth
    of train if that is less."""
    bad_files: int = 0
    """Unreadable files that a process skips before the run stops."""
    check_files: bool = True
    """Whether the headers of all val and test images are read before training."""
    dummy: int = 0
    """Train on this many images of noise instead of files; 0: on files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip", "pad", "pad_mode"):
            if getattr(self, name) != getattr(DataConfig, name):
                raise UserError(
                    f"data.{name} has no effect on class folders, whose images are cropped and"
                    " flipped at random; remove it"
                )
        for name in ("train_crop", "val_resize", "val_crop"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.val_crop > self.val_resize:
            raise UserError(
                f"data.val_crop {self.val_crop} does not fit into data.val_resize {self.val_resize}"
            )
        for name in ("workers", "bad_files", "dummy"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"data.{name} must not be negative, got {getattr(self, name)}")
        if self.val_size is not None and not 0 < self.val_size < math.inf:
            raise UserError(f"data.val_size must be positive, got {self.val_size:g}")
        if self.dummy and self.dummy < 100:
            raise UserError(f"data.dummy must be at least 100 images, got {self.dummy}")


@dataclass(frozen=True, kw_only=True)
class FolderRun(Config):
    """A whole run on class folders."""

    data: FolderConfig = field(default_factory=FolderConfig)


def train_transform(config: FolderConfig) -> Transform:
    """The augmentation: a random resized crop and a random horizontal flip, of a PIL image."""
    return v2.Compose(
        [v2.RandomResizedCrop(config.train_crop, antialias=True), v2.RandomHorizontalFlip()]
    )


def eval_transform(config: FolderConfig) -> Transform:
    """The preparation of val and test images: resize and centre crop, of a PIL image."""
    return partial(centre_crop, resize=config.val_resize, crop=config.val_crop)


def prepare(config: FolderRun, image: Image.Image) -> Image.Image:
    """`Task.prepare` of a task whose data are class folders: an image as in its evaluation."""
    return eval_transform(config.data)(image)


@dataclass(frozen=True)
class Data(NormalisedImages):
    """Class folders cut into train, val and test, giving normalised batches on a device.

    Every method that decodes a file raises UserError if more than `bad_files` are unreadable.
    """

    name: str
    classes: tuple[str, ...]
    images: ImageDataset
    splits: dict[str, tuple[str, np.ndarray]]
    """The source of each split (train, val or test), and its rows there."""
    val_hash: str
    """Identifies the val images; stored in checkpoints."""
    workers: int
    bad_files: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layout: torch.memory_format = torch.channels_last
    eval_batch: int = 128
    skipped: set[str] = field(default_factory=set)
    """Names of the unreadable files found so far, and of the val images that are gone."""
    preparation: str = ""
    """How val and test images are made of the files."""

    @cached_property
    def pool(self) -> WorkerPool:
        """The worker processes."""
        return WorkerPool(self.images, self.workers, self.device.type == "cuda")

    def to(self, device: torch.device, layout: torch.memory_format) -> "Data":
        """The same data, giving batches on `device` in that memory layout."""
        return dataclasses.replace(self, device=device, layout=layout)

    def size(self, split: str) -> int:
        """The number of images in a split."""
        _, rows = self.splits[split]
        return len(rows)

    def digest(self, split: str) -> str:
        """Identifies the content of a split: a hash of the names of its files."""
        source, rows = self.splits[split]
        return index_hash(self.images.sources[source].digest, rows)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `first_step` on: images (B, 3, H, W), normalised, and targets
        (B,); of each step the micro-batches of `shard`.

        Unreadable files are replaced by other images of their batch. Raises UserError if all files
        of a batch are unreadable.
        """
        source, rows = self.splits["train"]
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
        steps = range(first_step, self.steps_per_epoch(batch_size))
        # without a reference to self: the pool refers to these keys, and self to the pool
        batches = (rows[step * batch_size : (step + 1) * batch_size] for step in steps)
        keys = (
            [ImageKey(source, int(row), (seed, epoch)) for row in batch[part]]
            for batch in batches
            for part in shard.slices(len(batch))
        )
        for images, targets, unreadable, _ in self._read(keys):
            if images is None or targets is None:
                raise UserError(
                    f"none of the {len(unreadable)} files of a batch can be read, such as"
                    f" {unreadable[0]}; replace or remove them"
                )
            if unreadable:
                repeated = torch.arange(len(images) + len(unreadable)) % len(images)
                images, targets = images[repeated], targets[repeated]
            yield self._to_device(images, targets)

    def eval_batches(
        self, split: str, batch_size: int, shard: Shard = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's batches in order, not augmented; those of `shard`. Unreadable files are
        left out."""
        source, rows = self.splits[split]
        keys = (
            [ImageKey(source, int(row), None) for row in rows[part]]
            for part in shard.eval_slices(len(rows), batch_size)
        )
        for images, targets, _, _ in self._read(keys):
            if images is not None and targets is not None:
                yield self._to_device(images, targets)

    def _read(self, keys: Iterable[list[ImageKey]]) -> Iterator[Batch]:
        """The batches of these keys. Raises UserError for one unreadable file too many."""
        for batch in self.pool.read(keys):
            for name, notice in batch.notices:
                report(name, notice)
            leave_out(batch.unreadable, self.skipped, self.bad_files)
            yield batch

    def check_headers(self) -> None:
        """Reads the headers of val and test. Raises UserError if too many are unreadable."""
        found, count = [], 0
        for split in ("val", "test"):
            source, rows = self.splits[split]
            files = self.images.sources[source]
            if isinstance(files, Files):
                found += unreadable_headers(files, rows)
                count += len(rows)
        leave_out(found, self.skipped, self.bad_files)
        if count:
            log.info(
                "read the headers of %d val and test images: %d are unreadable; damage behind a"
                " header is found when the image is decoded",
                count,
                len(found),
            )

    def file_names(self, split: str) -> np.ndarray | None:
        """The path of each file of a split below DIR/train or DIR/val, as bytes; None for noise."""
        source, rows = self.splits[split]
        files = self.images.sources[source]
        return files.names[rows] if isinstance(files, Files) else None

    def file_stamps(self, split: str) -> np.ndarray | None:
        """Size and time of every file of a split, (files, 2); None for noise."""
        source, rows = self.splits[split]
        files = self.images.sources[source]
        return files.stamps(rows) if isinstance(files, Files) else None

    def unreadable(self, split: str) -> dict[int, str]:
        """The images of a split that were found unreadable so far: the path of each file below DIR
        by its index."""
        if not self.skipped:
            return {}
        source, rows = self.splits[split]
        files = self.images.sources[source]
        return {
            index: files.short_name(row)
            for index, row in enumerate(rows.tolist())
            if files.name(row) in self.skipped
        }

    def without(self, split: str, indices: Sequence[int]) -> "Data":
        """The same data without these images of a split."""
        if not len(indices):
            return self
        source, rows = self.splits[split]
        splits = {**self.splits, split: (source, np.delete(rows, indices))}
        return dataclasses.replace(self, splits=splits)

    def holding_out(self, names: np.ndarray, val_hash: str) -> "Data":
        """The same data whose val is the files of these names that are still there, and whose train
        is the other files of train and val. val_hash: identifies this val."""
        files = self.images.sources["train"]
        assert isinstance(files, Files), "noise has no names"
        held_out = np.isin(files.names, names)
        gone = {files.path(name) for name in np.setdiff1d(names, files.names)}
        rest, val = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        splits = {**self.splits, "train": ("train", rest), "val": ("val", val)}
        skipped = self.skipped | gone  # they count as --bad-files together
        return dataclasses.replace(self, splits=splits, val_hash=val_hash, skipped=skipped)

    def _to_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8 to normalised images (B, 3, H, W) on the device."""
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return self.normalise(images), targets.to(self.device, non_blocking=True)

    def test_halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of two stratified halves of test: the first for val, the second for test."""
        source, rows = self.splits["test"]
        return halves(self.images.sources[source].targets[rows], seed)

    def cut_test(self, seed: int) -> "Data":
        """The same data whose val and test are the two halves of test.

        For backbones trained on all of train, from which no image of train is held out.
        """
        for_val, for_test = self.test_halves(seed)
        source, rows = self.splits["test"]
        splits = {**self.splits, "val": (source, rows[for_val]), "test": (source, rows[for_test])}
        val_hash = index_hash(f"{self.images.sources[source].digest} test", for_val)
        return dataclasses.replace(self, splits=splits, val_hash=val_hash)

    def picture(self, split: str, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8."""
        source, rows = self.splits[split]
        found = self.images[ImageKey(source, int(rows[index]), None)]
        if isinstance(found, UnreadableFile):
            raise UserError(f"{found} cannot be read as an image")
        report(found.name, found.notice)
        return found.image.numpy()


def load(config: FolderConfig, default_root: Path = Path("data")) -> Data:
    """The class folders under `config.root`, or noise if `config.dummy` is set.

    default_root: the directory if `config.root` is not set. Raises UserError for directories that
    `class_folders` rejects, and for a val that is empty or leaves no image of a class for train.
    """
    if config.dummy:
        _check_no_file_settings(config)
        classes, sources = noise(config.dummy, config.train_crop, config.val_crop)
    else:
        classes, sources = class_folders(Path(config.root or default_root))
    train, test = sources["train"], sources["test"]
    count = len(train.targets)
    val = stratified(train.targets, _val_size(config.val_size, count), config.split_seed)
    rest = np.setdiff1d(np.arange(count), val)
    if not config.dummy:
        _check_every_class(classes, train.targets, rest, val)
    everything = np.arange(len(test.targets))
    return Data(
        name=config.dataset,
        classes=classes,
        images=ImageDataset(sources, train_transform(config), eval_transform(config)),
        splits={"train": ("train", rest), "val": ("val", val), "test": ("test", everything)},
        val_hash=index_hash(train.digest, val),
        workers=_workers_per_process(config.workers),
        bad_files=config.bad_files,
        preparation=f"resize {config.val_resize}, crop {config.val_crop}",
    )


def _check_no_file_settings(config: FolderConfig) -> None:
    """Raises UserError for settings that have no effect on noise."""
    for flag, setting, given in (
        ("--bad-files", "data.bad_files", config.bad_files > 0),
        ("--no-file-check", "data.check_files", not config.check_files),
    ):
        if given:
            raise UserError(
                f"{flag} ({setting}) has no effect on --dummy, which reads no files; remove it"
            )


def _val_size(wanted: float | None, count: int) -> int:
    """How many of `count` images are held out as val."""
    if wanted is None:
        wanted = min(VAL_IMAGES, count // 10)
    size = round(wanted * count) if wanted < 1 else int(wanted)
    if not 0 < size < count:
        raise UserError(
            f"data.val_size asks for {size} of {count} images; hold out at least one and leave some"
            " for training"
        )
    return size


def _check_every_class(
    classes: Sequence[str], targets: np.ndarray, train: np.ndarray, val: np.ndarray
) -> None:
    """Raises UserError if a class has no image in train, and logs how many have none in val.

    targets: of all images; train, val: their rows in it.
    """
    without = {}
    for name, rows in (("train", train), ("val", val)):
        counts = np.bincount(targets[rows], minlength=len(classes))
        without[name] = [
            in_a_line(classes[label]) for label in np.flatnonzero(counts == 0).tolist()
        ]
    if without["train"]:
        raise UserError(
            f"no image is left for training of {len(without['train'])} of {len(classes)} classes,"
            f" such as {without['train'][0]}, once val is cut out; add images of it, lower"
            " --val-size, or remove the class from train and val"
        )
    if without["val"]:
        log.info(
            "val has no image of %d of %d classes, such as %s; a larger --val-size may have",
            len(without["val"]),
            len(classes),
            without["val"][0],
        )


def _workers_per_process(per_machine: int | None) -> int:
    """The worker processes of this process; those on one machine share `per_machine`."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if per_machine is None:
        return max(1, min(8, processors() // sharing))
    return math.ceil(per_machine / sharing)
