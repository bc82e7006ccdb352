"""Times inference with exits taken beside the plain network, in one run.

    python benchmarks/inference.py                    ResNet-56, exits after layer1 and layer2
    python benchmarks/inference.py --amp bf16 --compile
    python benchmarks/inference.py --exit-shares 0.6 0.2    60 % exit at layer1, 20 % at layer2

Needs no data and no training: the time does not depend on the weights, and each threshold is the
quantile of the scores at which the requested share of random images exits.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("inference", "inference.py")

import argparse
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from cifar10 import networks
from early_exit.cli import flags
from early_exit.config import Amp
from early_exit.errors import UserError
from early_exit.inference.infer import infer
from early_exit.inference.latency import Timing, measure
from early_exit.inference.policy import NEVER, Policy
from early_exit.model.heads import HEADS
from early_exit.model.network import MultiExitNetwork
from early_exit.system.device import (
    PRECISIONS,
    autocast_context,
    choose_device,
    choose_precision,
    describe_device,
)

BATCH = 256  # of the untimed passes

Autocast = Callable[[], AbstractContextManager]


def policy_for_shares(
    network: MultiExitNetwork,
    images: Tensor,
    shares: Sequence[float],
    criterion: str,
    autocast: Autocast,
) -> Policy:
    """The policy under which these shares of `images` exit at each early exit."""
    policy = Policy(
        exit_names=network.exit_names,
        thresholds=(NEVER,) * (network.num_exits - 1),
        criterion=criterion,
    )
    with torch.inference_mode(), autocast():
        logits = torch.cat([torch.stack(network(batch), 1) for batch in images.split(BATCH)])
    remaining = torch.ones(len(images), dtype=torch.bool, device=images.device)
    thresholds = []
    for exit_index, share in enumerate(shares):
        _, score, _ = policy.score(exit_index, logits[:, exit_index])
        ranked = score[remaining].sort(descending=True).values
        count = min(round(share * len(images)), len(ranked))  # rounding may ask for too many
        thresholds.append(float(ranked[count - 1]) if count else NEVER)
        remaining &= score < thresholds[-1]
    return Policy(exit_names=network.exit_names, thresholds=tuple(thresholds), criterion=criterion)


def exit_shares(
    network: MultiExitNetwork, images: Tensor, policy: Policy, autocast: Autocast
) -> list[float]:
    """The shares of `images` that exit at each exit."""
    with torch.inference_mode():
        answers = [infer(network, batch, policy, autocast) for batch in images.split(BATCH)]
    exit_index = torch.cat([answer.exit_index for answer in answers])
    counts = torch.bincount(exit_index.cpu(), minlength=network.num_exits)
    return (counts / len(images)).tolist()


def add_network_flags(parser: flags.Parser, batch_sizes: Sequence[int]) -> None:
    """The flags of the network, its exits and the images. batch_sizes: the default."""
    parser.add_argument("--arch", default="resnet56", help="backbone (default resnet56)")
    parser.add_argument(
        "--exits",
        nargs="+",
        default=["layer1", "layer2"],
        metavar="PLACE",
        help="places of the early exits (default layer1 layer2)",
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="conv",
        metavar="KIND",
        help=f"kind of head: {', '.join(HEADS)} (default conv)",
    )
    parser.add_argument(
        "--criterion",
        choices=("max_prob", "entropy", "margin"),
        default="max_prob",
        metavar="NAME",
        help="max_prob, entropy or margin (default max_prob)",
    )
    parser.add_argument(
        "--exit-shares",
        type=float,
        nargs="+",
        default=[0.5, 0.3],
        metavar="SHARE",
        help="share of the images that exits at each early exit (default 0.5 0.3)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=list(batch_sizes),
        metavar="N",
        help=f"batch sizes to time (default {' '.join(map(str, batch_sizes))})",
    )
    parser.add_argument("--images", type=int, default=1024, help="number of images (default 1024)")


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("inference.py", "python benchmarks/inference.py [flags]", __doc__)
    add_network_flags(parser, (1, 256))
    parser.add_argument(
        "--amp",
        choices=typing.get_args(Amp),
        default="off",
        metavar="MODE",
        help="mixed precision: off, bf16, fp16 or auto (default off)",
    )
    parser.add_argument("--compile", action="store_true", help="compile every stage")
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
    parser.add_argument(
        "--seconds", type=float, default=30, help="time limit per batch size (default 30)"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for shares or batch sizes that cannot be measured."""
    if (
        len(args.exit_shares) != len(args.exits)
        or min(args.exit_shares) < 0
        or sum(args.exit_shares) > 1
    ):
        raise UserError(
            f"--exit-shares takes {len(args.exits)} shares, one per early exit, that add up to"
            " at most 1"
        )
    if not 1 <= min(args.batch_sizes) <= max(args.batch_sizes) <= args.images:
        raise UserError(f"--batch-sizes must be between 1 and the {args.images} --images")


def row(timing: Timing) -> str:
    """One batch size, as a row of the table."""
    stages = " / ".join(f"{100 * share:.0f}" for share in timing.stage_shares)
    return (
        f"| {timing.batch_size} | {1000 * timing.plain.p50:.2f} | {1000 * timing.live.p50:.2f}"
        f" | {timing.speedup:.2f} x | {100 * timing.fraction_of_ideal:.0f} %"
        f" | {100 * timing.overhead:+.1f} % | {stages} % |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    args = parser().parse_args(argv)
    check(args)
    device = choose_device(args.device)
    precision = choose_precision(args.amp, device)
    autocast = partial(autocast_context, precision, device)

    torch.manual_seed(0)
    network = networks.build_network(args.arch, tuple(args.exits), args.head)
    network.to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(args.images, 3, 32, 32, device=device)
    images = images.to(memory_format=torch.channels_last)
    policy = policy_for_shares(network, images, args.exit_shares, args.criterion, autocast)
    shares = exit_shares(network, images, policy, autocast)
    if args.compile:
        network.compile_stages()
        network.backbone.compile(dynamic=True)

    print(
        f"{args.arch}, exits after {', '.join(args.exits)}, {args.head} heads,"
        f" {PRECISIONS[precision]}, {'compiled, ' if args.compile else ''}"
        f"{describe_device(device)}, torch {torch.__version__}"
    )
    named = zip(network.exit_names, shares, strict=True)
    print("images that exit: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in named))
    print(
        "| batch size | plain network, ms | with exits, ms | speed-up | fraction of ideal"
        " | overhead when no exit is taken | share of seconds by stage |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for batch_size in args.batch_sizes:
        batches = [batch for batch in images.split(batch_size) if len(batch) == batch_size]
        timing = measure(network, 3 * batches, policy, autocast=autocast, seconds=args.seconds)
        print(row(timing))
