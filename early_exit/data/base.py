"""What training and evaluation need of a data set."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from early_exit.data.pixels import normalise
from early_exit.data.splits import WHOLE, Shard


class Data(Protocol):
    """A data set cut into train, val and test.

    `early_exit.data.in_memory.Data` holds images in memory, `early_exit.data.folders.Data` reads
    class folders.
    """

    name: str
    classes: tuple[str, ...]
    """The name of each class index."""
    val_hash: str
    """Identifies the val images; stored in checkpoints."""
    mean: tuple[float, ...]
    """Of each channel, pixels in [0, 1]; stored in checkpoints."""
    std: tuple[float, ...]
    eval_batch: int
    """Held-out images per forward pass."""

    def to(self, device: torch.device, layout: torch.memory_format) -> "Data":
        """The same data, giving batches on `device` in that memory layout."""

    def normalised_by(self, normalisation: dict | None) -> "Data":
        """The same data with a checkpoint's {"mean": [...], "std": [...]}; None: unchanged."""

    def size(self, split: str) -> int:
        """The number of images in train, val or test."""

    def digest(self, split: str) -> str:
        """Identifies the content of a split; a stored record with another digest is not reused."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in train, at least 1."""

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `first_step` on, a pure function of seed, epoch and step:
        images (B, C, H, W), normalised, and targets (B,); of each step the micro-batches of
        `shard`."""

    def eval_batches(
        self, split: str, batch_size: int, shard: Shard = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's batches in order, not augmented; those of `shard`, reading no others: single
        images are asked for in this way."""

    def test_halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of two stratified halves of test: the first for val, the second for test."""

    def cut_test(self, seed: int) -> "Data":
        """The same data whose val and test are the two halves of test."""

    def picture(self, split: str, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8."""


@runtime_checkable
class FileData(Data, Protocol):
    """A data set of files, which can be unreadable, and can change after a training."""

    bad_files: int
    """How many unreadable files are left out before an error."""

    def file_names(self, split: str) -> np.ndarray | None:
        """The name of every file of a split, as bytes; None if its images are not files."""

    def file_stamps(self, split: str) -> np.ndarray | None:
        """(files, 2): the size of every file of a split, and when it was last written, in seconds,
        both -1 for one that is gone; None if its images are not files."""

    def check_headers(self) -> None:
        """Reads the headers of val and test. Raises UserError if too many are unreadable."""

    def unreadable(self, split: str) -> dict[int, str]:
        """The images of a split that were found unreadable so far: the name of each file by its
        index. `eval_batches` leaves them out."""

    def without(self, split: str, indices: Sequence[int]) -> "FileData":
        """The same data without these images of a split."""

    def holding_out(self, names: np.ndarray, val_hash: str) -> "FileData":
        """The same data whose val is the files of these names that are still there, and whose train
        is the other files of train and val. val_hash: identifies this val."""


class NormalisedImages:
    """The methods that every data set shares; the data set is a dataclass with these fields."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: torch.memory_format

    def normalised_by(self, normalisation: dict | None) -> Self:
        """The same data with a checkpoint's {"mean": [...], "std": [...]}; None: unchanged."""
        if not normalisation:
            return self
        mean, std = tuple(normalisation["mean"]), tuple(normalisation["std"])
        return dataclasses.replace(self, mean=mean, std=std)  # type: ignore[type-var]

    def size(self, split: str) -> int:
        """The number of images in train, val or test."""
        raise NotImplementedError

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in train. The last partial batch is dropped; its images differ between
        epochs."""
        return max(1, self.size("train") // batch_size)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to float32, normalised."""
        return normalise(images, self.mean, self.std, self.layout)
