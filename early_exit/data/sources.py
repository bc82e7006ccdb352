"""Image sources: the files of class folders, and noise for trials without data."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.transforms import v2

from early_exit.data.file_lists import printable
from early_exit.data.pixels import as_rgb
from early_exit.errors import UserError

NOISE_CLASSES = 1000


@dataclass(frozen=True)
class Files:
    """Image files under a directory."""

    root: Path
    names: np.ndarray
    """Paths relative to `root`, as bytes in one array: counting references to a million strings
    would copy their memory into every worker."""
    targets: np.ndarray

    def name(self, row: int) -> str:
        """The path of the file in this row."""
        return str(self.root / os.fsdecode(self.names[row]))

    def short_name(self, row: int) -> str:
        """The path of the file below the data set's directory."""
        return f"{self.root.name}/{printable(self.names[row])}"

    def image(self, row: int, transform: v2.Transform) -> Tensor:
        """The transformed image, (H, W, 3) uint8."""
        with Image.open(self.name(row)) as image:
            return torch.from_numpy(np.array(transform(as_rgb(image))))

    def read_header(self, row: int) -> None:
        """Reads the header of the file in this row, which raises anything if it is damaged."""
        with Image.open(self.name(row)):
            pass

    @cached_property
    def digest(self) -> str:
        """A hash of all names."""
        return hashlib.sha256(b"\0".join(self.names)).hexdigest()[:16]


@dataclass(frozen=True)
class Noise:
    """Images of uniform noise, for trials without data."""

    side: int
    targets: np.ndarray
    digest: str

    def name(self, row: int) -> str:
        """The name of the image in this row."""
        return f"{self.digest} {row}"

    short_name = name

    def image(self, row: int, _transform: v2.Transform) -> Tensor:
        """The image, (H, W, 3) uint8. It is not transformed."""
        generator = torch.Generator().manual_seed(row)
        shape = (self.side, self.side, 3)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


Source = Files | Noise
Sources = tuple[tuple[str, ...], dict[str, Source]]
"""The class names, and the source of each split."""


def noise(count: int, train_side: int, eval_side: int) -> Sources:
    """`count` train images of noise, and a 25th as many test images.

    train_side, eval_side: sides of the images, in pixels.
    """
    rng = np.random.default_rng(0)
    test_count = max(1, count // 25)
    targets = rng.integers(0, NOISE_CLASSES, count)
    test_targets = rng.integers(0, NOISE_CLASSES, test_count)
    train_name, test_name = f"noise train of {count}", f"noise test of {test_count}"
    sources: dict[str, Source] = {
        "train": Noise(train_side, targets, train_name),
        "val": Noise(eval_side, targets, train_name),
        "test": Noise(eval_side, test_targets, test_name),
    }
    return tuple(f"class {number}" for number in range(NOISE_CLASSES)), sources


def class_folders(root: Path) -> Sources:
    """The images of root/train, of which val is a part, and of root/val, which are test.

    Raises UserError for a missing directory, a class folder without images, and classes that differ
    between train and val.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no directory {root}; expected images in {root}/train/CLASS and"
            f" {root}/val/CLASS; pass another directory, or try --dummy, which needs no data"
        )
    classes, train = _list_files(root / "train")
    test_classes, test = _list_files(root / "val")
    _check_same_classes(root, classes, test_classes)
    return classes, {"train": train, "val": train, "test": test}


def _list_files(folder: Path) -> tuple[tuple[str, ...], Files]:
    """The class names of a folder, sorted, and its images in order."""
    if not folder.is_dir():
        raise UserError(f"there is no {folder}; expected {folder}/CLASS/*.JPEG, a folder per class")
    try:
        classes, index = find_classes(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} has no class folders; expected {folder}/CLASS/*.JPEG") from None
    samples = DatasetFolder.make_dataset(
        str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True
    )
    targets = np.array([target for _, target in samples], np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(empty):
        others = f" and {len(empty) - 1} other class folders" if len(empty) > 1 else ""
        raise UserError(
            f"no image in {folder / classes[empty[0]]}{others}; add images, or remove the class"
            " from train and val"
        )
    start = len(str(folder)) + 1
    names = np.array([os.fsencode(path[start:]) for path, _ in samples])
    return tuple(classes), Files(folder, names, targets)


def _check_same_classes(root: Path, train: Sequence[str], val: Sequence[str]) -> None:
    """Raises UserError if train and val differ in their classes."""
    for (name, classes), (other, other_classes) in permutations((("train", train), ("val", val))):
        missing = sorted(set(classes) - set(other_classes))
        if missing:
            raise UserError(
                f"{root}/{name} has the class {missing[0]}, which {root}/{other} lacks; both must"
                " have the same classes"
            )
