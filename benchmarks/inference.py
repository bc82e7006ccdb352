"""Times inference with exits taken beside the plain network, in one run, in one runtime or several.

    python benchmarks/inference.py                    ResNet-56, exits after layer1 and layer2
    python benchmarks/inference.py --runtime torch onnxruntime openvino openvino-bf16
    python benchmarks/inference.py --arch resnet50 --image-size 224 --exits layer2 layer3
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
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from network_flags import CIFAR_SIZE, NETWORK, add_network_flags, check_order, check_shares
from torch import Tensor, nn

import cifar10.networks
import imagenet.networks
from early_exit.cli import flags
from early_exit.config import RunConfig
from early_exit.evaluation.verdict import speedup_range
from early_exit.inference.latency import Timing, measure
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.runtimes.network import RuntimeNetwork, to_numpy
from early_exit.inference.runtimes.table import find_runtime
from early_exit.model.heads import HEADS
from early_exit.model.network import MultiExitNetwork
from early_exit.system.device import PRECISIONS, describe_device, set_up

BATCH = 256  # of the untimed passes


def build_network(
    arch: str, exits: Sequence[str], head: str | None, image_size: int
) -> MultiExitNetwork:
    """A network with random weights: cifar10's for images of 32 pixels, imagenet's for others."""
    if image_size == CIFAR_SIZE:
        return cifar10.networks.build_network(arch, tuple(exits), head)
    head = head or imagenet.networks.DEFAULT_HEAD
    return imagenet.networks.build_network(arch, tuple(exits), head, image_size=image_size)


def set_statistics(network: MultiExitNetwork, images: Tensor) -> None:
    """Sets the averages of BatchNorm to those of the images, and eval mode. With random weights and
    without averages, the values grow from layer to layer until every score of a deep network is
    1."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the averages of what it sees
    with torch.no_grad():
        network.train()(images)
    network.eval()


def policy_for_shares(
    network: RuntimeNetwork, images: Tensor, shares: Sequence[float], criterion: str
) -> Policy:
    """The policy under which these shares of `images` exit at each early exit."""
    with torch.inference_mode():
        logits = torch.cat([torch.stack(network(batch), 1) for batch in images.split(BATCH)])
    return policy_for_logits(network.network.exit_names, logits, shares, criterion)


def policy_for_logits(
    exit_names: tuple[str, ...], logits: Tensor, shares: Sequence[float], criterion: str
) -> Policy:
    """The policy under which these shares of the rows of `logits` (B, N, K) exit at each early
    exit."""
    never = (NEVER,) * (len(exit_names) - 1)
    policy = Policy(exit_names=exit_names, thresholds=never, criterion=criterion)
    remaining = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    thresholds = []
    for exit_index, share in enumerate(shares):
        _, score, _ = policy.score(exit_index, logits[:, exit_index])
        ranked = score[remaining].sort(descending=True).values
        count = min(round(share * len(logits)), len(ranked))  # rounding may ask for too many
        thresholds.append(float(ranked[count - 1]) if count else NEVER)
        remaining &= score < thresholds[-1]
    return dataclasses.replace(policy, thresholds=tuple(thresholds))


def exit_shares(network: RuntimeNetwork, images: Tensor, policy: Policy) -> list[float]:
    """The shares of `images` that exit at each exit."""
    answers = [network.infer(batch, policy) for batch in images.split(BATCH)]
    exit_index = torch.cat([torch.from_numpy(to_numpy(answer.exit_index)) for answer in answers])
    counts = torch.bincount(exit_index, minlength=network.num_exits)
    return (counts / len(images)).tolist()


def add_inference_flags(parser: flags.Parser, batch_sizes: Sequence[int]) -> None:
    """The flags of the network, its exits, the images and the runtimes. batch_sizes: the
    default."""
    add_network_flags(parser, {**NETWORK, "batch_sizes": list(batch_sizes)})
    parser.add_argument(
        "--head",
        choices=HEADS,
        metavar="KIND",
        help=f"kind of head: {', '.join(HEADS)} (default: the network's own)",
    )
    parser.add_argument(
        "--criterion",
        choices=("max_prob", "entropy", "margin"),
        default="max_prob",
        metavar="NAME",
        help="max_prob, entropy or margin (default max_prob)",
    )
    parser.add_argument(
        "--runtime",
        nargs="+",
        default=["torch"],
        metavar="NAME",
        help="runtimes, such as torch, torch-bf16, compile, onnxruntime, openvino, openvino-bf16"
        " (default torch)",
    )


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("inference.py", "python benchmarks/inference.py [flags]", __doc__)
    add_inference_flags(parser, (1, 256))
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
    parser.add_argument(
        "--seconds", type=float, default=30, help="time limit per batch size (default 30)"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for shares, batch sizes or images that cannot be measured."""
    check_shares(args)
    flags.check_at_least(args, CIFAR_SIZE, "image_size")


def row(name: str, timing: Timing) -> str:
    """One runtime at one batch size, as a row of the table."""
    segments = " / ".join(f"{100 * share:.0f}" for share in timing.segment_shares)
    low, high = speedup_range(timing)
    return (
        f"| {name} | {timing.batch_size} | {1000 * timing.plain.total / timing.batches:.2f}"
        f" | {1000 * timing.live.total / timing.batches:.2f}"
        f" | {timing.speedup:.2f} x | {low:.2f} to {high:.2f}"
        f" | {100 * timing.fraction_of_ideal:.0f} %"
        f" | {100 * timing.overhead:+.1f} % | {segments} % |"
    )


HEADING = """\
| runtime | batch size | plain network, ms | with exits, ms | speed-up | over repeats \
| fraction of ideal | overhead when no exit is taken | share of seconds by segment |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"""


def prepare(
    args: argparse.Namespace, heading: str
) -> Iterator[tuple[RuntimeNetwork, Policy, Tensor]]:
    """In each of the runtimes: the network, the policy at which the requested shares exit, and the
    images. Prints what is measured and the table's heading first, and where images exit last."""
    device, _ = set_up(RunConfig(device=args.device, amp="off"))
    runtimes = [find_runtime(name, str(device), torch.get_num_threads()) for name in args.runtime]
    torch.manual_seed(0)
    network = build_network(args.arch, args.exits, args.head, args.image_size)
    check_order(args, network.exit_names)
    network.to(device, memory_format=torch.channels_last)
    images = torch.randn(args.images, *network.image_shape, device=device)
    images = images.to(memory_format=torch.channels_last)
    set_statistics(network, images[:BATCH])
    print(
        f"{args.arch}, {args.image_size} pixels, exits after {', '.join(args.exits)},"
        f" {describe_device(device)}, torch {torch.__version__}"
    )
    print(heading)
    told = []
    for runtime in runtimes:
        built = RuntimeNetwork(network, runtime, images[:BATCH])
        policy = policy_for_shares(built, images, args.exit_shares, args.criterion)
        shares = zip(network.exit_names, exit_shares(built, images, policy), strict=True)
        exits = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares)
        told.append(f"{runtime.name} ({PRECISIONS[runtime.precision]}), images that exit: {exits}")
        yield built, policy, images
    print("\n".join(["", *told]))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    args = parser().parse_args(argv)
    check(args)
    for built, policy, images in prepare(args, HEADING):
        for batch_size in args.batch_sizes:
            batches = [batch for batch in images.split(batch_size) if len(batch) == batch_size]
            timing = measure(built, 3 * batches, policy, seconds=args.seconds)
            assert timing, "`check` has seen to a whole batch"
            print(row(built.runtime.name, timing), flush=True)
