"""CIFAR-10, CIFAR-100, MNIST and digits, held in memory (`early_exit.data.in_memory`)."""

import contextlib
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from early_exit.data.in_memory import Data, ImageSet, cut
from early_exit.data.splits import stratified
from early_exit.errors import DataError, DataUnavailable, Unavailable, UserError
from early_exit.system.downloads import downloading
from early_exit.system.locks import locked

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent / "data"
# ImageNet's statistics, as in akamaster's script, so that its public checkpoints fit as they are.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the 50,000 train images, as github.com/weiaicunzai/pytorch-cifar100 states them (to 16 digits).
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)  # of the train images
# What torchvision raises for missing and damaged files.
READ_ERRORS = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    AssertionError,
    pickle.UnpicklingError,
)
SHAPES = {
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "digits": (3, 32, 32),
    "mnist": (1, 28, 28),
}


def load(dataset: str, root: str | Path | None = None, split_seed: int = 0) -> Data:
    """The data set called `dataset`: cifar10, cifar100 or mnist, downloaded if absent, or digits.

    root: where the files are; default: data/ in the repository. Raises UserError for an unknown
    data set, Unavailable if a download fails.
    """
    if dataset not in LOADERS:
        raise UserError(f"there is no data set {dataset!r}; choose one of {', '.join(LOADERS)}")
    if dataset == "digits" and root:
        log.warning("%s is not read: the digits are part of scikit-learn", root)
    return LOADERS[dataset](Path(root) if root else ROOT, split_seed)


def _cifar10(root: Path, split_seed: int) -> Data:
    """CIFAR-10: 45,000 train, 5,000 val and 10,000 test images."""
    from torchvision.datasets import CIFAR10

    sets = _downloaded(CIFAR10, root, "CIFAR-10", "cifar-10-batches-py", CIFAR10.url)
    return _cifar("cifar10", sets, split_seed, MEAN, STD)


def _cifar100(root: Path, split_seed: int) -> Data:
    """CIFAR-100 with its 100 fine classes: 45,000 train, 5,000 val and 10,000 test images."""
    from torchvision.datasets import CIFAR100

    sets = _downloaded(CIFAR100, root, "CIFAR-100", "cifar-100-python", CIFAR100.url)
    return _cifar("cifar100", sets, split_seed, CIFAR100_MEAN, CIFAR100_STD)


def _cifar(
    name: str, sets: list, split_seed: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Data:
    """Train and test of one of torchvision's CIFAR data sets, 5,000 of train held out as val."""
    train, test = (
        ImageSet(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
        )
        for part in sets
    )
    return cut(
        name,
        train,
        test,
        sets[0].classes,
        val_size=5000,
        split_seed=split_seed,
        mean=mean,
        std=std,
        flip=True,
        fixed_order=True,
    )


def _mnist(root: Path, split_seed: int) -> Data:
    """MNIST, 28x28 grey: 55,000 train, 5,000 val and 10,000 test images.

    The augmentation is a random crop with 2 pixels of padding, without flips.
    """
    from torchvision.datasets import MNIST

    sets = _downloaded(MNIST, root, "MNIST", "MNIST/raw", MNIST.mirrors[0])
    train, test = (ImageSet(part.data[:, None], part.targets) for part in sets)
    classes = tuple(str(digit) for digit in range(10))
    return cut(
        "mnist",
        train,
        test,
        classes,
        val_size=5000,
        split_seed=split_seed,
        mean=MNIST_MEAN,
        std=MNIST_STD,
        pad=2,
        fixed_order=True,
    )


def _downloaded(dataset: type, root: Path, name: str, folder: str, url: str) -> list:
    """Train and test of one of torchvision's data sets, downloaded if files are missing or damaged.

    name, folder, url: for messages. Raises Unavailable if the download fails.
    """

    def read(train: bool):
        return dataset(root, train=train, download=False)

    with contextlib.suppress(*READ_ERRORS):
        return [read(True), read(False)]
    _check_readable(root / folder)
    log.info("%s is missing or damaged in %s; downloading it", name, root)
    instead = (
        f"put the original {folder} into {root}, or use --dataset digits, which needs no download"
    )
    with locked(root, wait=True):  # several runs may share the directory
        with contextlib.suppress(*READ_ERRORS):
            return [read(True), read(False)]  # another one has downloaded it
        for archive in (root / folder).glob("*.gz"):  # torchvision does not check what it extracted
            archive.with_suffix("").unlink(missing_ok=True)
        try:
            with downloading(url, instead):
                dataset(root, train=True, download=True)
        except Unavailable as error:
            raise DataUnavailable(str(error)) from None
    try:
        return [read(True), read(False)]
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"the files of {name} in {root} are damaged ({reason}); remove them, or {instead}"
        ) from None


def _check_readable(directory: Path) -> None:
    """Raises DataError if this user cannot read the directory or one of its files, which therefore
    look as if they were missing."""
    names = [directory] if os.path.exists(directory) else []
    if names and os.access(directory, os.R_OK | os.X_OK):
        names = list(directory.iterdir())
    for path in names:
        if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
            raise DataError(f"{path} cannot be read; make it readable for this user")


def _digits(_root: Path, split_seed: int) -> Data:
    """scikit-learn's 1,797 scanned digits, 8x8 grey, resized to 3x32x32: 1,257 train, 180 val and
    360 test images. They are not flipped in training: a flipped digit is not a digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the data set digits needs scikit-learn; run: pip install -r requirements.txt"
        ) from None
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8), 0..16
    large = F.interpolate(grey, size=32, mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    targets = torch.from_numpy(digits.target).long()
    whole = ImageSet(images, targets)
    test = stratified(digits.target, 360, seed=0)  # the same test set for every split seed
    rest = np.setdiff1d(np.arange(len(whole)), test)
    return cut(
        "digits",
        whole.subset(rest),
        whole.subset(test),
        tuple(str(name) for name in digits.target_names),
        val_size=180,
        split_seed=split_seed,
        mean=MEAN,
        std=STD,
        fixed_order=True,
    )


LOADERS = {"cifar10": _cifar10, "cifar100": _cifar100, "digits": _digits, "mnist": _mnist}
