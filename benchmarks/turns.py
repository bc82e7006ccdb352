"""Times loops in turns, each in a process of its own, so that their ratio comes from one run."""

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

from early_exit.errors import UserError
from early_exit.system.device import choose_device, synchronize

Loop = Callable[[argparse.Namespace], Iterator]
"""An endless iterator that does one step, on one batch of images, per `next`."""
UNTIMED_STEPS = 6  # at the start of a turn; loader workers have prefetched during the others' turns


def run_steps(steps: Iterator, count: int) -> None:
    """Runs `count` steps."""
    for _ in itertools.islice(steps, count):
        pass


def serve(loop: Loop, args: argparse.Namespace, pipe: Connection) -> None:
    """The process of one loop: receives a number of steps, sends the seconds they took."""
    device = choose_device(args.device)
    # closing the loop ends the loader's workers; EOFError: the main process has closed its end
    with contextlib.closing(loop(args)) as steps, contextlib.suppress(EOFError):
        while True:
            count = pipe.recv()
            run_steps(steps, UNTIMED_STEPS)
            synchronize(device)
            began = time.perf_counter()
            run_steps(steps, count)
            synchronize(device)
            pipe.send(time.perf_counter() - began)


def add_turns_flags(parser: argparse.ArgumentParser, steps: int, unit: str) -> None:
    """The flags of a comparison. steps: the default; unit: what a step is called."""
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
    parser.add_argument(
        "--steps", type=int, default=steps, help=f"{unit} per turn (default {steps})"
    )
    parser.add_argument("--turns", type=int, default=5, help="turns of each loop (default 5)")


def time_in_turns(
    loops: Mapping[str, Loop], args: argparse.Namespace, steps: int
) -> dict[str, list[float]]:
    """The seconds of every loop in each of `args.turns` turns; the other loops wait meanwhile.

    Raises UserError if a loop fails.
    """
    if min(steps, args.turns) < 1:
        raise UserError("--steps and --turns must be at least 1")
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, loop in loops.items():
        pipes[name], process_end = context.Pipe()
        processes.append(context.Process(target=serve, args=(loop, args, process_end)))
        processes[-1].start()
        process_end.close()  # so that `recv` raises EOFError if the process dies

    def seconds_of(name: str, count: int) -> float:
        pipes[name].send(count)
        try:
            return pipes[name].recv()
        except EOFError:
            raise UserError(f"the loop {name!r} failed; its error is printed above") from None

    seconds: dict[str, list[float]] = {name: [] for name in loops}
    try:
        for name in loops:  # the warm-up
            seconds_of(name, 1)
        for _ in range(args.turns):
            for name in loops:
                seconds[name].append(seconds_of(name, steps))
    finally:
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.close()
            process.join()
    return seconds


def print_speeds(seconds: Mapping[str, list[float]], images: int) -> None:
    """Prints images/s of each loop, medians over turns, and the ratio of the last to the first.

    images: per turn. The ratio is taken turn by turn.
    """
    for name, values in seconds.items():
        print(f"  {name:28s} {images / statistics.median(values):9.0f} images/s")
    first, *_, last = seconds.values()
    ratios = [a / b for a, b in zip(first, last, strict=True)]
    print(f"  ratio {statistics.median(ratios):.2f} (turns {min(ratios):.2f} to {max(ratios):.2f})")
