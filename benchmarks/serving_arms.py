"""The arms of benchmarks/serving.py: what each gives to the same engine, and a server of it in a
process of its own. Imports no torch, as the server does."""

import asyncio
import contextlib
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from early_exit import deployed
from early_exit.deployed import DeployedClassifier
from early_exit.errors import UserError
from early_exit.inference.infer import RunSegment, run_segments
from early_exit.inference.policy import Policy
from early_exit.serving.engine import Engine, EngineSettings, EngineState
from early_exit.serving.limits import Limits
from early_exit.serving.policies import Policies

PLAIN, TOGETHER, REGROUPED, ADAPTIVE = "plain", "together", "regrouped", "adaptive"
NAMES = {
    PLAIN: "plain network",
    TOGETHER: "exits, a batch stays together",
    REGROUPED: "exits, regrouped",
    ADAPTIVE: "exits, regrouped, --adapt",
}
MODEL = "model"  # its name in addresses
GRACE = 10  # seconds, for the end of a server


@dataclass(frozen=True)
class Arm:
    """What is served."""

    name: str
    directory: Path
    """Of the deployed model."""
    runtime: str
    max_drop: float | None = None
    """The accuracy (a fraction) that `--adapt` may lose."""

    def load(self) -> tuple[DeployedClassifier, Sequence[tuple[int, RunSegment]], Policy]:
        """The model, and the segments and the policy for the engine."""
        model = deployed.load(self.directory, self.runtime, threads=1)
        if self.name == TOGETHER:
            return model, *as_one_segment(model.segments, model.policy)
        return model, model.segments, model.policy


def as_one_segment(
    segments: Sequence[tuple[int, RunSegment]], policy: Policy
) -> tuple[list[tuple[int, RunSegment]], Policy]:
    """All segments as one, inside of which rows exit: a batch is answered when its last row is.

    The policy returned has no early exits, so all of these rows count as of the final exit.
    """
    final = policy.num_exits - 1

    def run_all(features: np.ndarray, _temperature: float, _state: None) -> tuple:
        answers = run_segments(segments, features, policy)
        return features, answers.logits, answers.logits, answers.score, None

    return [(final, run_all)], replace(policy, enabled=(False,) * final, guarantee=None)


@dataclass(frozen=True)
class Usage:
    """What a server has done since it was started."""

    state: EngineState
    workers: float
    """Seconds of processor time of the threads that run segments, regrouping included."""
    process: float
    """Seconds of processor time of the whole process."""


@dataclass(frozen=True)
class Server:
    """A server that accepts connections."""

    port: int
    pipe: Connection

    def usage(self) -> Usage:
        """What it has done until now. Raises UserError if it has ended."""
        try:
            self.pipe.send(None)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("a server ended; its error is printed above") from None


@contextlib.contextmanager
def servers(
    arms: Sequence[Arm], settings: EngineSettings, cores: Sequence[int]
) -> Iterator[dict[str, Server]]:
    """A server of each arm, by the arm's name, pinned to these processors. They end with the
    context."""
    context = multiprocessing.get_context("spawn")
    processes, started = [], {}
    try:
        for arm in arms:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(arm, settings, tuple(cores), theirs))
            process.start()
            theirs.close()  # so that `recv` raises EOFError if the process dies
            processes.append(process)
            try:
                started[arm.name] = Server(ours.recv(), ours)
            except EOFError:
                raise UserError(f"the server of {arm.name} failed; its error is above") from None
        yield started
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(2 * GRACE)
            process.kill()


def serve(arm: Arm, settings: EngineSettings, cores: Sequence[int], pipe: Connection) -> None:
    """The process of a server: sends its port when it accepts connections, then its usage whenever
    it is asked."""
    os.sched_setaffinity(0, cores)
    from early_exit.serving import app, server

    model, segments, policy = arm.load()
    engine = Engine(segments, policy, settings)
    service = app.Service(
        model, engine, MODEL, limits=Limits(), max_rows=settings.max_rows, stall=60.0
    )
    listener = server.bind("127.0.0.1", 0)
    listener.listen(1024)
    port = listener.getsockname()[1]
    workers = [one.ident for one in threading.enumerate() if one.name.startswith("worker ")]
    assert len(workers) == settings.workers  # the engine's
    clocks = [time.pthread_getcpuclockid(ident) for ident in workers if ident]
    threading.Thread(target=report, args=(engine, clocks, port, pipe), daemon=True).start()

    async def run() -> None:
        policies = Policies(engine, model.manifest, arm.directory, arm.max_drop, settings.target)
        await server.serve(service, policies, listener, GRACE, "")

    with contextlib.redirect_stdout(io.StringIO()):
        asyncio.run(run())


def report(engine: Engine, clocks: Sequence[int], port: int, pipe: Connection) -> None:
    """Sends the port, and the usage at each request for it. clocks: of the engine's threads."""
    pipe.send(port)
    with contextlib.suppress(EOFError, OSError):  # the benchmark has ended
        while True:
            pipe.recv()
            seconds = sum(map(time.clock_gettime, clocks))
            pipe.send(Usage(engine.snapshot(), seconds, time.process_time()))
