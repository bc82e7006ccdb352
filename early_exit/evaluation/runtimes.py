"""In which runtimes a run is evaluated, and how the evaluations in them are named and compared."""

import itertools
import logging
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from early_exit import config as configs
from early_exit.choosing.goals import Goal
from early_exit.config import RunConfig
from early_exit.errors import UserError
from early_exit.evaluation.report import Report
from early_exit.evaluation.report_seconds import RuntimeRow, RuntimeSeconds
from early_exit.evaluation.verdict import speedup_range
from early_exit.inference.latency import make_timer, turns
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.table import (
    RUNTIMES,
    available_runtimes,
    check_name,
    torch_name,
)
from early_exit.system.device import choose_device, choose_precision
from early_exit.trained import EVALUATION, Trained, in_runtime, one_by_one

log = logging.getLogger(__name__)

FASTEST = "fastest"
TURNS = 21
SAID = ("amp", "compile")  # settings of a run that a runtime's name says


def check_names(runtimes: Sequence[str | None]) -> None:
    """Raises UserError for a name that no runtime has."""
    for name in runtimes:
        if name is not None:
            check_name(name, (*RUNTIMES, FASTEST))


def check_settings(runtimes: Sequence[str | None], overrides: dict[str, Any]) -> None:
    """Raises UserError if a runtime is named and settings say its precision or compile it: the
    runtime's name says both."""
    if not any(runtimes):
        return
    given = {name: value for name, value in overrides.get("run", {}).items() if name in SAID}
    run: RunConfig = configs.build(RunConfig, {**EVALUATION, **given}, "run")
    flags = [f"--amp {run.amp}"] if run.amp != "off" else []
    flags += ["--compile"] if run.compile else []
    if not flags:
        return
    named = f"--runtime names the precision and whether to compile; remove {' and '.join(flags)}"
    if run.amp == "auto":  # which one that is depends on the processor
        raise UserError(named)
    raise UserError(f"{named}, or pass --runtime {torch_name(run.compile, run.amp)}")


def with_default(runtimes: Sequence[str | None], overrides: dict[str, Any]) -> list[str | None]:
    """The runtimes; for None the one that the settings' precision and compilation ask for, if that
    is not float32 in eager torch, so that an evaluation is named after it."""
    run: RunConfig = configs.build(RunConfig, {**EVALUATION, **overrides.get("run", {})}, "run")
    default = torch_name(run.compile, choose_precision(run.amp, choose_device(run.device)))
    return [default if name is None and default != "torch" else name for name in runtimes]


def resolved(trained: Trained, runtimes: Sequence[str | None], batch_size: int) -> list[str | None]:
    """The runtimes, each once, with the one that is fastest at this batch size for `fastest`."""
    if FASTEST not in runtimes:
        return list(dict.fromkeys(runtimes))
    found = fastest(trained, batch_size)
    return list(dict.fromkeys(found if name == FASTEST else name for name in runtimes))


def fastest(trained: Trained, batch_size: int) -> str:
    """The runtime whose plain network is fastest on the first images of val, measured in turns.

    Those in 8-bit integers change the accuracy and those that compile take minutes, so they are not
    among the candidates.
    """
    val = np.arange(trained.data.size("val"))
    found = list(itertools.islice(one_by_one(trained.data, "val", val), batch_size))
    if not found:
        raise UserError("no image of val can be read")
    images = torch.cat(found)
    names = [
        name
        for name in available_runtimes(trained.device.type)
        if not name.endswith("int8") and not name.startswith("compile")
    ]
    networks = {name: in_runtime(trained, trained.data, name) for name in names}
    seconds = plain_seconds(networks, images)
    best = min(seconds, key=seconds.__getitem__)
    log.info(
        "plain network at batch %d: %s; the fastest is %s",
        len(images),
        ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items()),
        best,
    )
    return best


def plain_seconds(networks: dict[str, RuntimeNetwork], images: Any) -> dict[str, float]:
    """The median seconds of the plain network in each runtime, measured in turns."""
    calls = {
        name: partial(network.plain(), network.runtime.array(images))
        for name, network in networks.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in networks}
    for order in turns(networks, TURNS, random.Random(0)):
        for name in order:
            network = networks[name]
            with network.runtime.context():
                samples[name].append(make_timer(network)(calls[name]))
    return {name: float(np.median(turns)) for name, turns in samples.items()}


def evaluation_name(base: str, name: str | None, runtime: str | None, several: bool) -> str:
    """The name of the evaluation in a runtime: the given one, by default `base`, and the runtime
    unless it is torch. A given name is the whole name unless there are several runtimes."""
    if runtime in (None, "torch") or (name and not several):
        return name or base
    return f"{name or base}-{runtime}"


def default_name(goal: Goal) -> str:
    """The name of an evaluation that was given none."""
    words = f"{goal} {goal.criterion}"
    words = words.replace(", seconds at batch", " seconds batch").replace(",", "")
    if not goal.calibrate:
        words += " uncalibrated"
    for old, new in ((" % of MACs", ""), (" %", ""), (" points", ""), (" ", "-")):
        words = words.replace(old, new)
    return words


def runtime_row(report: Report, evaluation: str) -> RuntimeRow:
    """An evaluation among those in several runtimes. evaluation: its name."""
    return RuntimeRow(
        runtime=report.environment.runtime,
        precision=report.environment.precision,
        evaluation=evaluation,
        accuracy=report.test.accuracy,
        macs_share=report.test.macs_share,
        seconds=tuple(
            RuntimeSeconds(
                timing.batch_size,
                timing.plain.total / timing.batches,
                timing.live.total / timing.batches,
                timing.speedup,
                speedup_range(timing),
            )
            for timing in report.timing
        ),
        verdicts=report.verdicts,
    )
