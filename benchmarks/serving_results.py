"""The tables of benchmarks/serving.py. Imports no torch."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving_arms import NAMES, PLAIN, REGROUPED, TOGETHER, Usage
from serving_load import Latencies
from serving_saturated import IDEAL, Found, Saturated

SATURATED = """\
| max batch | plain, ms | together, ms | regrouped, ms | ideal, ms | ideal / regrouped (turns) \
| together / regrouped (turns) | plain / regrouped (turns) | rows per run, together \
| rows per run, regrouped |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"""
LOADED = """\
| requests/s | arm | answers/s | p50, ms | p99, ms | rejected | accuracy | model, ms per answer \
| HTTP and decoding, ms per answer | rows per run | client late, p99 ms |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |"""


@dataclass(frozen=True)
class Loaded:
    """One arm at one rate."""

    arm: str
    rate: float
    """Requests per second, on average."""
    seen: Latencies
    model_seconds: float
    """Of the processor, per answer, in the threads that run segments."""
    other_seconds: float
    """Of the processor, per answer, in the other threads: HTTP, decoding, refusing."""
    rows: tuple[float, ...]
    """The mean rows of a run of each segment."""


def loaded(arm: str, rate: float, seen: Latencies, before: Usage, after: Usage) -> Loaded:
    """One arm at one rate. before, after: of its server, around the load."""
    answers = sum(after.state.answered) - sum(before.state.answered)
    workers = after.workers - before.workers
    others = after.process - before.process - workers
    rows = tuple(
        (last - first) / max(1, runs - runs_before)
        for last, first, runs, runs_before in zip(
            after.state.rows, before.state.rows, after.state.runs, before.state.runs, strict=True
        )
    )
    return Loaded(
        arm, rate, seen, workers / max(1, answers), max(0.0, others) / max(1, answers), rows
    )


def saturated_table(found: Found) -> str:
    """Seconds of the model per answer, medians over turns, and ratios turn by turn."""
    return "\n".join([SATURATED, *(_saturated_row(size, arms) for size, arms in found.items())])


def _saturated_row(size: int, arms: Mapping) -> str:
    seconds = {name: [one.seconds for one in turns] for name, turns in arms.items()}
    columns = (PLAIN, TOGETHER, REGROUPED, IDEAL)
    cells = [str(size)]
    cells += [f"{1000 * statistics.median(seconds[name]):.3f}" for name in columns]
    for name in (IDEAL, TOGETHER, PLAIN):
        ratios = [a / b for a, b in zip(seconds[name], seconds[REGROUPED], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    cells += [_rows(arms[name][-1].rows) for name in (TOGETHER, REGROUPED)]
    return f"| {' | '.join(cells)} |"


def loaded_table(found: Sequence[Loaded]) -> str:
    """What the clients saw, by rate and arm."""
    return "\n".join([LOADED, *map(loaded_row, found)])


def loaded_row(one: Loaded) -> str:
    """One arm at one rate, as a row of the table."""
    seen = one.seen
    cells = [
        f"{one.rate:.0f}",
        NAMES[one.arm],
        f"{seen.answers_per_second:.0f}",
        f"{1000 * seen.p50:.1f}",
        f"{1000 * seen.p99:.1f}",
        f"{100 * seen.rejected / max(1, seen.requests):.1f} %"
        + (f", {seen.failed} failed" if seen.failed else ""),
        "-" if seen.accuracy is None else f"{100 * seen.accuracy:.2f} %",
        f"{1000 * one.model_seconds:.3f}",
        f"{1000 * one.other_seconds:.3f}",
        _rows(one.rows),
        f"{1000 * seen.late_p99:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _rows(means: Sequence[float]) -> str:
    return " / ".join(f"{mean:.1f}" for mean in means)


def to_json(one: Loaded | Saturated) -> dict[str, Any]:
    """The fields, with null for a latency that there is not."""
    return dataclasses.asdict(
        one,
        dict_factory=lambda fields: {
            name: None if value != value else value for name, value in fields
        },
    )
