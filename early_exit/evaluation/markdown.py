"""The report in words and tables: Markdown for report.md and the page, and the text on the screen.

The page places its figures by the sections' ids, so headings can be reworded freely.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from early_exit.evaluation.report import (
    Choice,
    ClassRow,
    GuaranteeResult,
    LatencyResult,
    MeanStd,
    Report,
)
from early_exit.model.energy import PICOJOULES
from early_exit.system.text import in_a_line

MAX_NAMES = 10  # of files; all are in report.json
MAX_CLASSES = 12  # shown; of more, the cheapest and the most expensive half of them


@dataclass(frozen=True)
class Section:
    """A section of the report. The summary has no heading."""

    id: str
    heading: str
    body: str
    """Markdown."""


def exit_table(report: Report) -> str:
    """One row per exit, for the screen and for the page."""
    top5 = report.top5 is not None
    lines = [
        f"| exit | MACs | accuracy of this exit |{' top-5 |' if top5 else ''} images that exit here"
        " | accuracy on them | threshold | temperature |",
        f"| --- | ---: | ---: |{' ---: |' if top5 else ''} ---: | ---: | ---: | ---: |",
    ]
    for row in report.exits:
        macs = f"{100 * row.macs_share:.1f} %" if row.enabled else "-"  # its head is not counted
        own_top5 = f" {_or_dash(row.top5)} |" if top5 else ""
        threshold = "-" if row.threshold is None else f"{row.threshold:.4f}"
        name = row.name if row.enabled else f"{row.name} (disabled)"
        lines.append(
            f"| {name} | {macs} | {100 * row.accuracy:.2f} % |{own_top5} {100 * row.exited:.1f} %"
            f" | {_or_dash(row.exited_accuracy)} | {threshold} | {row.temperature:.2f} |"
        )
    return "\n".join(lines)


def headline(report: Report) -> str:
    """The outcome in one sentence."""
    accuracy = f"{100 * report.test.accuracy:.2f} %"
    if len(report.exits) == 1:
        return f"{accuracy} on test: a plain network without early exits, nothing to choose"
    lost = 100 * (report.final_accuracy - report.test.accuracy)
    top5 = "" if report.top5 is None else f" (top-5 {100 * report.top5:.2f} %)"
    return (
        f"{accuracy}{top5} on test at {100 * report.test.macs_share:.1f} % of the plain network's"
        f" MACs; the final exit alone reaches {100 * report.final_accuracy:.2f} %"
        f" ({'no loss' if lost <= 0 else f'{lost:.2f} points lost'}), random exits"
        f" {100 * report.random_accuracy:.2f} %"
    )


def cautions(unfinished: str | None, left_out: Sequence[str]) -> list[str]:
    """What a reader must know before the numbers, in paragraphs.

    unfinished: how far the run was trained, if not to its end; left_out: the files without which
    val and test were used.
    """
    found = []
    if unfinished:
        found.append(f"**This run is not finished**: its weights are those of {unfinished}.")
    if left_out:
        count, names = len(left_out), ", ".join(map(escaped, left_out[:MAX_NAMES]))
        more = f" and {count - MAX_NAMES} more" if count > MAX_NAMES else ""
        found.append(
            f"**{count} {'image is' if count == 1 else 'images are'} left out** of val and test,"
            f" because the files are unreadable or gone: {names}{more}."
        )
    return found


def guarantee_text(report: Report, result: GuaranteeResult) -> str:
    """The guarantee, what was observed on test, and what it costs."""
    extra = 100 * (report.test.macs_share - result.unguaranteed.macs_share)
    return (
        f"Guaranteed: {result.words}. Observed on test: {100 * result.lost:.2f} %. Thresholds"
        " chosen for the same drop on val, without a guarantee, give"
        f" {100 * result.unguaranteed.accuracy:.2f} % accuracy at"
        f" {100 * result.unguaranteed.macs_share:.1f} % of the MACs and lose"
        f" {100 * result.unguaranteed_lost:.2f} %: the guarantee costs {extra:.1f} points of MACs."
    )


def latency_text(report: Report, result: LatencyResult) -> str:
    """A latency budget: what was allowed, expected and measured."""
    wanted = "The fewest seconds"
    if result.budget is not None:
        wanted = f"Budget: {_ms(result.budget)} ms"
    text = (
        f"{wanted} for a batch of {result.batch_size}; the plain network takes"
        f" {_ms(result.plain)} ms. Expected from the segments' times and the rows that reach"
        f" them: {_ms(result.val)} ms on val, {_ms(result.test)} ms on test"
    )
    for timing in report.timing:
        if timing.batch_size == result.batch_size:
            text += (
                "; measured with exits taken:"
                f" {_ms(timing.live.total / timing.batches)} ms per batch on average, the plain"
                f" network {_ms(timing.plain.total / timing.batches)} ms"
            )
    return text + "."


def candidate_table(report: Report) -> str:
    """The stages that Conditional Deep Learning considered, on val."""
    lines = [
        "| stage | images that reach it | images that exit | MACs saved | MACs of its head | gain"
        " | admitted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for stage in report.cdl or ():
        saved, spent, gain = (
            f"{100 * macs / report.plain_macs:.2f} %"
            for macs in (stage.saved, stage.spent, stage.gain)
        )
        lines.append(
            f"| {stage.name} | {100 * stage.reached:.1f} % | {100 * stage.stopped:.1f} % | {saved}"
            f" | {spent} | {gain} | {'yes' if stage.admitted else 'no'} |"
        )
    return "\n".join(lines)


def operations_text(report: Report) -> str:
    """Multiply-adds and estimated energy per image."""
    mean = report.test.macs_share * report.plain_macs
    prices = "; ".join(f"{name} {value:g} pJ" for name, value in PICOJOULES.items())
    energies = ", ".join(
        f"with weights from {energy.weights} {energy.test / 1e6:.2f} instead of"
        f" {energy.plain / 1e6:.2f} microjoules ({energy.plain / energy.test:.2f} times less)"
        for energy in report.energy
    )
    text = (
        f"A test image takes {mean / 1e6:.3f} M multiply-adds on average, the plain network"
        f" {report.plain_macs / 1e6:.3f} M: {1 / report.test.macs_share:.2f} times fewer."
    )
    if not report.energy:
        return text
    return (
        f"{text} Estimated energy: {energies}. The estimate is for a 45 nm chip ({prices};"
        " Horowitz, ISSCC 2014) that reads every weight once per image and moves the input and"
        " output of every layer once through SRAM; it is not a measurement."
    )


def shown_classes(report: Report) -> list[ClassRow | None]:
    """The classes, the cheapest first; of many, those at both ends with None between."""
    rows = sorted(report.classes, key=lambda row: row.macs_share)
    half = MAX_CLASSES // 2
    return [*rows] if len(rows) <= MAX_CLASSES else [*rows[:half], None, *rows[-half:]]


def class_table(report: Report) -> str:
    """What each class costs, the cheapest first."""
    lines = ["| class | images | accuracy | MACs |", "| --- | ---: | ---: | ---: |"]
    for row in shown_classes(report):
        lines.append(
            "| ... | | | |"
            if row is None
            else f"| {escaped(row.name)} | {row.images} | {100 * row.accuracy:.1f} %"
            f" | {100 * row.macs_share:.1f} % |"
        )
    return "\n".join(lines)


def overthinking_text(report: Report) -> str:
    """How often continuing adds nothing, or does harm."""
    found = report.overthinking
    text = (
        f"{100 * found.wasteful:.1f} % of the test images are correct at an early exit and at"
        f"the final one: continuing adds nothing. {100 * found.destructive:.2f} % are correct at"
        " an early exit"
        " and wrong at the final one, which is"
        f" {100 * found.destructive / max(found.wrong, 1e-12):.0f} % of the final exit's errors."
    )
    if found.confusion_auroc is not None:
        text += (
            " Confusion (the distance of the early exits from the final one, in standard deviations"
            f" on val) is {found.confusion_right:.2f} on average where the final exit is right and"
            f" {found.confusion_wrong:.2f} where it is wrong. As a warning of a wrong final answer"
            f" it has an AUROC of {found.confusion_auroc:.3f}; one minus the final exit's"
            f" confidence has {found.doubt_auroc:.3f}."
        )
    return text


def calibration_table(report: Report) -> str:
    """Each exit's calibration, and how well its score ranks images."""
    lines = [
        '| exit | temperature | ECE before / after | AUROC for "continuing would help" |',
        "| --- | ---: | ---: | ---: |",
    ]
    for row in report.exits:
        ranks = "-" if row.continuing_auroc is None else f"{row.continuing_auroc:.3f}"
        lines.append(
            f"| {row.name} | {row.temperature:.2f} | {100 * row.ece_before:.2f} /"
            f" {100 * row.ece_after:.2f} % | {ranks} |"
        )
    return "\n".join(lines)


