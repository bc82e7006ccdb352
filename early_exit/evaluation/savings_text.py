"""What exits save over static networks, and the points of the literature, in Markdown."""

import math
from collections.abc import Sequence

from early_exit.evaluation.groups import Group
from early_exit.evaluation.literature import LiteraturePoint
from early_exit.evaluation.panels import Panel
from early_exit.evaluation.savings import ExitPoint, Saving, macs_savings, seconds_savings
from early_exit.evaluation.statics import LISTED, PUBLIC, Static
from early_exit.evaluation.tables import escaped
from early_exit.system.text import in_a_line

Comparatives = tuple[str, str]
"""Less and more of a cost, in words."""
MACS: Comparatives = ("fewer multiply-adds", "more multiply-adds")
TIME: Comparatives = ("less time", "more time")


def sections(
    groups: Sequence[Group], statics: Sequence[Static], panels: Sequence[Panel]
) -> list[str]:
    """The tables of what exits save, in multiply-adds and in each panel's seconds, each with what
    follows from it in one sentence; empty if there are no exits or no static network."""
    if not statics or all(group.plain for group in groups):
        return []
    parts = ["## Exits beside static networks"]
    parts += _tables(macs_savings(groups, statics), "MACs, millions", MACS, 1e-6)
    for panel in panels:
        tables = _tables(seconds_savings(panel, statics), f"time per image, {panel.unit}", TIME, 1)
        if tables:
            parts += [f"In {panel.title}:", *tables, *_about_panel(panel)]
    return [*parts, *_notes(groups, statics)]


def _tables(
    savings: Sequence[Saving], heading: str, words: Comparatives, scale: float
) -> list[str]:
    """A table and a sentence for each kind of static network."""
    parts = []
    for kind in dict.fromkeys(saving.static.kind for saving in savings):
        rows = [saving for saving in savings if saving.static.kind == kind]
        parts += [_table(rows, kind, heading, scale), statement(rows, kind, words)]
    return parts


def _table(rows: Sequence[Saving], kind: str, heading: str, scale: float) -> str:
    head = [
        f"static network ({kind})",
        "accuracy",
        heading,
        "exits at no lower accuracy",
        "accuracy",
        heading,
        "saving",
    ]
    lines = [head, ["---", "---:", "---:", "---", "---:", "---:", "---:"]]
    for row in rows:
        name = escaped(row.static.name)
        if row.better:
            name += f" ({escaped(row.better)} is better)"
        cells = [name, _percent(row.static.accuracy), f"{scale * row.cost:.4g}"]
        if row.exits is None or row.saving is None:
            cells += ["-", "-", "-", "not reached"]
        else:
            exits = row.exits
            cells += [escaped(_name(exits)), _percent(exits.accuracy)]
            cells += [f"{scale * exits.cost:.4g}", f"{100 * row.saving:.1f} %"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _name(exits: ExitPoint) -> str:
    """The run, and how its policy was chosen."""
    group = exits.group
    if exits.budget is None:
        return group.label
    return f"{group.name}, budget of {100 * exits.budget / group.first.plain_macs:.1f} % on val"


def statement(rows: Sequence[Saving], kind: str, words: Comparatives) -> str:
    """What the rows of one kind say, over the accuracies that both reach. Networks than which
    another is better do not count."""
    rivals = [row for row in rows if not row.better]
    missed = [in_a_line(row.static.name) for row in rivals if row.exits is None]
    not_reached = f"no policy is as accurate as {' or '.join(missed)}" if missed else ""
    reached = [(row.static.name, row.saving) for row in rivals if row.saving is not None]
    if not reached:
        return f"{not_reached[:1].upper()}{not_reached[1:]}."
    accuracies = [row.static.accuracy for row in rivals if row.saving is not None]
    low, high = min(accuracies), max(accuracies)
    span = "At" if low == high else f"From {_percent(low)} to"
    smallest, (less, more) = min(saving for _, saving in reached), words
    needed = f"at least {100 * smallest:.1f} % {less}"
    if smallest < 0:
        needed = f"up to {-100 * smallest:.1f} % {more}"
    parts = [f"{span} {_percent(high)} accuracy, exits need {needed} than the best of the {kind}"]
    wins = [in_a_line(name) for name, saving in reached if saving < 0]
    if wins:
        parts.append(f"{' and '.join(wins)} {'wins' if len(wins) == 1 else 'win'}")
    return "; ".join([*parts, *([not_reached] if missed else [])]) + "."


def _about_panel(panel: Panel) -> list[str]:
    """Where the seconds come from."""
    text = f"Timed on {'; '.join(map(in_a_line, panel.machines))}."
    if panel.reference is not None:
        text += (
            f" Times are shares of {in_a_line(panel.reference[0])}'s time, measured in turns in the"
            " same process."
        )
    if panel.left_out:
        names = "; ".join(in_a_line(group.label) for group in panel.left_out)
        text += f" Not timed at this batch size: {names}."
    if panel.caution:
        text = f"(!) {panel.caution[0].upper()}{panel.caution[1:]}. {text}"
    return [text]


def _notes(groups: Sequence[Group], statics: Sequence[Static]) -> list[str]:
    text = (
        "Each row has the cheapest policy whose accuracy on test is not lower; nothing is"
        " interpolated. Policies were chosen on val, for a goal or for a budget of multiply-adds,"
        " and only looked up on test; of several networks of one val, only those count that are"
        " more accurate on val than every cheaper one. Heads are counted. Evaluations with several"
        " cuts, and all tables of seconds, count with the evaluated policies alone."
    )
    images = [
        member.test_images
        for group in groups
        if not group.plain
        for member in group.members
        if member.test_images
    ]
    if images:
        variance = max(static.accuracy * (1 - static.accuracy) for static in statics)
        error = math.sqrt(variance / min(images))
        text += (
            f" An accuracy on {min(images):,} images has a standard error of up to"
            f" {100 * error:.2f} points, so smaller differences mean little."
        )
    given = [group.label for group in groups if group.given]
    if given:
        names = "; ".join(map(in_a_line, given))
        text += (
            f" Thresholds or a policy that were given, not chosen on val, do not count: {names}."
        )
    parts = [text]
    for kind in (PUBLIC, LISTED):
        sources = dict.fromkeys(in_a_line(one.source) for one in statics if one.kind == kind)
        if sources:
            parts.append(
                f"The accuracy of {kind} is the one that their source states, on the whole"
                f" official test set: {'; '.join(sources)}."
            )
    return parts


def literature(points: Sequence[LiteraturePoint]) -> list[str]:
    """The points of the literature; empty if there are none."""
    if not points:
        return []
    lines = [
        "| literature, under other rules | accuracy | MACs, millions | time per image | source |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for point in points:
        macs = "-" if point.macs is None else f"{1e-6 * point.macs:.4g}"
        time = "-" if point.seconds is None else f"{1000 * point.seconds:.4g} ms"
        cells = [escaped(point.label), _percent(point.accuracy), macs, time, escaped(point.source)]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        "## Literature",
        "\n".join(lines),
        "Not measured here: other training, other splits, other counting of multiply-adds, other"
        " machines.",
    ]


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f} %"
