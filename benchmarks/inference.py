"""Inference with exits taken, against the plain network and against its own promise, in one run.

    python benchmarks/inference.py                    ResNet-56, exits after layer1 and layer2
    python benchmarks/inference.py --amp bf16 --compile
    python benchmarks/inference.py --leave 0.6 0.2    60 % leave at layer1, 20 % at layer2

Needs no data and no training: time does not depend on the weights, and thresholds are set at the
quantiles at which the wanted shares of random images leave.
"""

import itertools
import typing
from collections.abc import Sequence
from functools import partial

import torch

from cifar10 import networks
from early_exit import cli, flags, runtime
from early_exit.config import Amp
from early_exit.errors import UserError
from early_exit.heads import HEADS
from early_exit.inference import infer
from early_exit.latency import measure
from early_exit.policy import NEVER, Policy


def policy_that_lets_leave(
    network, images: torch.Tensor, shares: list[float], criterion: str, autocast
) -> Policy:
    """Thresholds at which the given shares of `images` leave at each early exit."""
    policy = Policy(
        exit_names=network.exit_names,
        thresholds=(NEVER,) * (network.num_exits - 1),
        criterion=criterion,
    )
    with torch.inference_mode(), autocast():
        logits = torch.cat([torch.stack(network(part), 1) for part in images.split(256)])
    left = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    thresholds = []
    for exit_index, share in enumerate(shares):
        scores = policy.score(exit_index, logits[:, exit_index])[1]
        count = round(share * len(images))
        ranked = scores[~left].sort(descending=True).values
        count = min(count, len(ranked))  # shares are rounded
        thresholds.append(float(ranked[count - 1]) if count else NEVER)
        left |= scores >= thresholds[-1]
    return Policy(
        exit_names=network.exit_names, thresholds=tuple(thresholds), criterion=criterion
    )


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("inference.py", "python benchmarks/inference.py [flags]", __doc__)
    parser.add_argument("--arch", default="resnet56", help="default resnet56")
    parser.add_argument("--exits", nargs="+", default=["layer1", "layer2"])
    parser.add_argument(
        "--head", choices=HEADS, default="conv", metavar="KIND",
        help=f"{', '.join(HEADS)} (default conv)",
    )
    parser.add_argument(
        "--criterion", choices=("max_prob", "entropy", "margin"), default="max_prob",
        metavar="NAME", help="max_prob, entropy or margin (default max_prob)",
    )
    parser.add_argument(
        "--leave", type=float, nargs="+", default=[0.5, 0.3],
        help="share of images that leaves at each early exit (default 0.5 0.3)",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--images", type=int, default=1024, help="default 1024")
    parser.add_argument(
        "--amp", choices=typing.get_args(Amp), default="off", metavar="MODE",
        help="off, bf16, fp16 or auto (default off)",
    )
    parser.add_argument("--compile", action="store_true", help="compile every stage")
    parser.add_argument("--device", default="auto", help="default: the GPU where there is one")
    parser.add_argument("--seconds", type=float, default=30, help="per batch size (default 30)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    args = parser().parse_args(argv)
    if len(args.leave) != len(args.exits) or min(args.leave) < 0 or sum(args.leave) > 1:
        raise UserError(
            f"--leave takes {len(args.exits)} shares, one per early exit, that add up to at most 1"
        )
    if not 1 <= min(args.batch_sizes) <= max(args.batch_sizes) <= args.images:
        raise UserError(f"--batch-sizes lie between 1 and the {args.images} --images")
    device = runtime.choose_device(args.device)
    precision = runtime.choose_precision(args.amp, device)
    autocast = partial(runtime.autocast, precision, device)

    torch.manual_seed(0)
    network = networks.build_network(args.arch, tuple(args.exits), args.head)
    network.to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(args.images, 3, 32, 32, device=device)
    images = images.to(memory_format=torch.channels_last)
    policy = policy_that_lets_leave(network, images, args.leave, args.criterion, autocast)
    with torch.inference_mode():
        answers = [infer(network, part, policy, autocast) for part in images.split(256)]
    exits = torch.cat([answer.exit_index for answer in answers])
    shares = (torch.bincount(exits.cpu(), minlength=network.num_exits) / len(images)).tolist()
    if args.compile:
        network.compile_stages()
        network.backbone.compile(dynamic=True)

    print(
        f"{args.arch}, exits after {', '.join(args.exits)}, {args.head} heads,"
        f" {runtime.PRECISIONS[precision]}, {'compiled, ' if args.compile else ''}"
        f"{runtime.describe_device(device)}, torch {torch.__version__}"
    )
    named = zip(network.exit_names, shares, strict=True)
    print("leaving: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in named))
    print("| batch | plain, ms | live, ms | speed-up | promise kept | nobody leaves | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for batch_size in args.batch_sizes:
        batches = [part for part in images.split(batch_size) if len(part) == batch_size]
        timing = measure(
            network, list(itertools.chain(batches, batches, batches)), policy,
            autocast=autocast, seconds=args.seconds,
        )
        stages = " / ".join(f"{100 * share:.0f}" for share in timing.stage_shares)
        print(
            f"| {batch_size} | {1000 * timing.plain.p50:.2f} | {1000 * timing.live.p50:.2f}"
            f" | {timing.speedup:.2f} x | {100 * timing.kept:.0f} %"
            f" | {100 * timing.overhead:+.1f} % | {stages} % |"
        )


if __name__ == "__main__":
    cli.run(main, "inference.py")
