"""The report in words and tables, in Markdown."""

import re

from early_exit.energy import PICOJOULES
from early_exit.report import ClassRow, MeanStd, Report

CLASSES_SHOWN = 12  # on the page; where there are more, the cheapest and the dearest half of them


def table(report: Report) -> str:
    """The main table, for the screen and for the page."""
    five = report.top5 is not None
    lines = [
        f"| exit | MACs | alone, test |{' its top 5 |' if five else ''} leave here | right of those"
        " | threshold | temperature |",
        f"| --- | ---: | ---: |{' ---: |' if five else ''} ---: | ---: | ---: | ---: |",
    ]
    for row in report.exits:
        macs = f"{100 * row.macs_share:.1f} %" if row.on else "-"  # its own head was not counted
        top5 = "" if not five else " - |" if row.top5 is None else f" {100 * row.top5:.2f} % |"
        right = "-" if row.taken_accuracy is None else f"{100 * row.taken_accuracy:.2f} %"
        limit = "-" if row.threshold is None else f"{row.threshold:.4f}"
        name = row.name if row.on else f"{row.name} (off)"
        lines.append(
            f"| {name} | {macs} | {100 * row.accuracy:.2f} % |{top5} {100 * row.taken:.1f} % |"
            f" {right} | {limit} | {row.temperature:.2f} |"
        )
    return "\n".join(lines)


def headline(report: Report) -> str:
    """The outcome in one sentence."""
    if len(report.exits) == 1:
        return (
            f"{100 * report.test.accuracy:.2f} % on test by a plain network without early exits, so"
            " there was nothing to choose"
        )
    lost = 100 * (report.final_accuracy - report.test.accuracy)
    five = "" if report.top5 is None else f" (top 5 {100 * report.top5:.2f} %)"
    return (
        f"{100 * report.test.accuracy:.2f} %{five} on test at"
        f" {100 * report.test.macs_share:.1f} % of the"
        f" plain network's MACs; its final exit alone {100 * report.final_accuracy:.2f} %"
        f" ({'no loss' if lost <= 0 else f'{lost:.2f} points are lost'}),"
        f" exits taken at random {100 * report.random_accuracy:.2f} %"
    )


def guaranteed(report: Report) -> str:
    """The guarantee, what it gave on test, and its price, in a few sentences."""
    kept = report.guarantee
    price = 100 * (report.test.macs_share - kept.plain.macs_share)
    return (
        f"Guaranteed: {kept.words}. On test that happened to {100 * kept.lost:.2f} %. Thresholds"
        " chosen for as many points given up on val, without a guarantee, would have given"
        f" {100 * kept.plain.accuracy:.2f} % at {100 * kept.plain.macs_share:.1f} % of the MACs and"
        f" lost {100 * kept.plain_lost:.2f} %: the guarantee costs {price:.1f} points of MACs."
    )


def within_latency(report: Report) -> str:
    """What a budget of seconds allowed, and what came of it, in a few sentences."""
    wanted = report.latency
    text = (
        f"Allowed: {_ms(wanted.budget)} ms for a batch of {wanted.batch_size}, the plain network"
        f" taking {_ms(wanted.plain)} ms. From the stages' times and the shares that reach them"
        f" {_ms(wanted.val)} ms are expected on val and {_ms(wanted.test)} ms on test"
    )
    for timing in report.timing:
        if timing.batch_size == wanted.batch_size:
            text += (
                f"; measured with exits taken: {_ms(timing.live.total / timing.batches)} ms a batch"
                f" on average, the plain network {_ms(timing.plain.total / timing.batches)} ms"
            )
    return text + "."


