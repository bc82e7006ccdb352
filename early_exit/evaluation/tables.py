"""The tables and paragraphs of a report, in Markdown, but for those about seconds."""

import html
import re

from early_exit.evaluation.report import ClassRow, GuaranteeResult, Report
from early_exit.model.energy import PICOJOULES
from early_exit.system.text import in_a_line

MAX_CLASSES = 12  # shown; of more, the cheapest and the most expensive half of them


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


def guarantee_text(report: Report, result: GuaranteeResult) -> str:
    """The guarantee, what was observed on test, and what it costs."""
    extra = 100 * (report.test.macs_share - result.unguaranteed.macs_share)
    costs = f"costs {extra:.1f}" if extra >= 0 else f"saves {-extra:.1f}"
    return (
        f"Guaranteed: {result.words}. Observed on test: {100 * result.lost:.2f} %. Thresholds"
        " chosen for the same drop on val, without a guarantee, give"
        f" {100 * result.unguaranteed.accuracy:.2f} % accuracy at"
        f" {100 * result.unguaranteed.macs_share:.1f} % of the MACs and lose"
        f" {100 * result.unguaranteed_lost:.2f} %: the guarantee {costs} points of MACs."
    )


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
        f" {energy.plain / 1e6:.2f} microjoules ({100 * energy.test / energy.plain:.1f} %)"
        for energy in report.energy
    )
    text = (
        f"A test image takes {mean / 1e6:.3f} M multiply-adds on average, the plain network"
        f" {report.plain_macs / 1e6:.3f} M: {100 * report.test.macs_share:.1f} %."
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
        f" the final one: continuing adds nothing. {100 * found.destructive:.2f} % are correct at"
        " an early exit"
        " and wrong at the final one, which is"
        f" {100 * found.destructive / max(found.wrong, 1e-12):.0f} % of the final exit's errors."
    )
    if found.confusion_auroc is not None and report.early_exits:
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


def escaped(name: str) -> str:
    """A name in Markdown, in one line, with the characters escaped that have a meaning there or in
    HTML."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(in_a_line(name), quote=False))


def _or_dash(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