def timing_table(report: Report) -> str:
    """Seconds, beside the plain network in the same run."""
    lines = [
        "| batch size | images | plain network, p50 / p95 | with exits, p50 / p95 | speed-up"
        " | fraction of ideal | overhead when no exit is taken | speed-up without heads |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for timing in report.timing:
        plain, live = timing.plain, timing.live
        lines.append(
            f"| {timing.batch_size} | {timing.images} | {_ms(plain.p50)} / {_ms(plain.p95)} ms"
            f" | {_ms(live.p50)} / {_ms(live.p95)} ms | {timing.speedup:.2f} x"
            f" | {100 * timing.fraction_of_ideal:.0f} % | {100 * timing.overhead:+.1f} %"
            f" | {_times(timing.speedup_without_heads)} |"
        )
    return "\n".join(lines)


def stage_table(report: Report) -> str:
    """The stages' shares of MACs and seconds, one stage per column."""
    names = [row.name for row in report.exits]
    totals = [row.macs for row in report.exits]
    macs = [now - before for now, before in zip(totals, [0, *totals[:-1]], strict=True)]
    rows = [("MACs", [value / totals[-1] for value in macs])]
    rows += [
        (f"seconds, batch {timing.batch_size}", list(timing.segment_shares))
        for timing in report.timing
    ]
    lines = [
        "| share of each stage, by the exit it ends at | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, shares in rows:
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def title(report: Report) -> str:
    """The title of the page."""
    run = report.run
    return in_a_line(f"{run.arch} on {run.dataset}, {run.regime}: {report.choice.goal}")


def sections(report: Report) -> list[Section]:
    """The written parts of the page, in order. The first is the summary, the last says how the
    report was made."""
    return [
        Section("summary", "", _summary(report)),
        *_choice_sections(report),
        *_measured_sections(report),
        Section(
            "calibration",
            "Calibration",
            f"{calibration_table(report)}\n\n"
            "*ECE*: the expected calibration error, the mean distance between confidence and"
            " accuracy in 15 bins, on test, without and with the temperature, which was fitted on"
            " val. *AUROC*: how often an image that is wrong here and right at the final exit has a"
            " lower score than another image; 0.5 is chance. Thresholds depend on this ranking,"
            " which a temperature hardly changes.",
        ),
        Section(
            "operations",
            "Operations and energy",
            f"{operations_text(report)}\n\n{class_table(report)}",
        ),
        Section(
            "overthinking",
            "Overthinking",
            f"{overthinking_text(report)}\n\nEvery exit is evaluated on all test images,"
            " whatever the policy (Kaya et al., ICML 2019).",
        ),
        Section("provenance", "How this was made", _how(report)),
    ]


def _summary(report: Report) -> str:
    fitted = provenance(report.choice, plain=len(report.exits) == 1, cdl=report.cdl is not None)
    return "\n\n".join(
        [
            *cautions(report.run.unfinished, report.choice.left_out),
            headline(report) + ".",
            exit_table(report),
            "*MACs*: multiply-adds of everything that runs up to the exit, heads included, as a"
            f" share of the plain network's {report.plain_macs / 1e6:.2f} M. *Accuracy of this"
            f" exit*: if every test image exited there. {fitted}",
            f"On val the same policy reaches {100 * report.val.accuracy:.2f} % at"
            f" {100 * report.val.macs_share:.1f} %.",
        ]
    )


def _choice_sections(report: Report) -> list[Section]:
    found = []
    if report.cdl is not None:
        found.append(
            Section(
                "cdl",
                "Conditional Deep Learning: admitted stages",
                f"{candidate_table(report)}\n\n"
                "On val, from the first stage to the last; shares of all images, and mean MACs per"
                " image as shares of the plain network's. *MACs saved*: what the images that exit"
                " do not compute. *Gain*: that, minus the head's own cost for all that reach it.",
            )
        )
    if report.guarantee:
        found.append(Section("guarantee", "Guarantee", guarantee_text(report, report.guarantee)))
    if report.latency:
        found.append(Section("latency", "Latency", latency_text(report, report.latency)))
    if report.cuts:
        cuts = report.cuts
        found.append(
            Section(
                "cuts",
                "Mean over several cuts of the test set",
                f"Over {cuts.count} cuts of the test set into val and test:"
                f" {_percent(cuts.accuracy)} % at {_percent(cuts.macs_share)} % of the MACs, the"
                f" final exit {_percent(cuts.final_accuracy)} % (mean and standard deviation).",
            )
        )
    return found


def _measured_sections(report: Report) -> list[Section]:
    found = []
    if report.live:
        live = report.live
        top5 = "" if live.top5 is None else f" (top-5 {100 * live.top5:.2f} %)"
        found.append(
            Section(
                "live",
                "Inference with exits taken",
                f"Live inference on {live.images:,} test images at batch size {live.batch_size}:"
                f" {100 * live.accuracy:.2f} % correct{top5}. {live.differing} of them took another"
                " exit or got another answer than on the record of all exits;"
                f" {live.differing_beyond_rounding} of these have no score within rounding"
                f" ({live.rounding:.1g}) of its threshold.",
            )
        )
    if report.timing:
        found.append(
            Section(
                "seconds",
                "Measured time",
                f"{timing_table(report)}\n\n"
                "Times are per batch. *Fraction of ideal*: the sum of the segments' own times, each"
                " at the number of rows that reached it, over the measured time; comparing scores"
                " and selecting rows are the rest. *Speed-up without heads*: what would be reported"
                " if heads, decisions and the selection of rows were not timed, as some papers time"
                f" it.\n\n{stage_table(report)}",
            )
        )
    return found


def _how(report: Report) -> str:
    run, choice, environment = report.run, report.choice, report.environment
    temperatures = "with" if choice.calibrated else "without"
    versions = ", ".join(f"{name} {value}" for name, value in environment.versions.items())
    return "\n".join(
        [
            f"- run: {code(run.name)}, {run.weights}",
            f"- criterion: {choice.criterion}, {temperatures} temperature scaling",
            f"- device: {environment.device}; precision {environment.precision}",
            f"- {versions}",
            f"- command: {code(environment.command)}",
        ]
    )


def to_markdown(report: Report, pictures: dict[str, str]) -> str:
    """report.md. pictures: caption by file name, shown before the last section, in that order."""
    *first, last = [
        f"## {section.heading}\n\n{section.body}" if section.heading else section.body
        for section in sections(report)
    ]
    shown = [f"## {caption}\n\n![{caption}]({name})" for name, caption in pictures.items()]
    return "\n\n".join([f"# {title(report)}", *first, *shown, last]) + "\n"


def provenance(choice: Choice, *, plain: bool, cdl: bool) -> str:
    """What was fitted on val, in one sentence. plain: whether there are no early exits; cdl:
    whether the enabled exits were chosen by Conditional Deep Learning."""
    fitted = []
    if not plain and not choice.thresholds_given:
        fitted.append("thresholds")
    if choice.calibrated:
        fitted.append("temperatures")
    if cdl:
        fitted.append("the enabled stages")
    where = f"{choice.val_images:,} val images ({choice.val_from})"
    if choice.policy_given:
        sentence = "The policy was given; nothing was fitted here."
    elif fitted:
        sentence = f"{' and '.join(fitted).capitalize()} were fitted on {where}."
    else:
        sentence = f"Nothing was fitted on {where}."
    return f"{sentence} Test ({choice.test_images:,} images) is only reported."


def summary(report: Report, directory: Path) -> str:
    """What the screen shows at the end of an evaluation."""
    parts = [
        exit_table(report),
        *cautions(report.run.unfinished, report.choice.left_out),
        headline(report),
    ]
    if report.cdl is not None:
        parts += [candidate_table(report), operations_text(report)]
    if report.guarantee:
        parts.append(guarantee_text(report, report.guarantee))
    if report.latency:
        parts.append(latency_text(report, report.latency))
    if report.cuts:
        cuts = report.cuts
        parts.append(
            f"over {cuts.count} cuts: {_percent(cuts.accuracy)} % at"
            f" {100 * cuts.macs_share.mean:.2f} % of MACs"
        )
    if report.timing:
        parts.append(timing_table(report))
    if report.live:
        parts.append(
            f"live inference on {report.live.images:,} test images:"
            f" {100 * report.live.accuracy:.2f} % correct, {report.live.differing} differ from the"
            " record"
        )
    files = {
        "report": "report.md",
        "numbers": "report.json",
        "policy": "policy.yaml",
        "page to share": "report.html",
    }
    parts.append(
        "\n".join(
            f"{f'{name}:':15}{directory / file}"
            for name, file in files.items()
            if (directory / file).exists()
        )
    )
    return "\n\n".join(parts)


def escaped(name: str) -> str:
    """A name in Markdown, in one line, with the characters escaped that have a meaning there or in
    HTML."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(in_a_line(name), quote=False))


def code(text: str) -> str:
    """A text as code in Markdown, in one line, also if there are backticks in it."""
    line = in_a_line(text)
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", line))))
    return f"{fence} {line} {fence}"


def _or_dash(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else f"({speedup:.2f} x)"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _percent(value: MeanStd) -> str:
    return f"{100 * value.mean:.2f} ± {100 * value.std:.2f}"
