"""Training speed against the usual loop, in one run.

    python benchmarks/training.py             ResNet-20, batch 128
    python benchmarks/training.py --compile   the same with torch.compile

The usual loop: PIL transforms in a DataLoader with 2 workers, float32, contiguous, SGD. Ours: what
the trainer runs. Both train the plain network on the same random images, each in a process of its
own; the timed stretches take turns, and the ratio printed is the median over turns.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import time
import typing
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cifar10 import data, resnet
from early_exit import cli, runtime
from early_exit.config import Amp, OptimConfig
from early_exit.engine import Tally, make_optimizer, train_steps
from early_exit.errors import UserError
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


def usual_loop(
    images: data.ImageSet, device: torch.device, args: argparse.Namespace
) -> Iterator[None]:
    """The reference: a step per `next`."""
    network = resnet.build_backbone(args.arch).to(device).train()
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


def our_loop(
    images: data.ImageSet, device: torch.device, args: argparse.Namespace
) -> Iterator[None]:
    """What the trainer runs: a step per `next`."""
    splits = {"train": images}
    names = tuple(map(str, range(10)))
    source = data.Data("random", names, splits, "", data.MEAN, data.STD, True)
    source = source.to(device, torch.channels_last)
    network = resnet.build_backbone(args.arch)
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


def pil_batches(images: data.ImageSet, *_: object) -> Iterator:
    """PIL's batches alone, in one process."""
    while True:
        yield from DataLoader(PilImages(images), BATCH, shuffle=True, drop_last=True)


def tensor_batches(images: data.ImageSet, *_: object) -> Iterator:
    """Our batches alone."""
    source = data.Data("random", (), {"train": images}, "", data.MEAN, data.STD, True)
    for epoch in itertools.count():
        yield from source.train_batches(BATCH, 0, epoch)


LOOPS = {
    "pil": pil_batches, "tensors": tensor_batches, "usual": usual_loop, "ours": our_loop,
}


def serve(loop: str, args: argparse.Namespace, pipe: Connection) -> None:
    """A process of its own for one loop: takes a number of steps, gives the seconds they took."""
    device = runtime.choose_device(args.device)
    if device.type == "cpu" and loop == "ours":
        runtime.keep_freed_memory()  # as the trainer does
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    images = data.ImageSet(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, 10, IMAGES)))
    steps = LOOPS[loop](images, device, args)
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            count = pipe.recv()
            runtime.synchronize(device)
            began = time.perf_counter()
            for _ in itertools.islice(steps, count):
                pass
            runtime.synchronize(device)
            pipe.send(time.perf_counter() - began)


def compare(loops: Sequence[str], args: argparse.Namespace, steps: int) -> dict[str, list[float]]:
    """Seconds of every loop in every turn, after a warm-up; the others wait meanwhile."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for loop in loops:
        pipes[loop], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(loop, args, theirs)))
        processes[-1].start()
        theirs.close()  # so that a loop that fails ends the run instead of leaving it waiting

    def seconds_of(loop: str, count: int) -> float:
        pipes[loop].send(count)
        try:
            return pipes[loop].recv()
        except EOFError:
            raise UserError(f"the loop {loop!r} failed; its error stands above") from None

    seconds: dict[str, list[float]] = {loop: [] for loop in loops}
    try:
        for loop in loops:
            seconds_of(loop, 5)
        for _ in range(args.turns):
            for loop in loops:
                seconds[loop].append(seconds_of(loop, steps))
    finally:
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.close()
            process.join()
    return seconds


def show(seconds: dict[str, list[float]], steps: int) -> None:
    """Images/s of each loop, and the ratio of the last to the first, turn by turn."""
    for name, values in seconds.items():
        print(f"  {name:28s} {steps * BATCH / statistics.median(values):9.0f} images/s")
    first, *_, last = seconds.values()
    ratios = [a / b for a, b in zip(first, last, strict=True)]
    print(f"  ratio {statistics.median(ratios):.2f} (turns {min(ratios):.2f} to {max(ratios):.2f})")


def parser() -> cli.Parser:
    """The benchmark's flags."""
    parser = cli.build_parser("training.py", "python benchmarks/training.py [flags]", __doc__)
    parser.add_argument("--arch", default="resnet20", help="default resnet20")
    parser.add_argument(
        "--amp", choices=typing.get_args(Amp), default="auto", metavar="MODE",
        help="auto, bf16, fp16 or off (default auto)",
    )
    parser.add_argument("--compile", action="store_true", help="compile our loop")
    parser.add_argument("--device", default="auto", help="default: the GPU where there is one")
    parser.add_argument("--steps", type=int, default=40, help="steps a turn (default 40)")
    parser.add_argument("--turns", type=int, default=5, help="default 5")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args = parser().parse_args(argv)
    device = runtime.choose_device(args.device)
    precision = runtime.choose_precision(args.amp, device)
    print(f"{runtime.describe_device(device)}, torch {torch.__version__}, batch {BATCH}")
    print("data alone, one process: PIL in a DataLoader, tensors")
    steps = 5 * args.steps  # they take a fraction of a training step's time
    show(compare(["pil", "tensors"], args, steps), steps)
    print(
        f"training {args.arch}: usual loop in float32, ours in {runtime.PRECISIONS[precision]}"
        f"{', compiled' if args.compile else ''}"
    )
    show(compare(["usual", "ours"], args, args.steps), args.steps)


if __name__ == "__main__":
    cli.run(main, "training.py")
