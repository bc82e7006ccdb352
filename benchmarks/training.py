"""Training speed against the usual loop, in one run.

    python benchmarks/training.py             ResNet-20, batch 128
    python benchmarks/training.py --compile   the same with torch.compile
    python benchmarks/training.py --profile   where the time of our steps goes instead

The usual loop: PIL transforms in a DataLoader with 2 workers, float32, contiguous, SGD. Ours: what
the trainer runs. Both train the plain network on the same random images, each in a process of its
own; the timed stretches take turns, and the ratio printed is the median over turns.
"""

import argparse
import itertools
import typing
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from turns import BEFORE, add_turns_flags, compare, show, take

from cifar10 import data, networks
from early_exit import cli, flags, runtime
from early_exit.config import Amp, OptimConfig
from early_exit.engine import Tally, make_optimizer, train_steps
from early_exit.losses import joint_loss

BATCH = 128
IMAGES = 50 * BATCH


class PilImages(Dataset):
    """Images as torchvision's CIFAR10 gives them: one PIL image at a time, transformed."""

    def __init__(self, images: data.ImageSet) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = images.targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4),
                transforms.ToTensor(),
                transforms.Normalize(data.MEAN, data.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


def random_images() -> data.ImageSet:
    """What both loops train on."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    targets = rng.integers(0, 10, IMAGES)
    return data.ImageSet(torch.from_numpy(pixels), torch.from_numpy(targets))


def usual_loop(args: argparse.Namespace) -> Iterator[None]:
    """The reference: a step per `next`."""
    device, images = runtime.choose_device(args.device), random_images()
    network = networks.build_backbone(args.arch).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(
        PilImages(images), BATCH, shuffle=True, num_workers=2, drop_last=True,
        persistent_workers=True, pin_memory=device.type == "cuda",
    )
    while True:
        for batch, target in loader:
            batch, target = batch.to(device), target.to(device)
            loss = F.cross_entropy(network(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def our_loop(args: argparse.Namespace) -> Iterator[None]:
    """What the trainer runs: a step per `next`."""
    device, splits = runtime.choose_device(args.device), {"train": random_images()}
    if device.type == "cpu":
        runtime.keep_freed_memory()  # as the trainer does
    names = tuple(map(str, range(10)))
    source = data.Data("random", names, splits, "", data.MEAN, data.STD, True)
    source = source.to(device, torch.channels_last)
    network = networks.build_backbone(args.arch)
    network.to(device, memory_format=torch.channels_last).train()
    if args.compile:
        network.compile()
    optim = OptimConfig()
    optimizer = make_optimizer(network, optim)
    precision = runtime.choose_precision(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    for epoch in itertools.count():
        yield from train_steps(
            lambda batch: [network(batch)],
            source.train_batches(BATCH, 0, epoch),
            partial(joint_loss, weights=(1.0,)),
            optimizer,
            scaler,
            partial(runtime.autocast, precision, device),
            itertools.repeat(optim.lr),
            Tally(1, device),
        )


def pil_batches(_args: argparse.Namespace) -> Iterator:
    """PIL's batches alone, in one process."""
    images = PilImages(random_images())
    while True:
        yield from DataLoader(images, BATCH, shuffle=True, drop_last=True)


def tensor_batches(_args: argparse.Namespace) -> Iterator:
    """Our batches alone."""
    source = data.Data("random", (), {"train": random_images()}, "", data.MEAN, data.STD, True)
    for epoch in itertools.count():
        yield from source.train_batches(BATCH, 0, epoch)


def profile(args: argparse.Namespace) -> str:
    """torch's profile of `args.steps` steps of our loop: the dearest operations, by own time."""
    steps = our_loop(args)
    take(steps, BEFORE)
    device = runtime.choose_device(args.device)
    with torch.profiler.profile() as profiled:
        take(steps, args.steps)
        runtime.synchronize(device)
    by = f"self_{device.type}_time_total"
    return profiled.key_averages().table(by, row_limit=12, max_name_column_width=50)


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("training.py", "python benchmarks/training.py [flags]", __doc__)
    parser.add_argument("--arch", default="resnet20", help="default resnet20")
    parser.add_argument(
        "--amp", choices=typing.get_args(Amp), default="auto", metavar="MODE",
        help="auto, bf16, fp16 or off (default auto)",
    )
    parser.add_argument("--compile", action="store_true", help="compile our loop")
    parser.add_argument("--profile", action="store_true", help="profile our loop, compare nothing")
    add_turns_flags(parser, 40, "steps")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args = parser().parse_args(argv)
    device = runtime.choose_device(args.device)
    precision = runtime.choose_precision(args.amp, device)
    print(f"{runtime.describe_device(device)}, torch {torch.__version__}, batch {BATCH}")
    if args.profile:
        print(profile(args))
        return
    print("data alone, one process: PIL in a DataLoader, tensors")
    steps = 5 * args.steps  # they take a fraction of a training step's time
    show(compare({"pil": pil_batches, "tensors": tensor_batches}, args, steps), steps * BATCH)
    print(
        f"training {args.arch}: usual loop in float32, ours in {runtime.PRECISIONS[precision]}"
        f"{', compiled' if args.compile else ''}"
    )
    show(compare({"usual": usual_loop, "ours": our_loop}, args, args.steps), args.steps * BATCH)


if __name__ == "__main__":
    cli.run(main, "training.py")
