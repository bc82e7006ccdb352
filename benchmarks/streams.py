"""Times inference on a stream beside single batches and the plain network, in one run.

    python benchmarks/streams.py                             ResNet-56, batches of 8 to 64
    python benchmarks/streams.py --runtime openvino-bf16     in another runtime
    python benchmarks/streams.py --exit-shares 0.6 0.2       60 % exit at layer1, 20 % at layer2

Needs no data and no training: the time does not depend on the weights, and each threshold is the
quantile of the scores at which the requested share of random images exits. All passes over the
images are timed in turns.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("streams", "streams.py")

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from inference import add_network_flags, check, policy_for_shares
from torch import Tensor

from cifar10 import networks
from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.inference.infer import Answers
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.base import Runtime
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.inference.runtimes.network import RuntimeNetwork, to_numpy
from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
from early_exit.inference.runtimes.openvino import OpenVINORuntime
from early_exit.system.device import choose_device, describe_device

RUNTIMES = ("torch", "onnxruntime", "openvino", "openvino-bf16")
CPU = torch.device("cpu")


def build_runtime(name: str, device: torch.device, threads: int | None) -> Runtime:
    """The runtime of a name. threads: None: its own default."""
    if name == "torch":
        if threads is not None:
            torch.set_num_threads(threads)
        return EagerRuntime(name, "f32", device)
    if device != CPU:
        raise UserError(f"{name} runs on the CPU, not on {device}; use --device cpu")
    if name == "onnxruntime":
        return OnnxRuntime(threads=threads)
    return OpenVINORuntime(name, "bf16" if name.endswith("bf16") else "f32", threads)


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("streams.py", "python benchmarks/streams.py [flags]", __doc__)
    add_network_flags(parser, (8, 16, 32, 64))
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="torch",
        metavar="NAME",
        help=f"{', '.join(RUNTIMES)} (default torch)",
    )
    parser.add_argument(
        "--device", default="auto", help="default: with torch, the GPU if there is one"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the runtime's own)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed passes over the images (default 7)"
    )
    return parser


def time_passes(
    passes: Mapping[str, Callable[[], None]], repeats: int, runtime: Runtime
) -> dict[str, list[float]]:
    """The seconds of each pass in each of `repeats` turns, after an untimed one."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(1 + repeats):
        for name, run_pass in passes.items():
            runtime.synchronize()
            began = time.perf_counter()
            run_pass()
            runtime.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def time_batches(
    network: RuntimeNetwork, batches: Sequence[Tensor], policy: Policy, repeats: int
) -> dict[str, list[float]]:
    """The seconds of the plain network, of `infer` and of `infer_stream` on all batches."""
    runtime, plain = network.runtime, network.plain()

    def run_plain() -> None:
        for images in batches:
            with runtime.context():
                plain(runtime.array(images))

    def run_infer() -> None:
        for images in batches:
            network.infer(images, policy)

    def run_stream() -> None:
        for _ in network.infer_stream(batches, policy):
            pass

    passes = {"plain": run_plain, "infer": run_infer, "stream": run_stream}
    return time_passes(passes, repeats, runtime)


def exits_of(answers: Sequence[Answers]) -> list[np.ndarray]:
    """The exits taken in each batch."""
    return [to_numpy(answer.exit_index) for answer in answers]


def row(batch_size: int, images: int, seconds: Mapping[str, list[float]], last: float) -> str:
    """One batch size, as a row of the table. last: rows per call of the last segment in `infer`."""
    speeds = [f"{images / statistics.median(values):.0f}" for values in seconds.values()]
    ratios = []
    for name in ("infer", "plain"):
        turns = [a / b for a, b in zip(seconds[name], seconds["stream"], strict=True)]
        ratios.append(f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})")
    return f"| {' | '.join([str(batch_size), *speeds, *ratios, f'{last:.1f}'])} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    args = parser().parse_args(argv)
    check(args)
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {args.repeats}")
    on_cpu = args.runtime != "torch" and args.device == "auto"
    device = CPU if on_cpu else choose_device(args.device)
    runtime = build_runtime(args.runtime, device, args.threads)
    layout = torch.channels_last if args.runtime == "torch" else torch.contiguous_format

    torch.manual_seed(0)
    net = networks.build_network(args.arch, tuple(args.exits), args.head)
    net.to(device, memory_format=layout).eval()
    images = torch.randn(args.images, 3, 32, 32, device=device).to(memory_format=layout)
    policy = policy_for_shares(net, images, args.exit_shares, args.criterion, nullcontext)
    network = RuntimeNetwork(net, runtime, images[:2])

    print(
        f"{args.arch}, exits after {', '.join(args.exits)}, {args.head} heads, {args.runtime}"
        f" {runtime.precision}, {describe_device(device)}, torch {torch.__version__}"
    )
    print_shares(network, images, policy)
    print(
        "| batch size | plain network, images/s | infer, images/s | infer_stream, images/s"
        " | stream / infer (turns) | stream / plain (turns)"
        " | rows per call of the last segment in infer |"
    )
    print("| ---: " * 7 + "|")
    for batch_size in args.batch_sizes:
        batches = images.split(batch_size)
        exits = exits_of([network.infer(batch, policy) for batch in batches])
        finals = [int((taken == policy.num_exits - 1).sum()) for taken in exits]
        calls = sum(map(bool, finals))
        seconds = time_batches(network, batches, policy, args.repeats)
        print(row(batch_size, len(images), seconds, sum(finals) / max(calls, 1)))


def print_shares(network: RuntimeNetwork, images: Tensor, policy: Policy) -> None:
    """Prints the shares of the images that take each exit in this runtime."""
    taken = np.concatenate(exits_of(list(network.infer_stream(images.split(64), policy))))
    shares = np.bincount(taken, minlength=policy.num_exits) / len(taken)
    named = zip(policy.exit_names, shares, strict=True)
    print("images that exit: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in named))