def candidate_table(report: Report) -> str:
    """What Conditional Deep Learning asked of every stage, on val."""
    lines = [
        "| stage | reached | stopped | saved | its classifier | gain | admitted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for stage in report.cdl:
        parts = [stage.saved, stage.spent, stage.gain]
        saved, spent, gain = (f"{100 * macs / report.plain_macs:.2f} %" for macs in parts)
        lines.append(
            f"| {stage.name} | {100 * stage.reached:.1f} % | {100 * stage.stopped:.1f} % | {saved}"
            f" | {spent} | {gain} | {'yes' if stage.admitted else 'no'} |"
        )
    return "\n".join(lines)


def operations(report: Report) -> str:
    """Operations and energy an image, in a few sentences."""
    mean = report.test.macs_share * report.plain_macs
    words = "; ".join(f"{name} {value:g} pJ" for name, value in PICOJOULES.items())
    energies = ", ".join(
        f"with weights from {energy.weights} {energy.test / 1e6:.2f} instead of"
        f" {energy.plain / 1e6:.2f} microjoules ({energy.plain / energy.test:.2f} times less)"
        for energy in report.energy
    )
    return (
        f"An image of test takes {mean / 1e6:.3f} M multiply-adds on average, the plain network"
        f" {report.plain_macs / 1e6:.3f} M: {1 / report.test.macs_share:.2f} times fewer. Estimated"
        f" energy: {energies}. An estimate for a chip of 45 nm ({words}; Horowitz, ISSCC 2014) that"
        " reads every weight once an image, and moves every layer's input and output once through"
        " SRAM; not a measurement."
    )


def shown_classes(report: Report) -> list[ClassRow | None]:
    """The classes, the cheapest first; of many those at both ends, with None between."""
    rows = sorted(report.classes, key=lambda row: row.macs_share)
    half = CLASSES_SHOWN // 2
    return rows if len(rows) <= CLASSES_SHOWN else [*rows[:half], None, *rows[-half:]]


def class_table(report: Report) -> str:
    """What the classes cost, the cheapest first."""
    lines = ["| class | images | right | MACs |", "| --- | ---: | ---: | ---: |"]
    for row in shown_classes(report):
        lines.append(
            "| ... | | | |" if row is None else
            f"| {as_plain(row.name)} | {row.images} | {100 * row.accuracy:.1f} %"
            f" | {100 * row.macs_share:.1f} % |"
        )
    return "\n".join(lines)


def overthought(report: Report) -> str:
    """How much of the network was for nothing, or worse, in a few sentences."""
    found = report.overthinking
    text = (
        f"{100 * found.wasteful:.1f} % of test are right at an early exit and at the end: the rest"
        f" was for nothing. {100 * found.destructive:.2f} % are right at an early exit and wrong at"
        f" the end, which is {100 * found.destructive / max(found.wrong, 1e-12):.0f} % of all that"
        " the final exit gets wrong."
    )
    if found.confusion_auroc is not None:
        text += (
            " Confusion (how far the early exits are from the final one, in deviations of val) is"
            f" {found.confusion_right:.2f} on average where the final exit is right and"
            f" {found.confusion_wrong:.2f} where it is wrong. Of two such images it tells the wrong"
            f" one {100 * found.confusion_auroc:.1f} % of the time; the final exit's own doubt"
            f" {100 * found.doubt_auroc:.1f} %."
        )
    return text


def calibration_table(report: Report) -> str:
    """How honest each exit's confidence is, and how well its score chooses."""
    lines = [
        "| exit | temperature | calibration error without / with | ranks whom going on helps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in report.exits:
        ranks = "-" if row.gain_auroc is None else f"{row.gain_auroc:.3f}"
        lines.append(
            f"| {row.name} | {row.temperature:.2f} | {100 * row.ece_before:.2f} /"
            f" {100 * row.ece_after:.2f} % | {ranks} |"
        )
    return "\n".join(lines)


def timing_table(report: Report) -> str:
    """Seconds, beside the plain network of the same run."""
    lines = [
        "| batch | images | plain p50 / p95 | with exits p50 / p95 | speed-up | promise kept"
        " | nobody leaves | heads left out |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for timing in report.timing:
        plain, live = timing.plain, timing.live
        lines.append(
            f"| {timing.batch_size} | {timing.images} | {_ms(plain.p50)} / {_ms(plain.p95)} ms"
            f" | {_ms(live.p50)} / {_ms(live.p95)} ms | {timing.speedup:.2f} x"
            f" | {100 * timing.kept:.0f} % | {100 * timing.overhead:+.1f} %"
            f" | ({timing.trunk_speedup:.2f} x) |"
        )
    return "\n".join(lines)


def stage_table(report: Report) -> str:
    """Where the MACs are and where the seconds go, a stage a column."""
    names = [row.name for row in report.exits]
    totals = [row.macs for row in report.exits]
    macs = [now - before for now, before in zip(totals, [0, *totals[:-1]], strict=True)]
    rows = [("MACs", [value / totals[-1] for value in macs])]
    rows += [
        (f"seconds, batch {timing.batch_size}", list(timing.stage_shares))
        for timing in report.timing
    ]
    lines = [
        "| share of the stage that ends at | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, shares in rows:
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def title(report: Report) -> str:
    """What the page is called."""
    return f"{report.arch} on {report.dataset}, {report.regime}: {report.chosen_by}"


def sections(report: Report) -> dict[str, str]:
    """The written parts of the page, in Markdown, by their titles; the first one has none."""
    parts = {
        "": "\n\n".join([
            headline(report) + ".",
            table(report),
            "MACs are those of everything that ran up to the exit, heads included, as a share of"
            f" the plain network's {report.plain_macs / 1e6:.2f} M. *Alone*: if every test image"
            f" left there. {_provenance(report)}",
            f"On val the same policy gives {100 * report.val.accuracy:.2f} % at"
            f" {100 * report.val.macs_share:.1f} %.",
        ])
    }
    if report.cdl is not None:
        parts["Conditional Deep Learning: admitted stages"] = (
            f"{candidate_table(report)}\n\n"
            "On val, in the order of asking; shares of all images, and MACs an image on average as"
            " shares of the plain network's. *Saved*: what those it stops are spared; *gain*: less"
            " its own cost for all that reach it."
        )
    if report.guarantee:
        parts["Guarantee"] = guaranteed(report)
    if report.latency:
        parts["Latency"] = within_latency(report)
    if report.cuts:
        cuts = report.cuts
        parts["Over several cuts"] = (
            f"Over {cuts.count} cuts of the test set into val and test: {_percent(cuts.accuracy)} %"
            f" at {_percent(cuts.macs_share)} % of the MACs, the final exit"
            f" {_percent(cuts.final_accuracy)} % (mean and standard deviation)."
        )
    if report.live:
        live = report.live
        parts["Exits taken"] = (
            f"Live inference answered {live.images:,} test images at batch {live.batch_size} with"
            f" {100 * live.accuracy:.2f} % right"
            + ("" if live.top5 is None else f" (top 5 {100 * live.top5:.2f} %)")
            + f". {live.differing} of them took another exit or"
            " got another answer than on the record of all exits,"
            f" {live.differing_beyond_rounding} of these with a score further than 1e-5 from its"
            " threshold."
        )
    if report.timing:
        parts["Seconds"] = (
            f"{timing_table(report)}\n\n"
            "Times are per batch. *Promise kept*: the sum of each stage's own time at the number of"
            " rows it really had, over the time measured; deciding and dropping rows is the rest."
            " *Nobody leaves*: what the exits cost on top of the plain network if they never fire."
            " *Heads left out*: the speed-up that would be claimed if heads, decisions and the"
            f" dropping of rows were not timed.\n\n{stage_table(report)}"
        )
    return parts | {
        "How far the exits can be believed": (
            f"{calibration_table(report)}\n\n"
            "*Calibration error*: mean distance between confidence and accuracy in 15 bins (ECE),"
            " on test; temperatures come from val. *Ranks*: of an image that is wrong here and"
            " right at the end, and another one, how often the former has the lower score (AUROC);"
            " 0.5 is chance. Thresholds live on that, and one temperature hardly changes it."
        ),
        "Operations and energy": f"{operations(report)}\n\n{class_table(report)}",
        "Overthinking": (
            f"{overthought(report)}\n\nAll exits on, each on its own (Kaya et al., ICML 2019)."
        ),
        "How this was made": "\n".join([
            f"- run: `{report.run}`, {report.weights}",
            f"- criterion: {report.criterion},"
            f" {'with' if report.calibrated else 'without'} temperature scaling",
            f"- device: {report.device}; precision {report.precision}",
            "- " + ", ".join(f"{name} {value}" for name, value in report.versions.items()),
            f"- command: `{report.command}`",
        ]),
    }


def to_markdown(report: Report, images: dict[str, str]) -> str:
    """The page. images: caption by file name, shown before the last part, in that order."""
    parts = [f"# {title(report)}"]
    *bodies, last = (
        f"## {heading}\n\n{body}" if heading else body
        for heading, body in sections(report).items()
    )
    parts += bodies
    parts += [f"## {caption}\n\n![{caption}]({name})" for name, caption in images.items()]
    return "\n\n".join([*parts, last]) + "\n"


def _provenance(report: Report) -> str:
    return provenance(
        plain=len(report.exits) == 1,
        thresholds_given=report.thresholds_given,
        calibrated=report.calibrated,
        policy_given=report.policy_given,
        cdl=report.cdl is not None,
        val_images=report.val_images,
        val_from=report.val_from,
        test_images=report.test_images,
    )


def provenance(
    *, plain: bool, thresholds_given: bool, calibrated: bool, policy_given: bool, cdl: bool,
    val_images: int, val_from: str, test_images: int,
) -> str:
    """What was fitted on val."""
    fitted = [
        *(() if plain or thresholds_given else ("thresholds",)),
        *(("temperatures",) if calibrated else ()),
        *(("the stages that are on",) if cdl else ()),
    ]
    where = f"{val_images:,} images of val ({val_from})"
    sentence = (
        f"{' and '.join(fitted).capitalize()} were fitted on {where};"
        if fitted
        else f"Nothing was fitted on {where};"
    )
    if policy_given:
        sentence = "The policy was given, and nothing of it was fitted here;"
    return f"{sentence} test ({test_images:,} images) was only reported."


def as_plain(name: str) -> str:
    """A name in Markdown, where some characters would mean something."""
    return re.sub(r"([\\`*_\[\]|<])", r"\\\1", name)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _percent(spread: MeanStd) -> str:
    return f"{100 * spread.mean:.2f} ± {100 * spread.std:.2f}"
