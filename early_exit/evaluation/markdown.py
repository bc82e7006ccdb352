"""The report in words and tables: Markdown for report.md and the page, and the text on the screen.

The page places its figures by the sections' ids, so headings can be reworded freely.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from early_exit.evaluation.report import Choice, Cuts, MeanStd, Report
from early_exit.evaluation.seconds import (
    latency_text,
    network_table,
    runtime_table,
    segment_table,
    timing_notes,
    timing_table,
)
from early_exit.evaluation.tables import (
    calibration_table,
    candidate_table,
    class_table,
    escaped,
    exit_table,
    guarantee_text,
    operations_text,
    overthinking_text,
)
from early_exit.evaluation.verdict import is_loss
from early_exit.system.text import in_a_line

MAX_NAMES = 10  # of files; all are in report.json


@dataclass(frozen=True)
class Section:
    """A section of the report. The summary has no heading."""

    id: str
    heading: str
    body: str
    """Markdown."""


def headline(report: Report) -> str:
    """The outcome in one sentence."""
    accuracy = f"{100 * report.test.accuracy:.2f} %"
    if len(report.exits) == 1:
        return f"{accuracy} on test: a plain network without early exits, nothing to choose"
    lost = report.final_accuracy - report.test.accuracy
    top5 = "" if report.top5 is None else f" (top-5 {100 * report.top5:.2f} %)"
    return (
        f"{accuracy}{top5} on test at {100 * report.test.macs_share:.1f} % of the plain network's"
        f" MACs; with no exit taken {100 * report.final_accuracy:.2f} %"
        f" ({f'{100 * lost:.2f} points lost' if is_loss(lost) else 'no loss'}), random exits"
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


def title(report: Report) -> str:
    """The title of the page, with the runtime unless it is torch, and the rounding of weights."""
    run, runtime = report.run, report.environment.runtime
    where = "" if runtime == "torch" else f", in {runtime}"
    if run.rounded_to:
        where += f", weights rounded to {run.rounded_to}"
    return in_a_line(f"{run.arch} on {run.dataset}, {run.regime}: {report.choice.goal}{where}")


def sections(report: Report) -> list[Section]:
    """The written parts of the page, in order. The first is the summary, the last says how the
    report was made."""
    return [
        Section("summary", "", _summary(report)),
        *_runtime_sections(report),
        *_choice_sections(report),
        *_measured_sections(report),
        Section(
            "calibration",
            "Calibration",
            f"{calibration_table(report)}\n\n"
            "*ECE*: the expected calibration error, the mean distance between confidence and"
            " accuracy in 15 bins, on test, without and with the temperature, which was fitted on"
            " val, but not below what keeps the surest images apart in float32. *AUROC*: how often"
            " an image that is wrong here and right at the final exit has a lower score than"
            " another image; 0.5 is chance. Thresholds depend on this ranking,"
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
            *(f"**{escaped(verdict.words)}**" for verdict in report.verdicts),
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


def _runtime_sections(report: Report) -> list[Section]:
    if not report.runtimes:
        return []
    given = is_given(report.choice, cdl=report.cdl is not None)
    policy = "the policy applied" if given else "the policy chosen on val"
    timed = ". Nothing was timed."
    if report.timing:
        timed = (
            ", and the plain network and inference with exits timed in turns. Times are means per"
            " batch."
        )
    body = (
        f"{runtime_table(report.runtimes)}\n\nThis report is of {report.environment.ran_in}. In"
        f" each runtime every exit was recorded, {policy}{timed}"
    )
    return [Section("runtimes", "Runtimes", body)]


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
        words = cuts_text(report.cuts, report.environment.ran_in)
        found.append(Section("cuts", "Mean over several cuts of the test set", words))
    return found


def cuts_text(cuts: Cuts, ran_in: str) -> str:
    """Means and deviations over several cuts. ran_in: runtime and precision."""
    text = (
        f"Over {cuts.count} cuts of the test set into val and test: {_percent(cuts.accuracy)} % at"
        f" {_percent(cuts.macs_share)} % of the MACs, the final exit"
        f" {_percent(cuts.final_accuracy)} %"
    )
    if cuts.lost:
        text += f"; on the same images the policy loses {_percent(cuts.lost)} points"
    if cuts.speedup:
        text += (
            f"; from the segments' times in {ran_in}, {cuts.speedup.mean:.2f} ±"
            f" {cuts.speedup.std:.2f} times as fast as the plain network"
        )
    return (
        f"{text} (mean and standard deviation over which half was drawn; the halves share images,"
        " so it is not a standard error)."
    )


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
        parts = [timing_table(report), timing_notes(report)]
        if any(timing.networks for timing in report.timing):
            parts += [
                network_table(report),
                "Static networks are timed in the same runtime, in turns with the plain network."
                " Their accuracies are those that their sources state, in float32.",
            ]
        found.append(
            Section("seconds", "Measured time", "\n\n".join([*parts, segment_table(report)]))
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
            f"- device: {environment.device}; runtime {environment.runtime}, precision"
            f" {environment.precision}",
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


def is_given(choice: Choice, *, cdl: bool) -> bool:
    """Whether the user gave the policy or its thresholds, and nothing chose among exits. cdl: as
    for `provenance`."""
    return choice.policy_given or (choice.thresholds_given and not cdl)


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
        sentence = (
            "The policy was given, so nothing was fitted here; which images it was chosen on is not"
            " known."
        )
    elif fitted:
        sentence = f"{' and '.join(fitted).capitalize()} were fitted on {where}."
    else:
        sentence = f"Nothing was fitted on {where}."
    return f"{sentence} Test ({choice.test_images:,} images) is only reported."


def summary(report: Report, directory: Path) -> str:
    """What the screen shows at the end of an evaluation."""
    parts = [
        *(verdict.words for verdict in report.verdicts),
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
        parts.append(cuts_text(report.cuts, report.environment.ran_in))
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


def code(text: str) -> str:
    """A text as code in Markdown, in one line, also if there are backticks in it."""
    line = in_a_line(text)
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", line))))
    return f"{fence} {line} {fence}"


def _percent(value: MeanStd) -> str:
    return f"{100 * value.mean:.2f} ± {100 * value.std:.2f}"
