"""Times the same network with exits taken in earlyon and in this library, in one run.

    python benchmarks/peers.py                    where earlyon is installed too
    python benchmarks/peers.py --peer-python PATH    a Python in whose environment earlyon is
    python benchmarks/peers.py --runtimes torch onnxruntime --batch-sizes 1 16

Both have the same images, weights, heads, thresholds and number of threads. Each runs in a process
of its own, and they take turns. Needs no data and no training: each threshold is the quantile of
the scores at which the requested share of random images exits. Before anything is timed, the exits
and the classes of all images are compared with the logits of all exits.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("peers", "peers.py")

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from network_flags import add_network_flags, check_shares
from peer_job import ROUNDING, Reference, write_job

from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.model.heads import HEADS
from early_exit.system.device import describe_device

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("torch", "onnxruntime", "openvino", "openvino-bf16")
INSTALL = "python -m venv DIR && DIR/bin/pip install earlyon==0.3.0 pyyaml"
DIFFERENCES = (
    "earlyon routes in eager torch only. It selects no rows: a batch exits as a whole, where its"
    " least sure image is sure enough; images exit one by one only if each is a call of its own."
)


@dataclass(frozen=True)
class Process:
    """A side in its process (`peer_sides.serve`)."""

    pipe: Connection
    versions: str
    modes: Mapping[str, tuple[str, bool]]
    """Per mode the batch sizes it takes and whether it answers a batch as a whole."""

    def takes(self, batch_size: int) -> list[str]:
        """The modes that take batches of this size."""
        wanted = ("any", "one" if batch_size == 1 else "several")
        return [name for name, (batch_sizes, _) in self.modes.items() if batch_sizes in wanted]

    def ask(self, method: str, *arguments: object):
        """What a method of `peer_sides.Side` returns."""
        with contextlib.suppress(OSError):  # it has ended, as `receive` will find
            self.pipe.send((method, arguments))
        return receive(self.pipe)[0]


def receive(pipe: Connection) -> tuple:
    """What a process sends. Raises UserError for an error."""
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        raise UserError("a process to be timed failed; its error is printed above") from None
    if isinstance(message, str):
        raise UserError(message)
    return message


@contextlib.contextmanager
def start(python: str, side: str, directory: str) -> Iterator[Process]:
    """A side in a process of its own, which ends with the context. Waits until it is ready."""
    pipe, process_end = multiprocessing.Pipe()
    call = f"import peer_sides; peer_sides.serve(peer_sides.{side}, {directory!r}, "
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    with contextlib.ExitStack() as stack:
        stack.enter_context(pipe)
        with process_end:
            descriptor = process_end.fileno()
            try:
                process = subprocess.Popen(
                    [python, "-c", f"{call}{descriptor})"],
                    pass_fds=[descriptor],
                    env={**os.environ, "PYTHONPATH": path},
                    stdout=sys.stderr,
                )
            except OSError as error:
                raise UserError(f"{python} cannot be run: {error.strerror}") from None
        stack.callback(process.wait)
        stack.callback(pipe.close)  # before waiting: it is what ends the process
        try:
            described = receive(pipe)
        except UserError as error:
            raise UserError(f"{python} cannot run {side}: {error}") from None
        yield Process(pipe, *described)


def compare_answers(
    processes: Sequence[Process], reference: Reference, batch_size: int
) -> tuple[int, int]:
    """Answers all images in every mode: the number of exits that differ within rounding, and of
    answers. Raises UserError if others differ. bf16 has thresholds of its own and is only run."""
    within, compared, num_exits = 0, 0, reference.logits.shape[1]
    for process in processes:
        for name in process.takes(batch_size):
            exits, classes = map(np.array, process.ask("answers", name, batch_size))
            if name.endswith("bf16"):
                continue
            group = batch_size if process.modes[name][1] else 1
            within += reference.check(name, exits % num_exits, classes, group)
            compared += len(exits)
    return within, compared


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("peers.py", "python benchmarks/peers.py [flags]", __doc__)
    parser.add_argument(
        "--peer-python",
        metavar="PATH",
        help="Python of the environment that has earlyon and torch (default: this one)",
    )
    add_network_flags(
        parser,
        {
            "arch": "resnet56",
            "exits": ["layer2.0", "layer3.0"],
            "exit_shares": [0.365, 0.346],
            "images": 512,
            "batch_sizes": [1, 64, 256],
        },
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="conv",
        metavar="KIND",
        help=f"kind of head: {', '.join(HEADS)} (default conv)",
    )
    parser.add_argument(
        "--runtimes",
        choices=RUNTIMES,
        nargs="+",
        default=RUNTIMES,
        metavar="NAME",
        help=f"runtimes of this library: {', '.join(RUNTIMES)} (default all)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="threads of every mode (default: as many as torch takes)",
    )
    parser.add_argument("--turns", type=int, default=5, help="turns of each mode (default 5)")
    parser.add_argument(
        "--starts",
        type=int,
        default=3,
        help="how often both sides start anew, because speed differs from process to process"
        " (default 3)",
    )
    return parser


def check(args: argparse.Namespace) -> str:
    """The Python for earlyon. Raises UserError for flags that cannot be measured."""
    check_shares(args)
    flags.check_at_least(args, 1, "threads", "turns", "starts")
    if args.peer_python is None and importlib.util.find_spec("earlyon") is None:
        raise UserError(
            f"earlyon is not installed here; make an environment, {INSTALL}, and pass"
            " --peer-python DIR/bin/python"
        )
    return args.peer_python or sys.executable


@dataclass(frozen=True)
class Times:
    """Seconds per batch of every mode at one batch size, one value per turn."""

    batch_size: int
    peer: Mapping[str, list[float]]
    ours: Mapping[str, list[float]]

    @property
    def fastest(self) -> str:
        """earlyon's fastest mode."""
        return min(self.peer, key=lambda name: statistics.median(self.peer[name]))

    def row(self) -> str:
        """A row of the table. Ratios are taken turn by turn."""
        peer = self.peer[self.fastest]
        cells = [str(self.batch_size), f"{1000 * statistics.median(peer):.2f} ({self.fastest})"]
        for ours in self.ours.values():
            ratios = sorted(a / b for a, b in zip(peer, ours, strict=True))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells += [f"{1000 * statistics.median(ours):.2f}", ratio]
        return f"| {' | '.join(cells)} |"


