"""Times inference on a stream beside single batches and the plain network, in one run.

    python benchmarks/streams.py                             ResNet-56, batches of 8 to 64
    python benchmarks/streams.py --runtime torch onnxruntime openvino-bf16
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

from inference import add_inference_flags, check, prepare
from torch import Tensor

from early_exit.cli import flags
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.base import Runtime
from early_exit.inference.runtimes.network import RuntimeNetwork, to_numpy


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("streams.py", "python benchmarks/streams.py [flags]", __doc__)
    add_inference_flags(parser, (8, 16, 32, 64))
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
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


def last_rows(network: RuntimeNetwork, batches: Sequence[Tensor], policy: Policy) -> float:
    """The mean number of rows of a call of the last segment in `infer`."""
    final = policy.num_exits - 1
    exits = [to_numpy(network.infer(images, policy).exit_index) for images in batches]
    rows = [int((taken == final).sum()) for taken in exits]
    return statistics.mean(filter(None, rows)) if any(rows) else 0.0


HEADING = """\
| runtime | batch size | plain network, images/s | infer, images/s | infer_stream, images/s \
| stream / infer (turns) | stream / plain (turns) | rows per call of the last segment in infer |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def row(
    name: str, batch_size: int, images: int, seconds: Mapping[str, list[float]], last: float
) -> str:
    """One runtime at one batch size, as a row of the table. last: as `last_rows` gives it."""
    cells = [name, str(batch_size)]
    cells += [f"{images / statistics.median(values):.0f}" for values in seconds.values()]
    for other in ("infer", "plain"):
        turns = [a / b for a, b in zip(seconds[other], seconds["stream"], strict=True)]
        cells.append(f"{statistics.median(turns):.2f} ({min(turns):.2f} to {max(turns):.2f})")
    return f"| {' | '.join([*cells, f'{last:.1f}'])} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    args = parser().parse_args(argv)
    check(args)
    flags.check_at_least(args, 1, "repeats")
    for built, policy, images in prepare(args, HEADING):
        for batch_size in args.batch_sizes:
            batches = images.split(batch_size)
            seconds = time_batches(built, batches, policy, args.repeats)
            last = last_rows(built, batches, policy)
            name = built.runtime.name
            print(row(name, batch_size, len(images), seconds, last), flush=True)
