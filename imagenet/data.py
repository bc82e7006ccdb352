"""Images in class folders: decoded and augmented by worker processes, normalised on the device.

Which images a batch holds, and what chance does to each of them, is a function of seed, epoch and
step alone, so resuming in the middle of an epoch needs nothing but the position. A file that cannot
be read as an image is named; up to a stated number of them are skipped.
"""

import atexit
import dataclasses
import hashlib
import logging
import math
import os
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.transforms import v2

from early_exit.config import Config, DataConfig
from early_exit.errors import UserError
from early_exit.pixels import ImageData, as_rgb
from early_exit.splits import WHOLE, Share, halves, index_hash, seed_of, stratified

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent / "data" / "imagenet"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, for its weights
VAL_IMAGES = 50_000  # cut from train, or a tenth of it where that is less
DUMMY_IMAGES = 1_281_167  # as many as ImageNet has
DUMMY_CLASSES = 1000

Key = tuple[str, int, tuple[int, int] | None]
"""A file (of which source, which one) and, for training, the seed and the epoch."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig(DataConfig):
    """Where class folders lie, and how their images are read."""

    workers: int | None = None
    """Processes that decode on a machine; absent: one per processor, at most 8 for each process
    that trains; 0: none."""
    train_crop: int = 224
    """Side of the random crops that are trained on, in pixels."""
    val_resize: int = 256
    """Shorter side that held-out images are brought to before their central crop."""
    val_crop: int = 224
    """Side of that crop."""
    val_size: float | None = None
    """Images of train held out as val: a number, or a share below 1; absent: 50,000, or a tenth of
    train where that is less."""
    bad_files: int = 0
    """Files which cannot be read that a process skips before the run stops."""
    dummy: int = 0
    """Noise instead of files: how many images of it; 0: files."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
            raise UserError(f"data.dummy must be 100 images or more, got {self.dummy}")


@dataclass(frozen=True, kw_only=True)
class FolderRun(Config):
    """A whole run on class folders."""

    data: FolderConfig = field(default_factory=FolderConfig)


@dataclass(frozen=True)
class Files:
    """The images of a folder. Names are bytes in one array: a million strings would be copied to
    every worker as soon as they are counted."""

    root: Path
    names: np.ndarray
    targets: np.ndarray

    def name(self, row: int) -> str:
        """The path of one."""
        return str(self.root / os.fsdecode(self.names[row]))

    def image(self, row: int, transform: v2.Transform) -> Tensor:
        """One of them, (H, W, 3) uint8."""
        with Image.open(self.name(row)) as image:
            return torch.from_numpy(np.array(transform(as_rgb(image))))

    @cached_property
    def digest(self) -> str:
        """A hash of all the names."""
        return hashlib.sha256(b"\0".join(self.names)).hexdigest()[:16]


@dataclass(frozen=True)
class Noise:
    """Images that show nothing, for trying things out without data."""

    side: int
    targets: np.ndarray
    digest: str

    def name(self, row: int) -> str:
        """What one is called."""
        return f"{self.digest} {row}"

    def image(self, row: int, _transform: v2.Transform) -> Tensor:
        """One of them, (H, W, 3) uint8."""
        generator = torch.Generator().manual_seed(row)
        shape = (self.side, self.side, 3)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@dataclass(frozen=True)
class Bad:
    """A file that could not be read, and why."""

    name: str
    reason: str


def held_out(config: FolderConfig) -> v2.Transform:
    """What is done to an image that is not trained on."""
    return v2.Compose([
        v2.Resize(config.val_resize, antialias=True), v2.CenterCrop(config.val_crop)
    ])


class Images(Dataset):
    """What a worker does: a key becomes an image (H, W, 3) uint8 and its target, or a Bad."""

    def __init__(self, sources: dict[str, Files | Noise], config: FolderConfig) -> None:
        self.sources = sources
        # on PIL's images, whose resizing is antialiased
        self.train = v2.Compose([
            v2.RandomResizedCrop(config.train_crop, antialias=True),
            v2.RandomHorizontalFlip(),
        ])
        self.held_out = held_out(config)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | Bad:
        which, row, chance = key
        source = self.sources[which]
        try:
            if chance is None:
                image = source.image(row, self.held_out)
            else:
                # a worker has a random state of its own
                apart = nullcontext() if get_worker_info() else torch.random.fork_rng(devices=[])
                with apart:
                    torch.default_generator.manual_seed(seed_of(*chance, row, 1))
                    image = source.image(row, self.train)
        except Exception as error:  # what bytes of another kind make of a decoder has no bounds
            return Bad(source.name(row), " ".join(str(error).split()) or type(error).__name__)
        return image, int(source.targets[row])


Batch = tuple[Tensor | None, Tensor | None, list[int], list[Bad]]


