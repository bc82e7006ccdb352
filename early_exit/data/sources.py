"""Image sources: files, and noise for trials without data."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from early_exit.data.decoding import check_header, decode
from early_exit.system.text import in_a_line

NOISE_CLASSES = 1000
THREADS = 16  # they wait for storage, above all if it is on a network
CHUNK = 64  # files per task of a thread

Transform = Callable[[Image.Image], Image.Image]
"""What is done to an RGB image after it is decoded."""


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
        return self.path(self.names[row])

    def path(self, name: bytes) -> str:
        """The path of the file of this name."""
        return str(self.root / os.fsdecode(name))

    def short_name(self, row: int) -> str:
        """The path of the file below the data set's directory."""
        return f"{self.root.name}/{in_a_line(self.names[row])}"

    def image(self, row: int, transform: Transform) -> tuple[Tensor, str]:
        """The transformed image, (H, W, 3) uint8, and the warning about its file, or ""."""
        image, notice = decode(self.name(row))
        return torch.from_numpy(np.array(transform(image))), notice

    def read_header(self, row: int) -> None:
        """Reads the header of the file in this row. Raises Unreadable if it is damaged."""
        check_header(self.name(row))

    def stamps(self, rows: np.ndarray) -> np.ndarray:
        """The size of each file in these rows, and when it was last written, in whole seconds, as
        copies keep it; -1 for a file that is gone. (rows, 2)"""

        def stamp(row: int) -> tuple[int, int]:
            try:
                found = os.stat(self.name(row))
            except OSError:
                return -1, -1
            return found.st_size, int(found.st_mtime)

        with ThreadPool(THREADS) as pool:
            found = pool.map(stamp, rows.tolist(), CHUNK)
        return np.array(found, np.int64).reshape(-1, 2)

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

    def image(self, row: int, _transform: Transform) -> tuple[Tensor, str]:
        """The image, (H, W, 3) uint8, not transformed, and no warning."""
        generator = torch.Generator().manual_seed(row)
        shape = (self.side, self.side, 3)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), ""


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
