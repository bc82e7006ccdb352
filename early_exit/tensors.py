"""Images in memory, as tensors: the whole set on the device, augmented a batch at a time.

Crops and flips are drawn from a generator seeded by (seed, epoch, step), so every batch is a pure
function of its position: resuming in the middle of an epoch needs nothing but the position.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from early_exit.errors import UserError
from early_exit.pixels import ImageData
from early_exit.splits import WHOLE, Share, halves, index_hash, seed_of, stratified

PAD = 4  # pixels on each side before a crop (He et al. 2015, section 4.2)


@dataclass(frozen=True)
class ImageSet:
    """Images and what they show.

    images: (N, C, H, W) uint8; targets: (N,) int64.
    """

    images: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        images, targets = self.images, self.targets
        if images.dtype != torch.uint8 or images.ndim != 4 or targets.shape != images.shape[:1]:
            raise UserError(
                f"images are (N, C, H, W) of uint8 and targets (N,), got {tuple(images.shape)} of"
                f" {str(images.dtype).removeprefix('torch.')} and {tuple(targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: np.ndarray) -> "ImageSet":
        """The images at `indices`, in that order."""
        indices = torch.from_numpy(indices)
        return ImageSet(self.images[indices], self.targets[indices])


@dataclass(frozen=True)
class Data(ImageData):
    """A data set cut into train, val and test, giving normalised batches on a device."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, ImageSet]
    val_hash: str
    """Says which images are val; a checkpoint carries it."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    """Whether a mirrored image shows the same thing."""
    pad: int = PAD
    """By how many pixels an image may be moved in training."""
    layout: torch.memory_format = torch.channels_last
    eval_batch: int = 500

    def digest(self, split: str) -> str:
        """Says what a split holds: a hash of its images and targets."""
        part, content = self.splits[split], hashlib.sha256()
        for tensor in (part.images, part.targets):
            content.update(f"{tuple(tensor.shape)}".encode())
            content.update(tensor.cpu().contiguous().numpy())
        return content.hexdigest()[:16]

    def to(self, device: torch.device, layout: torch.memory_format) -> "Data":
        """The same data with its tensors on `device`, giving batches of that layout."""
        splits = {
            split: ImageSet(part.images.to(device), part.targets.to(device))
            for split, part in self.splits.items()
        }
        return dataclasses.replace(self, splits=splits, layout=layout)

    def size(self, split: str) -> int:
        """How many images a split has."""
        return len(self.splits[split])

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `first_step` on: images (B, C, H, W), targets (B,); of each
        step its parts that are in `share`."""
        train = self.splits["train"]
        order = torch.randperm(len(train), generator=_generator(seed, epoch))
        order = order.to(train.images.device)
        for step in range(first_step, self.steps_per_epoch(batch_size)):
            rows = order[step * batch_size : (step + 1) * batch_size]
            # from 1 on: a seed sequence of (seed, epoch, 0) is the order's (seed, epoch)
            draws = Draws.of(len(rows), self.pad, _generator(seed, epoch, step + 1))
            for part in share.parts(len(rows)):
                images = augment(train.images[rows[part]], draws.at(part), self.pad, self.flip)
                yield self.normalise(images), train.targets[rows[part]]

    def eval_batches(
        self, split: str, batch_size: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's batches in order, not augmented; those that are in `share`."""
        part = self.splits[split]
        for rows in share.batches(len(part), batch_size):
            yield self.normalise(part.images[rows]), part.targets[rows]

    def test_halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of two stratified halves of test: the first to be val, the second test."""
        return halves(self.splits["test"].targets.cpu().numpy(), seed)

    def cut_test(self, seed: int) -> "Data":
        """The same data whose val and test are the two halves of test.

        For backbones that have seen all of train: no image of train is held out from them.
        """
        chosen, rest = self.test_halves(seed)
        test = self.splits["test"]
        splits = {**self.splits, "val": test.subset(chosen), "test": test.subset(rest)}
        val_hash = index_hash(f"{self.name} test", chosen)
        return dataclasses.replace(self, splits=splits, val_hash=val_hash)

    def picture(self, split: str, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8."""
        return self.splits[split].images[index].expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


@dataclass(frozen=True)
class Draws:
    """What chance decides about a step's images: the corner of each crop, and who is mirrored."""

    corners: Tensor  # (2, B)
    mirrored: Tensor  # (B,)

    @classmethod
    def of(cls, count: int, pad: int, generator: torch.Generator) -> "Draws":
        """The draws for `count` images that are moved by up to `pad` pixels."""
        corners = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
        return cls(corners, torch.rand(count, generator=generator) < 0.5)

    def at(self, rows: slice) -> "Draws":
        """Those of some of the images."""
        return Draws(self.corners[:, rows], self.mirrored[rows])


def augment(images: Tensor, draws: Draws, pad: int, flip: bool) -> Tensor:
    """Random crops after padding with black by `pad` pixels, and random mirror images.

    The distribution of torchvision's RandomCrop(H, padding=pad) and RandomHorizontalFlip, for a
    whole batch at once. images: (B, C, H, W) uint8, square.
    """
    count, _, height, width = images.shape
    top, left = draws.corners.to(images.device, non_blocking=True)
    padded = F.pad(images, (pad,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 9, 9, H, W), a view
    images = windows[torch.arange(count, device=images.device), :, top, left]
    if flip:
        mirrored = draws.mirrored.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        images = torch.where(mirrored, images.flip(-1), images)
    return images


def cut(
    name: str,
    train: ImageSet,
    test: ImageSet,
    classes: Sequence[str],
    *,
    val_size: int,
    split_seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    flip: bool = False,
    pad: int = PAD,
) -> Data:
    """A data set whose val is `val_size` images of train, stratified by class.

    mean, std: of each channel's pixels in [0, 1]; absent: those of train as it is left.
    flip, pad: how images may be changed in training (`Data`).
    """
    if not 0 < val_size < len(train):
        raise UserError(f"val_size is {val_size} of {len(train)} images; leave some for training")
    val = stratified(train.targets.numpy(), val_size, split_seed)
    rest = train.subset(np.setdiff1d(np.arange(len(train)), val))
    if mean is None or std is None:
        std, mean = torch.std_mean(rest.images.float() / 255, dim=(0, 2, 3))
        mean, std = tuple(mean.tolist()), tuple(std.tolist())
    splits = {"train": rest, "val": train.subset(val), "test": test}
    return Data(
        name, tuple(classes), splits, index_hash(name, val), tuple(mean), tuple(std), flip, pad
    )


def _generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, so that the order does not depend on the device."""
    return torch.Generator().manual_seed(seed_of(*numbers))