def collate(items: list[tuple[Tensor, int] | Bad]) -> Batch:
    """Images (B, H, W, 3) and targets (B,) of what could be read, or None; which items those are;
    and what could not be read."""
    good = [number for number, item in enumerate(items) if not isinstance(item, Bad)]
    bad = [item for item in items if isinstance(item, Bad)]
    if not good:
        return None, None, good, bad
    images, targets = default_collate([items[number] for number in good])
    return images, targets, good, bad


class Wanted:
    """The batch sampler: the keys of the batches that are wanted next.

    Apart from the pool, because workers are ended when their loader is forgotten, and in a circle
    of references that would be too late for it to tell them.
    """

    keys: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)


class Pool:
    """The workers: the same processes for every split and epoch."""

    def __init__(self, images: Images, workers: int, pinned: bool) -> None:
        self._wanted, self._ends = Wanted(), False
        self._loader = DataLoader(
            images,
            batch_sampler=self._wanted,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pinned,
            worker_init_fn=_deaf,
            generator=torch.Generator(),  # its draws would move torch's own random state
        )

    def read(self, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """The batches of those keys, in their order."""
        self._wanted.keys = keys
        batches = iter(self._loader)
        if self._loader.num_workers and not self._ends:
            self._ends = True
            atexit.register(_end, weakref.ref(batches))
        return batches


def _end(batches: weakref.ref) -> None:
    """Ends workers that are still there when Python leaves, as after an error: later it would send
    them the signal that they do not hear, and wait."""
    if batches() is not None:
        batches()._shutdown_workers()


def _deaf(_worker: int) -> None:
    """A signal goes to a whole group of processes, and the one that saves needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass(frozen=True)
class Data(ImageData):
    """Class folders cut into train, val and test, giving normalised batches on a device."""

    name: str
    classes: tuple[str, ...]
    images: Images
    splits: dict[str, tuple[str, np.ndarray]]
    """Per split, the source (train, val or test) and the rows of it."""
    val_hash: str
    """Says which images are val; a checkpoint carries it."""
    workers: int
    bad_files: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    device: torch.device = torch.device("cpu")
    layout: torch.memory_format = torch.channels_last
    eval_batch: int = 128
    skipped: set[str] = field(default_factory=set)
    """Names of the files that could not be read."""

    @cached_property
    def pool(self) -> Pool:
        """The workers, started with the first batch."""
        return Pool(self.images, self.workers, self.device.type == "cuda")

    def to(self, device: torch.device, layout: torch.memory_format) -> "Data":
        """The same data, giving batches on `device` and of that layout."""
        return dataclasses.replace(self, device=device, layout=layout)

    def size(self, split: str) -> int:
        """How many images a split has."""
        return len(self.splits[split][1])

    def digest(self, split: str) -> str:
        """Says which files a split holds: a hash of their names."""
        source, rows = self.splits[split]
        return index_hash(self.images.sources[source].digest, rows)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `first_step` on: images (B, 3, H, W), targets (B,); of each
        step its parts that are in `share`. For an unreadable file another image of its batch is
        there twice."""
        source, rows = self.splits["train"]
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
        steps = range(first_step, self.steps_per_epoch(batch_size))
        # without a reference to the data itself: a loader keeps it, and the data keeps the loader
        batches = (rows[step * batch_size : (step + 1) * batch_size] for step in steps)
        keys = (
            [(source, int(row), (seed, epoch)) for row in batch[part]]
            for batch in batches for part in share.parts(len(batch))
        )
        for images, targets, good, bad in self._read(keys):
            if images is None:
                raise UserError(
                    f"no file of a whole batch of {len(bad)} can be read, such as {bad[0].name}"
                )
            if bad:
                fill = torch.arange(len(good) + len(bad)) % len(good)
                images, targets = images[fill], targets[fill]
            yield self._ready(images, targets)

    def eval_batches(
        self, split: str, batch_size: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's batches in order, not augmented; those that are in `share`. Unreadable
        files are missing in them."""
        source, rows = self.splits[split]
        keys = (
            [(source, int(row), None) for row in rows[part]]
            for part in share.batches(len(rows), batch_size)
        )
        for images, targets, _, _ in self._read(keys):
            if images is not None:
                yield self._ready(images, targets)

    def _read(self, keys: Iterable[list[Key]]) -> Iterator[Batch]:
        """The pool's batches; raises UserError where more than `bad_files` cannot be read."""
        for images, targets, good, bad in self.pool.read(keys):
            for file in bad:
                if file.name in self.skipped:
                    continue
                self.skipped.add(file.name)
                if len(self.skipped) > self.bad_files:
                    allowed = f"{self.bad_files} were allowed" if self.bad_files else "none may be"
                    raise UserError(
                        f"{file.name} cannot be read as an image ({file.reason}) and {allowed};"
                        f" put a readable one in its place, or skip such files: --bad-files"
                        f" {max(10, 2 * self.bad_files)}"
                    )
                log.warning("skipping %s: %s", file.name, file.reason)
            yield images, targets, good, bad

    def _ready(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (B, H, W, 3) to normalised images (B, 3, H, W) on the device."""
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return self.normalise(images), targets.to(self.device, non_blocking=True)

    def test_halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of two stratified halves of test: the first to be val, the second test."""
        source, rows = self.splits["test"]
        return halves(self.images.sources[source].targets[rows], seed)

    def cut_test(self, seed: int) -> "Data":
        """The same data whose val and test are the two halves of test, for backbones that have
        seen all of train."""
        chosen, rest = self.test_halves(seed)
        source, rows = self.splits["test"]
        splits = {**self.splits, "val": (source, rows[chosen]), "test": (source, rows[rest])}
        val_hash = index_hash(f"{self.images.sources[source].digest} test", chosen)
        return dataclasses.replace(self, splits=splits, val_hash=val_hash)

    def picture(self, split: str, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8."""
        source, rows = self.splits[split]
        image, _ = self.images[source, int(rows[index]), None]
        return image.numpy()


def load(config: FolderConfig) -> Data:
    """The class folders under `config.root`, or noise."""
    if config.dummy:
        classes = tuple(f"class {number}" for number in range(DUMMY_CLASSES))
        train, test = _noise(config)
    else:
        root = Path(config.root) if config.root else ROOT
        if not root.is_dir():
            raise UserError(
                f"there is no directory {root}; expected are images in {root}/train/CLASS and"
                f" {root}/val/CLASS; name another as the first argument, or try --dummy, which"
                " needs no data"
            )
        classes, train = _files(root / "train")
        test_classes, test = _files(root / "val")
        _refuse_other_classes(root, classes, test_classes)
    held_out_of_train = train  # noise has the size it is wanted in
    if config.dummy:
        held_out_of_train = dataclasses.replace(train, side=config.val_crop)
    count = len(train.targets)
    wanted = config.val_size
    if wanted is None:
        wanted = min(VAL_IMAGES, count // 10)
    size = round(wanted * count) if wanted < 1 else int(wanted)
    if not 0 < size < count:
        raise UserError(f"data.val_size asks for {size} of {count} images; leave some for training")
    val = stratified(train.targets, size, config.split_seed)
    rest = np.setdiff1d(np.arange(count), val)
    everything = np.arange(len(test.targets))
    return Data(
        name=config.dataset,
        classes=classes,
        images=Images({"train": train, "val": held_out_of_train, "test": test}, config),
        splits={"train": ("train", rest), "val": ("val", val), "test": ("test", everything)},
        val_hash=index_hash(train.digest, val),
        workers=_workers(config),
        bad_files=config.bad_files,
    )


def processors() -> int:
    """The processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _workers(config: FolderConfig) -> int:
    """This process's part of those on its machine."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if config.workers is None:
        return max(1, min(8, processors() // sharing))
    return math.ceil(config.workers / sharing)


def _noise(config: FolderConfig) -> tuple[Noise, Noise]:
    """Train and test; test is a twenty-fifth, as ImageNet's is."""
    rng = np.random.default_rng(0)
    return tuple(
        Noise(side, rng.integers(0, DUMMY_CLASSES, count), f"noise {name} of {count}")
        for name, side, count in (
            ("train", config.train_crop, config.dummy),
            ("test", config.val_crop, max(1, config.dummy // 25)),
        )
    )


def _files(folder: Path) -> tuple[tuple[str, ...], Files]:
    """The class names of a folder, and its images in their order."""
    if not folder.is_dir():
        raise UserError(
            f"there is no {folder}; expected are {folder}/CLASS/*.JPEG, a folder a class"
        )
    try:
        classes, index = find_classes(folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no class folders; expected are {folder}/CLASS/*.JPEG"
        ) from None
    samples = DatasetFolder.make_dataset(
        str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True
    )
    targets = np.array([target for _, target in samples], np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(
            f"{folder / classes[empty[0]]} holds no image"
            + (f", nor do {len(empty) - 1} other class folders" if len(empty) > 1 else "")
            + "; fill it, or remove it from train and val alike"
        )
    start = len(str(folder)) + 1
    names = np.array([os.fsencode(path[start:]) for path, _ in samples])
    return tuple(classes), Files(folder, names, targets)


def _refuse_other_classes(root: Path, train: Sequence[str], val: Sequence[str]) -> None:
    for (here, names), (there, others) in permutations((("train", train), ("val", val))):
        missing = sorted(set(names) - set(others))
        if missing:
            raise UserError(
                f"{root}/{here} has {len(names)} classes, among them {missing[0]}, which"
                f" {root}/{there} has not; both must have the same"
            )