def time_in_turns(peer: Process, ours: Process, batch_size: int, turns: int) -> Times:
    """The seconds of every mode that takes this batch size; the others wait meanwhile."""
    modes = [(side, name) for side in (peer, ours) for name in side.takes(batch_size)]
    seconds: list[list[float]] = [[] for _ in modes]
    for _ in range(turns):
        for values, (side, name) in zip(seconds, modes, strict=True):
            values.append(side.ask("seconds", name, batch_size))
    count = len(peer.takes(batch_size))
    names = [name for _, name in modes]
    return Times(
        batch_size,
        dict(zip(names[:count], seconds[:count], strict=True)),
        dict(zip(names[count:], seconds[count:], strict=True)),
    )


def joined(parts: Sequence[Times]) -> Times:
    """The turns of several starts."""
    peer = {name: [s for part in parts for s in part.peer[name]] for name in parts[0].peer}
    ours = {name: [s for part in parts for s in part.ours[name]] for name in parts[0].ours}
    return Times(parts[0].batch_size, peer, ours)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares the answers, measures and prints a table."""
    args = parser().parse_args(argv)
    python = check(args)
    torch.set_num_threads(args.threads)
    parts: dict[int, list[Times]] = {size: [] for size in args.batch_sizes}
    within = compared = 0
    with tempfile.TemporaryDirectory() as directory:
        reference = write_job(args, Path(directory))
        for _ in range(args.starts):
            with contextlib.ExitStack() as processes:
                peer = processes.enter_context(start(python, "earlyon_side", directory))
                ours = processes.enter_context(start(sys.executable, "our_side", directory))
                for size in args.batch_sizes:
                    differing, count = compare_answers((peer, ours), reference, size)
                    within, compared = within + differing, compared + count
                for size in args.batch_sizes:
                    parts[size].append(time_in_turns(peer, ours, size, args.turns))
    print(
        f"{args.arch}, exits after {', '.join(args.exits)}, {args.head} heads,"
        f" {describe_device(torch.device('cpu'))}; {peer.versions}; ours with {ours.versions}"
    )
    print(DIFFERENCES)
    named = zip(reference.exit_names, reference.shares, strict=True)
    shares = [f"{name} {100 * share:.1f} %" for name, share in named]
    print(f"Images that exit one by one: {', '.join(shares)}.")
    print(
        f"Of {compared} answers, all have the class of the logits of the exit that was taken, and"
        f" {within} took another exit than these logits say, each within {ROUNDING:g} of a"
        " threshold."
    )
    if any(name.endswith("bf16") for name in args.runtimes):
        print("In bf16 thresholds are its own, at the same shares; its answers are not compared.")
    runtimes = [f"{name}, ms | ratio (lowest to highest turn)" for name in args.runtimes]
    print(f"\n| batch size | earlyon, ms | {' | '.join(runtimes)} |")
    print("| ---: " * (2 + 2 * len(args.runtimes)) + "|")
    for size in args.batch_sizes:
        print(joined(parts[size]).row())
