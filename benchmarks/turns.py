"""Loops that take turns, each in a process of its own, so that a ratio is of one run."""

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

from early_exit import runtime
from early_exit.errors import UserError

Loop = Callable[[argparse.Namespace], Iterator]
"""A step of `BATCH` images per `next`, for ever."""
BEFORE = 6  # untimed steps of a turn: workers have prefetched while the others had theirs


def take(steps: Iterator, count: int) -> None:
    """Takes `count` steps."""
    for _ in itertools.islice(steps, count):
        pass


def serve(loop: Loop, args: argparse.Namespace, pipe: Connection) -> None:
    """A process of its own for one loop: takes a number of steps, gives the seconds they took."""
    device = runtime.choose_device(args.device)
    # closed, so that a loader's workers end; an end of the pipe: nobody asks any more
    with contextlib.closing(loop(args)) as steps, contextlib.suppress(EOFError):
        while True:
            count = pipe.recv()
            take(steps, BEFORE)
            runtime.synchronize(device)
            began = time.perf_counter()
            take(steps, count)
            runtime.synchronize(device)
            pipe.send(time.perf_counter() - began)


def add_turns_flags(parser: argparse.ArgumentParser, steps: int, what: str) -> None:
    """The flags of a comparison; `what`: a step."""
    parser.add_argument("--device", default="auto", help="default: the GPU where there is one")
    parser.add_argument("--steps", type=int, default=steps, help=f"{what} a turn (default {steps})")
    parser.add_argument("--turns", type=int, default=5, help="default 5")


def compare(
    loops: Mapping[str, Loop], args: argparse.Namespace, steps: int
) -> dict[str, list[float]]:
    """Seconds of every loop in each of `args.turns` turns; the others wait meanwhile."""
    if min(steps, args.turns) < 1:
        raise UserError("--steps and --turns must be at least 1")
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, loop in loops.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(loop, args, theirs)))
        processes[-1].start()
        theirs.close()  # so that a loop that fails ends the run instead of leaving it waiting

    def seconds_of(name: str, count: int) -> float:
        pipes[name].send(count)
        try:
            return pipes[name].recv()
        except EOFError:
            raise UserError(f"the loop {name!r} failed; its error stands above") from None

    seconds: dict[str, list[float]] = {name: [] for name in loops}
    try:
        for name in loops:
            seconds_of(name, 1)
        for _ in range(args.turns):
            for name in loops:
                seconds[name].append(seconds_of(name, steps))
    finally:
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.close()
            process.join()
    return seconds


def show(seconds: dict[str, list[float]], images: int) -> None:
    """Images/s of each loop, of that many `images` a turn, and the ratio of the last to the first,
    turn by turn."""
    for name, values in seconds.items():
        print(f"  {name:28s} {images / statistics.median(values):9.0f} images/s")
    first, *_, last = seconds.values()
    ratios = [a / b for a, b in zip(first, last, strict=True)]
    print(f"  ratio {statistics.median(ratios):.2f} (turns {min(ratios):.2f} to {max(ratios):.2f})")
