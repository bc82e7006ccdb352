"""Images in memory: the whole data set as tensors on the device, augmented a batch at a time.

Crops and flips are drawn from generators seeded by seed, epoch and step. So a batch is a function
of these three, and training can resume in the middle of an epoch.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from early_exit.config import Flip, PadMode
from early_exit.data.base import NormalisedImages
from early_exit.data.splits import WHOLE, Shard, halves, index_hash, seed_of, stratified
from early_exit.errors import UserError

PAD = 4  # pixels of padding on each side before a random crop (He et al. 2015, section 4.2)


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes. Raises UserError for other shapes or dtypes of the images."""

    images: Tensor
    """(N, C, H, W) uint8."""
    targets: Tensor
    """(N,) int64."""

    def __post_init__(self) -> None:
        images, targets = self.images, self.targets
        if images.dtype != torch.uint8 or images.ndim != 4 or targets.shape != images.shape[:1]:
            raise UserError(
                f"expected images (N, C, H, W) of uint8 and targets (N,), got images"
                f" {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')} and targets"
                f" {tuple(targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: np.ndarray) -> "ImageSet":
        """The images at `indices`, in that order."""
        rows = torch.from_numpy(indices)
        return ImageSet(self.images[rows], self.targets[rows])


@dataclass(frozen=True)
class Data(NormalisedImages):
    """A data set cut into train, val and test, giving normalised batches on a device."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, ImageSet]
    val_hash: str
    """Identifies the val images; stored in checkpoints."""
    mean: tuple[float, ...]
    """Of each channel, pixels in [0, 1]."""
    std: tuple[float, ...]
    flip: bool
    """Whether training images are flipped horizontally at random."""
    pad: int = PAD
    """Pixels of padding on each side before a random crop in training."""
    pad_mode: PadMode = "constant"
    """What the padding is: black, or `reflect`, the image mirrored at its border."""
    alternate: bool = False
    """Whether an image is flipped in every second epoch, instead of at random: half of them in the
    first epoch, and the others in the next."""
    layout: torch.memory_format = torch.channels_last
    eval_batch: int = 500

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.splits["train"].images.shape[1:])

    def digest(self, split: str) -> str:
        """Identifies the content of a split: a hash of its images and targets."""
        return content_hash(self.splits[split])

    def to(self, device: torch.device, layout: torch.memory_format) -> "Data":
        """The same data with its tensors on `device`, giving batches in that memory layout."""
        splits = {
            split: ImageSet(part.images.to(device), part.targets.to(device))
            for split, part in self.splits.items()
        }
        return dataclasses.replace(self, splits=splits, layout=layout)

    def augmented(self, flip: Flip, pad: int | None, pad_mode: PadMode) -> "Data":
        """The same data with another augmentation, as `early_exit.config.DataConfig` describes it.

        Raises UserError for alternating flips of data that are never flipped, and for more pixels
        of reflection than the images have.
        """
        pad = self.pad if pad is None else pad
        side = min(self.splits["train"].images.shape[2:])
        if pad_mode == "reflect" and pad >= side:
            raise UserError(
                f"data.pad is {pad} pixels, and images of {side} can be reflected by at most"
                f" {side - 1}"
            )
        alternate = flip == "alternating"
        if alternate and not self.flip:
            raise UserError(
                f"data.flip is alternating, and the images of {self.name} are never flipped in"
                " training; set data.flip=random, which leaves them as they are"
            )
        return dataclasses.replace(self, pad=pad, pad_mode=pad_mode, alternate=alternate)

    def size(self, split: str) -> int:
        """The number of images in a split."""
        return len(self.splits[split])

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `first_step` on: images (B, C, H, W), normalised, and targets
        (B,); of each step the micro-batches of `shard`."""
        train, steps = self.splits["train"], range(first_step, self.steps_per_epoch(batch_size))
        if not steps:
            return
        device, size = train.images.device, min(batch_size, len(train))
        order = torch.randperm(len(train), generator=_generator(seed, epoch))
        # counted from 1: (seed, epoch, 0) seeds as (seed, epoch) does, which seeds the order
        augmentation = Augmentation.cat(
            [Augmentation.draw(size, self.pad, _generator(seed, epoch, step + 1)) for step in steps]
        )
        if self.alternate:
            flipped = flipped_in(epoch, len(train), seed)[order]
            span = slice(steps.start * size, steps.stop * size)
            augmentation = dataclasses.replace(augmentation, flipped=flipped[span])
        # once an epoch: copies to a GPU in each step would wait for the step before
        order, augmentation = order.to(device), augmentation.to(device)
        for step in steps:
            rows, first = order[step * size : (step + 1) * size], (step - first_step) * size
            for part in shard.slices(size):
                selected = rows[part]
                drawn = augmentation.select(slice(first + part.start, first + part.stop))
                images = train.images[selected]
                images = augment(images, drawn, self.pad, self.flip, self.pad_mode)
                yield self.normalise(images), train.targets[selected]

    def eval_batches(
        self, split: str, batch_size: int, shard: Shard = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's batches in order, not augmented; those of `shard`."""
        part = self.splits[split]
        for rows in shard.eval_slices(len(part), batch_size):
            yield self.normalise(part.images[rows]), part.targets[rows]

    def test_halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of two stratified halves of test: the first for val, the second for test."""
        return halves(self.splits["test"].targets.cpu().numpy(), seed)

    def cut_test(self, seed: int) -> "Data":
        """The same data whose val and test are the two halves of test.

        For backbones trained on all of train, from which no image of train is held out.
        """
        for_val, for_test = self.test_halves(seed)
        test = self.splits["test"]
        splits = {**self.splits, "val": test.subset(for_val), "test": test.subset(for_test)}
        val_hash = index_hash(f"{self.name} test", for_val)
        return dataclasses.replace(self, splits=splits, val_hash=val_hash)

    def picture(self, split: str, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8."""
        return self.splits[split].images[index].expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


@dataclass(frozen=True)
class Augmentation:
    """The random crop and flip of each image of a step."""

    offsets: Tensor
    """(2, B) int64, the top and left of each crop in its padded image."""
    flipped: Tensor
    """(B,) bool."""

    @classmethod
    def draw(cls, count: int, pad: int, generator: torch.Generator) -> "Augmentation":
        """Draws a crop and a flip for each of `count` images."""
        offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
        return cls(offsets, torch.rand(count, generator=generator) < 0.5)

    @classmethod
    def cat(cls, parts: Sequence["Augmentation"]) -> "Augmentation":
        """Those of several steps, one after the other."""
        return cls(
            torch.cat([part.offsets for part in parts], dim=1),
            torch.cat([part.flipped for part in parts]),
        )

    def to(self, device: torch.device) -> "Augmentation":
        """The same on another device."""
        return Augmentation(self.offsets.to(device), self.flipped.to(device))

    def select(self, rows: slice) -> "Augmentation":
        """The crops and flips of these rows."""
        return Augmentation(self.offsets[:, rows], self.flipped[rows])


def flipped_in(epoch: int, count: int, seed: int) -> Tensor:
    """Which of `count` images are flipped in an epoch, (count,) bool: half of them at random, and
    in the next epoch the others (arXiv:2404.00498, section 3.6).

    So two consecutive epochs have each image in both directions; of flips drawn anew in each epoch,
    half would repeat the last.
    """
    # (seed, 0, 0, 1) seeds nothing else: three numbers seed a step
    first = torch.rand(count, generator=_generator(seed, 0, 0, 1)) < 0.5
    return first ^ (epoch % 2 == 1)


def augment(
    images: Tensor,
    augmentation: Augmentation,
    pad: int,
    flip: bool,
    pad_mode: PadMode = "constant",
) -> Tensor:
    """Crops images that are padded with `pad` pixels on each side, and flips them.

    With black padding the distribution is that of torchvision's RandomCrop(H, padding=pad) and
    RandomHorizontalFlip, for a whole batch at once. images: (B, C, H, W) uint8. flip: whether flips
    are applied. `augmentation` is on the device of the images.
    """
    count, _, height, width = images.shape
    top, left = augmentation.offsets
    padded = F.pad(images, (pad,) * 4, mode=pad_mode)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, offsets, offsets, H, W)
    images = crops[torch.arange(count, device=images.device), :, top, left]  # (B, C, H, W)
    if flip:
        images = torch.where(augmentation.flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    return images


def content_hash(images: ImageSet) -> str:
    """A short hash of images and targets, in their order."""
    found = hashlib.sha256()
    for tensor in (images.images, images.targets):
        found.update(f"{tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Of each channel of images (N, C, H, W) uint8, for pixels in [0, 1]; exact sums, so in any
    amount of memory. Raises UserError if a channel is constant."""
    count = images.numel() // images.shape[1]
    levels = torch.arange(256, dtype=torch.float64)
    channels = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    means = [float((levels * found).sum() / count) for found in channels]
    squares = [
        float((found * (levels - mean) ** 2).sum() / (count - 1))
        for found, mean in zip(channels, means, strict=True)
    ]
    if 0 in squares:
        raise UserError(
            f"channel {squares.index(0)} has one value in all train images, so it cannot be"
            " normalised; remove it, or pass mean and std"
        )
    return [mean / 255 for mean in means], [math.sqrt(square) / 255 for square in squares]


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
    fixed_order: bool = False,
) -> Data:
    """A data set whose val is `val_size` images of train, stratified by class.

    mean, std: of each channel, pixels in [0, 1]; default: those of train without val. flip, pad:
    the augmentation (`Data`). fixed_order: whether the images have one order everywhere, as those
    of a published archive, so that the numbers of those in val identify them; otherwise their
    content does. Raises UserError if val is empty or leaves no image for train.
    """
    if not 0 < val_size < len(train):
        raise UserError(
            f"val_size is {val_size} of {len(train)} images; hold out at least one and leave some"
            " for training"
        )
    val = stratified(train.targets.numpy(), val_size, split_seed)
    rest = train.subset(np.setdiff1d(np.arange(len(train)), val))
    if mean is None or std is None:
        mean, std = mean_and_std(rest.images)
    splits = {"train": rest, "val": train.subset(val), "test": test}
    return Data(
        name=name,
        classes=tuple(map(str, classes)),  # they, mean and std may be of numpy
        splits=splits,
        val_hash=index_hash(name if fixed_order else f"{name} {content_hash(splits['val'])}", val),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        flip=flip,
        pad=pad,
    )


def _generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, so that the order does not depend on the device."""
    return torch.Generator().manual_seed(seed_of(*numbers))
