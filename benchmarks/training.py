"""Compares the speed of the trainer with that of the usual loop, in one run.

    python benchmarks/training.py             ResNet-20, batch 128
    python benchmarks/training.py --compile   the same with torch.compile
    python benchmarks/training.py --profile   profiles our loop instead
    python benchmarks/training.py --to-accuracy --steps 10
                                              the fast recipe against the usual one

The usual loop: PIL transforms in a DataLoader with 2 workers, float32, contiguous, SGD. Our loop:
what the trainer runs. Both train the plain network on the same random images, each in a process of
its own. The loops take turns; the printed ratio is the median over turns. With --to-accuracy the
seconds of two whole recipes to 92.6 % on CIFAR-10 are extrapolated: to_accuracy.py says from what.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("training", "training.py")

import argparse
import itertools
import typing
from collections.abc import Iterator, Sequence
from functools import partial

import to_accuracy
import torch
from torch.utils.data import DataLoader
from turns import UNTIMED_STEPS, add_turns_flags, print_speeds, run_steps, time_in_turns
from usual import BATCH, PilImages, random_images, usual_loop

from cifar10 import networks
from cifar10.data import MEAN, STD
from early_exit.cli import flags
from early_exit.config import Amp, OptimConfig
from early_exit.data.in_memory import Data
from early_exit.errors import UserError
from early_exit.model.losses import joint_loss
from early_exit.system.device import (
    PRECISIONS,
    autocast_context,
    choose_device,
    choose_precision,
    describe_device,
    keep_freed_memory,
    synchronize,
)
from early_exit.training.optimizer import make_optimizer
from early_exit.training.steps import Tally, train_steps

ARCH = "resnet20"


def random_data() -> Data:
    """The same images as the trainer's data."""
    return Data(
        name="random",
        classes=tuple(map(str, range(10))),
        splits={"train": random_images()},
        val_hash="",
        mean=MEAN,
        std=STD,
        flip=True,
    )


def our_loop(args: argparse.Namespace) -> Iterator[None]:
    """What the trainer runs: one micro-batch, here one training step, per `next`."""
    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as the trainer
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    source = random_data().to(device, torch.channels_last)
    network = networks.build_backbone(args.arch or ARCH)
    network.to(device, memory_format=torch.channels_last).train()
    if args.compile:
        network.compile()
    optim = OptimConfig()
    optimizer = make_optimizer(network, optim)
    precision = choose_precision(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    for epoch in itertools.count():
        yield from train_steps(
            lambda batch: [network(batch)],
            source.train_batches(BATCH, 0, epoch),
            partial(joint_loss, weights=(1.0,)),
            optimizer,
            scaler,
            partial(autocast_context, precision, device),
            itertools.repeat(optim.lr),
            Tally(1, device),
        )


def pil_batches(_args: argparse.Namespace) -> Iterator:
    """Batches of PIL's images without training, in one process."""
    images = PilImages(random_images())
    while True:
        yield from DataLoader(images, BATCH, shuffle=True, drop_last=True)


def tensor_batches(_args: argparse.Namespace) -> Iterator:
    """Batches of the trainer without training."""
    source = random_data()
    for epoch in itertools.count():
        yield from source.train_batches(BATCH, 0, epoch)


def profile(args: argparse.Namespace) -> str:
    """torch's profile of `args.steps` steps of our loop: the most expensive operators, by their own
    time."""
    steps = our_loop(args)
    run_steps(steps, UNTIMED_STEPS)
    device = choose_device(args.device)
    with torch.profiler.profile() as profiled:
        run_steps(steps, args.steps)
        synchronize(device)
    key = f"self_{device.type}_time_total"
    return profiled.key_averages().table(key, row_limit=12, max_name_column_width=50)


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("training.py", "python benchmarks/training.py [flags]", __doc__)
    parser.add_argument("--arch", help=f"backbone (default {ARCH})")
    parser.add_argument(
        "--amp",
        choices=typing.get_args(Amp),
        default="auto",
        metavar="MODE",
        help="mixed precision of our loop: auto, bf16, fp16 or off (default auto)",
    )
    parser.add_argument("--compile", action="store_true", help="compile our loop")
    parser.add_argument(
        "--profile", action="store_true", help="profile our loop instead of comparing"
    )
    parser.add_argument(
        "--to-accuracy",
        action="store_true",
        help="extrapolate the time to 92.6 %% on CIFAR-10, of fast.yaml and of ResNet-32's 200"
        " epochs in the usual loop",
    )
    add_turns_flags(parser, 40, "steps")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the speeds, or a profile."""
    args = parser().parse_args(argv)
    if args.to_accuracy:
        for name in ("arch", "compile", "profile"):
            if getattr(args, name):
                raise UserError(f"--{name} has no effect with --to-accuracy; remove it")
    device = choose_device(args.device)
    precision = choose_precision(args.amp, device)
    if args.to_accuracy:
        print(f"{describe_device(device)}, torch {torch.__version__}")
        to_accuracy.compare(args)
        return
    print(f"{describe_device(device)}, torch {torch.__version__}, batch {BATCH}")
    if args.profile:
        print(profile(args))
        return
    arch = args.arch or ARCH
    print("data only, one process: PIL in a DataLoader, tensors")
    steps = 5 * args.steps  # a batch takes a fraction of the time of a training step
    seconds = time_in_turns({"pil": pil_batches, "tensors": tensor_batches}, args, steps)
    print_speeds(seconds, steps * BATCH)
    print(
        f"training {arch}: usual loop in float32, ours in {PRECISIONS[precision]}"
        f"{', compiled' if args.compile else ''}"
    )
    loops = {"usual": partial(usual_loop, arch=arch), "ours": our_loop}
    seconds = time_in_turns(loops, args, args.steps)
    print_speeds(seconds, args.steps * BATCH)
