"""The tables and sentences of a report about seconds, each with runtime and precision, in Markdown.

Seconds are judged in the runtime in which they are spent, so none is shown without it.
"""

import re
from collections.abc import Sequence

from early_exit.evaluation.report import Report
from early_exit.evaluation.report_seconds import LatencyResult, RuntimeRow, RuntimeSeconds, Verdict
from early_exit.evaluation.tables import escaped
from early_exit.evaluation.verdict import short, speedup_range
from early_exit.inference.latency import BatchSeconds, Timing


def timing_table(report: Report) -> str:
    """Inference with exits taken beside the plain network, measured in turns, below a line that
    names the runtime."""
    bodies = any(timing.without_heads for timing in report.timing)  # measured in eager torch alone
    headings = [
        "batch size",
        "images",
        "plain network, p50 / p95",
        "with exits, p50 / p95",
        "speed-up (range)",
        "fraction of ideal",
        "overhead when no exit is taken",
        *(["speed-up without heads"] if bodies else []),
    ]
    lines = [f"Time per batch in {report.environment.ran_in}:", ""]
    lines += [_line(headings), _line(["---:"] * len(headings))]
    for timing in report.timing:
        cells = [
            str(timing.batch_size),
            str(timing.images),
            _percentiles(timing.plain),
            _percentiles(timing.live),
            _speedup(timing.speedup, speedup_range(timing)),
            f"{100 * timing.fraction_of_ideal:.0f} %",
            f"{100 * timing.overhead:+.1f} %",
        ]
        if bodies:
            without = timing.speedup_without_heads
            cells.append("-" if without is None else f"({without:.2f} x)")
        lines.append(_line(cells))
    return "\n".join(lines)


def timing_notes(report: Report) -> str:
    """What the columns of `timing_table` mean."""
    notes = (
        "*Range*: over the repeats. *Fraction of ideal*: the sum of the segments' own times, each"
        " at the number of rows that reached it, over the measured time; comparing scores and"
        " selecting rows are the rest."
    )
    if any(timing.without_heads for timing in report.timing):
        notes += (
            " *Speed-up without heads*: what would be reported if heads, decisions and the"
            " selection of rows were not timed, as some papers time it."
        )
    return notes


def network_table(report: Report) -> str:
    """The static networks beside the plain one and the policy, in the same runtime, in turns."""
    lines = [
        f"| network, in {report.environment.ran_in} | batch size | accuracy | p50 / p95"
        " | share of the plain network's time |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    accuracies = {row.name: row.accuracy for row in report.static_networks}
    for timing in report.timing:
        found = [("plain network", report.exits[-1].accuracy, timing.plain)]
        if report.early_exits:
            found.append(("with exits", report.test.accuracy, timing.live))
        found += [
            (escaped(name), accuracies[name], took)
            for name, took in timing.networks.items()
            if name in accuracies
        ]
        lines += [_network_line(name, timing, accuracy, took) for name, accuracy, took in found]
    return "\n".join(lines)


def _network_line(name: str, timing: Timing, accuracy: float, took: BatchSeconds) -> str:
    share = 100 * took.total / timing.plain.total
    return _line(
        [
            name,
            str(timing.batch_size),
            f"{100 * accuracy:.2f} %",
            _percentiles(took),
            f"{share:.1f} %",
        ]
    )


def segment_table(report: Report) -> str:
    """The segments' shares of MACs and seconds, one segment per column; a disabled exit ends
    none."""
    enabled = [index for index, row in enumerate(report.exits) if row.enabled]
    totals = [report.exits[index].macs for index in enabled]
    macs = [now - before for now, before in zip(totals, [0, *totals[:-1]], strict=True)]
    rows = [("MACs", [value / totals[-1] for value in macs])]
    rows += [
        (
            f"seconds in {report.environment.ran_in}, batch {timing.batch_size}",
            [timing.segment_shares[index] for index in enabled],
        )
        for timing in report.timing
    ]
    names = [report.exits[index].name for index in enabled]
    lines = [
        _line(["share of each segment, by the exit it ends at", *names]),
        _line(["---", *["---:"] * len(names)]),
    ]
    for label, shares in rows:
        lines.append(_line([label, *(f"{100 * share:.1f} %" for share in shares)]))
    return "\n".join(lines)


def latency_text(report: Report, result: LatencyResult) -> str:
    """A goal in seconds: what was allowed, expected and measured."""
    wanted = "the fewest seconds"
    if result.budget is not None:
        wanted = f"a budget of {_ms(result.budget)} ms"
    text = (
        f"In {report.environment.ran_in}, {wanted} for a batch of {result.batch_size}; the plain"
        f" network takes {_ms(result.plain)} ms. Expected from the segments' times and the rows"
        f" that reach them: {_ms(result.val)} ms on val, {_ms(result.test)} ms on test"
    )
    for timing in report.timing:
        if timing.batch_size == result.batch_size:
            text += (
                "; measured with exits taken:"
                f" {_ms(timing.live.total / timing.batches)} ms per batch on average, the plain"
                f" network {_ms(timing.plain.total / timing.batches)} ms"
            )
    return text + "."


def runtime_table(runtimes: Sequence[RuntimeRow]) -> str:
    """The evaluations in several runtimes, one row per runtime and batch size."""
    headings = [
        "runtime",
        "evaluation",
        "accuracy",
        "MACs",
        "batch size",
        "plain network",
        "with exits",
        "speed-up (range)",
        "verdict",
    ]
    lines = [_line(headings), _line(["---", "---", *["---:"] * 6, "---"])]
    for row in runtimes:
        name = f"{row.runtime} ({row.precision})"
        values = [name, _evaluation(row.evaluation)]
        values += [f"{100 * row.accuracy:.2f} %", f"{100 * row.macs_share:.1f} %"]
        verdicts = {verdict.batch_size: verdict for verdict in row.verdicts}
        for found in row.seconds:
            cells = _seconds_cells(found, verdicts.get(found.batch_size))
            lines.append(_line([*values, *cells]))
        if not row.seconds:
            lines.append(_line([*values, *["-"] * 5]))
    return "\n".join(lines)


def _evaluation(name: str) -> str:
    """The name of an evaluation, as it is given to --eval unless it has odd characters."""
    return f"`{name}`" if re.fullmatch(r"[\w.-]+", name) else escaped(name)


def _seconds_cells(found: RuntimeSeconds, verdict: Verdict | None) -> list[str]:
    return [
        str(found.batch_size),
        f"{_ms(found.plain)} ms",
        f"{_ms(found.live)} ms",
        _speedup(found.speedup, found.speedup_range),
        escaped(short(verdict)) if verdict else "-",
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _speedup(mean: float, spread: tuple[float, float]) -> str:
    low, high = spread
    return f"{mean:.2f} x ({low:.2f} to {high:.2f})"


def _percentiles(seconds: BatchSeconds) -> str:
    return f"{_ms(seconds.p50)} / {_ms(seconds.p95)} ms"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
