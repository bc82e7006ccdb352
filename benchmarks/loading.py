"""Compares the speed of the image loader with torchvision's reference pipeline, in one run.

    python benchmarks/loading.py           generated JPEGs of 500x375 pixels
    python benchmarks/loading.py DIR       DIR/train/CLASS/*

The reference is the pipeline of torchvision's classification training: in the workers, an
ImageFolder, a random resized crop and a flip of PIL's image, then a normalised float tensor. Ours
sends bytes from the workers and normalises a whole batch at once. The loops take turns, each in a
process of its own with the same number of workers; the printed ratio is the median over turns.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("loading", "loading.py")

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from turns import add_turns_flags, print_speeds, time_in_turns

from early_exit.cli import flags
from early_exit.data import folders
from early_exit.errors import UserError
from early_exit.system.device import choose_device, describe_device, keep_freed_memory
from early_exit.system.processors import processors

IMAGES = 600  # generated
CONFIG = folders.FolderConfig(val_size=1)


def reference(args: argparse.Namespace) -> Iterator:
    """Batches of torchvision's pipeline."""
    device = choose_device(args.device)
    image_folder = ImageFolder(
        Path(args.dir) / "train",
        transforms.Compose(
            [
                transforms.RandomResizedCrop(args.crop, antialias=True),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float),
                transforms.Normalize(folders.MEAN, folders.STD),
            ]
        ),
    )
    loader = DataLoader(
        image_folder,
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        drop_last=True,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for images, target in loader:
            yield images.to(device, non_blocking=True), target.to(device, non_blocking=True)


def ours(args: argparse.Namespace) -> Iterator:
    """Batches of this repository's trainer."""
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    config = dataclasses.replace(CONFIG, workers=args.workers, train_crop=args.crop)
    source = folders.load(config, Path(args.dir)).to(device, torch.channels_last)
    for epoch in itertools.count():
        yield from source.train_batches(args.batch_size, 0, epoch)


def make_images(root: Path) -> None:
    """Writes two classes of smooth noise, about as large as ImageNet's files."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 2)):
        for number in range(count):
            coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
            folder = root / split / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            image.save(folder / f"{number}.jpg", quality=90)


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("loading.py", "python benchmarks/loading.py [DIR] [flags]", __doc__)
    parser.add_argument(
        "dir",
        nargs="?",
        metavar="DIR",
        help="directory with train/ and val/ (default: generated images)",
    )
    parser.add_argument(
        "-j",
        "--workers",
        type=int,
        default=processors(),
        metavar="N",
        help="processes that decode images (default: one per processor)",
    )
    parser.add_argument(
        "-b", "--batch-size", type=int, default=64, help="images per batch (default 64)"
    )
    parser.add_argument(
        "--crop", type=int, default=224, help="side of the crops in pixels (default 224)"
    )
    add_turns_flags(parser, 30, "batches")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the speeds."""
    args = parser().parse_args(argv)
    device = choose_device(args.device)
    print(
        f"{describe_device(device)}, torch {torch.__version__}, batch {args.batch_size},"
        f" {args.workers} workers, crops of {args.crop}"
    )
    flags.check_at_least(args, 1, "batch_size")
    with tempfile.TemporaryDirectory() as generated:
        if args.dir is None:
            args.dir = generated
            make_images(Path(generated))
        images = folders.load(CONFIG, Path(args.dir)).size("train")
        if images < args.batch_size:
            raise UserError(f"{args.dir} holds {images} images, fewer than one batch; lower -b")
        loops = {"torchvision's pipeline": reference, "ours": ours}
        print_speeds(time_in_turns(loops, args, args.steps), args.steps * args.batch_size)
