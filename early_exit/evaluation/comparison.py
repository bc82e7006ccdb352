"""A comparison of groups of runs: its table, and the notes below it."""

import csv
import functools
import io
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from early_exit.evaluation.groups import Group
from early_exit.evaluation.labels import differing_settings
from early_exit.evaluation.literature import LiteraturePoint
from early_exit.evaluation.panels import Panel
from early_exit.evaluation.statics import Static
from early_exit.evaluation.stored import Value
from early_exit.system.text import in_a_line

MAX_EXIT_COLUMNS = 8  # with more early exits, their accuracies are only in the CSV and the JSON


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    groups: Sequence[Group]
    statics: Sequence[Static] = ()
    """The plain runs among the groups, the public networks of their reports, and those that the
    user lists."""
    panels: Sequence[Panel] = ()
    """The runtimes in which anything was timed."""
    points: Sequence[LiteraturePoint] = ()


@dataclass(frozen=True)
class Column:
    """One number of every group."""

    heading: str
    """In the Markdown table."""
    name: str
    """In the CSV, with its unit."""
    value: Callable[[Group], Value | None]
    scale: float = 100
    """What the value is multiplied by; default: fractions are shown in percent."""
    decimals: int = 2
    unit: str = " %"

    def cell(self, group: Group) -> str:
        """The number in the Markdown table, with ± if it has a deviation."""
        value = self.value(group)
        if value is None:
            return "-"
        numbers = [value.mean] if value.std is None else [value.mean, value.std]
        return " ± ".join(f"{self.scale * n:.{self.decimals}f}" for n in numbers) + self.unit

    def mean_and_std(self, group: Group) -> tuple[float | str, float | str]:
        """The numbers in the CSV; empty if there is none."""
        value = self.value(group)
        if value is None:
            return "", ""
        return self.scale * value.mean, "" if value.std is None else self.scale * value.std


def exit_columns(groups: Sequence[Group]) -> list[Column]:
    """The accuracy of each early exit, if all networks with exits have equally many."""
    exits = [tuple(group.first.exit_accuracy) for group in groups if not group.plain]
    if len({len(names) for names in exits}) != 1:
        return []
    same_names = len(set(exits)) == 1
    names = exits[0] if same_names else [str(index + 1) for index in range(len(exits[0]))]

    def accuracy(index: int, group: Group) -> Value | None:
        return group.mean(lambda member: member.accuracy_of_exit(index))

    return [
        Column(
            f"accuracy of exit {name}",
            f"exit_{name.replace(' ', '_')}_accuracy_percent",
            functools.partial(accuracy, index),
        )
        for index, name in enumerate(names)
    ]


def policy_columns(groups: Sequence[Group]) -> list[Column]:
    """Accuracy, MACs and speed-up of the chosen policies, beside the final exit."""
    batch_sizes = sorted({size for group in groups for size in group.batch_sizes})
    runtimes = timed_in(groups)
    runtime = runtimes[0] if len(runtimes) == 1 else "the row's runtime"
    decimals = 2 if min(group.first.plain_macs for group in groups) > 1e7 else 3

    return [
        Column("accuracy of final exit", "final_exit_accuracy_percent", Group.final_accuracy),
        Column("accuracy of chosen policy", "chosen_policy_accuracy_percent", Group.accuracy),
        Column(
            "MACs, share of plain network", "macs_percent_of_plain", Group.macs_share, decimals=1
        ),
        Column(
            "MACs, millions", "macs_millions", Group.macs, scale=1e-6, decimals=decimals, unit=""
        ),
        *(
            Column(
                f"speed-up in {runtime}, batch {size}",
                f"speedup_batch_{size}",
                operator.methodcaller("speedup", size),
                scale=1,
                unit=" x",
            )
            for size in batch_sizes
        ),
    ]


def timed_in(groups: Sequence[Group]) -> list[str]:
    """The runtimes in which anything was timed, with their precisions."""
    members = [member for group in groups for member in group.members if member.speedups]
    return sorted({f"{member.runtime} ({member.precision})" for member in members})


def table(groups: Sequence[Group]) -> str:
    """The table in Markdown, one row per group."""
    exits = exit_columns(groups)
    columns = [*(exits if len(exits) <= MAX_EXIT_COLUMNS else []), *policy_columns(groups)]
    lines = [
        ["runs", "seeds", "goal", *(column.heading for column in columns)],
        ["---", "---:", "---", *("---:" for _ in columns)],
    ]
    for group in groups:
        cuts = f" ({group.first.cuts} cuts)" if group.first.cuts else ""
        mark = "" if not cautions([group]) else " (!)"
        lines.append(
            [
                _in_a_cell(group.name) + mark,
                f"{len(group.members)}{cuts}",
                _in_a_cell(group.goal) or "-",
                *(column.cell(group) for column in columns),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _in_a_cell(text: str) -> str:
    """Text in a cell of the Markdown table."""
    return in_a_line(text).replace("|", r"\|")


def notes(groups: Sequence[Group]) -> list[str]:
    """What the numbers mean and how far they can be trusted, in paragraphs."""
    found = [f"(!) {caution}." for caution in cautions(groups)]
    found += [_about_columns(groups), *_about_deviations(groups), *_about_splits(groups)]
    devices = {member.device for group in groups for member in group.members if member.speedups}
    if devices:
        names = " and ".join(sorted(devices))
        found.append(
            "Speed-ups are over the plain network in the same runtime:"
            f" {' and '.join(timed_in(groups))}, timed on {names}."
        )
    differing = [key for key in differing_settings(groups) if key != "run.seed"]
    if differing:
        found.append(f"The runs differ in {', '.join(differing)}.")
    return found


def cautions(groups: Sequence[Group]) -> list[str]:
    """Which evaluations may not have the numbers of the trained run, and why."""
    return [
        f"{in_a_line(member.path.parent)} is {caution}"
        for group in groups
        for member in group.members
        for caution in member.cautions
    ]


def _about_columns(groups: Sequence[Group]) -> str:
    text = (
        f"Data set {in_a_line(groups[0].first.dataset)}. {_about_choices(groups)}; test is"
        " only reported. MACs are the chosen policy's multiply-adds per image, including the heads"
        " that ran."
    )
    if 0 < len(exit_columns(groups)) <= MAX_EXIT_COLUMNS:
        text += " *Accuracy of exit X*: if every test image exited there."
    return text


def _about_choices(groups: Sequence[Group]) -> str:
    given = [group.label for group in groups if group.given]
    if not given:
        return "Policies were chosen on val"
    names = "; ".join(map(in_a_line, given))
    return f"Policies were chosen on val, but for thresholds or a policy that were given ({names})"


def _about_deviations(groups: Sequence[Group]) -> list[str]:
    with_cuts = [group for group in groups if group.first.cuts]
    with_seeds = [group for group in groups if len(group.members) > 1]
    found = []
    if with_seeds:
        means = ", of the means over cuts" if with_cuts else ""
        found.append(f"±: sample standard deviation over seeds{means}.")
    if with_cuts:
        some_single = len(with_seeds) < len(groups)
        deviation = ", with one seed ± their standard deviation" if some_single else ""
        found.append(
            "Cuts: the numbers of the final exit and of the chosen policy are means over several"
            f" cuts of the test set into val and test{deviation}, which says how much depends on"
            " the half that was drawn and is not a standard error. The accuracies of the other"
            " exits and the curve are those of the first cut."
        )
    if len(with_seeds) < len(groups):
        found.append("Rows with one seed do not show how much results vary between seeds.")
    return found


def _about_splits(groups: Sequence[Group]) -> list[str]:
    """Which rows use which split, if they differ."""
    names_by_split: dict[str, dict[str, None]] = {}
    for group in groups:
        names_by_split.setdefault(group.first.val_from, {})[group.name] = None
    if len(names_by_split) == 1:
        return []
    rows = [
        f"Val {split}: {'; '.join(map(in_a_line, names))}."
        for split, names in names_by_split.items()
    ]
    return [" ".join(["The rows do not share the same test images.", *rows])]


def to_csv(groups: Sequence[Group]) -> str:
    """table.csv: one row per group; means and deviations in columns of their own."""
    columns, text = [*exit_columns(groups), *policy_columns(groups)], io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{column.name}_{end}" for column in columns for end in ("mean", "std")]
    head = ["group", "goal", "evaluation", "runtime", "seeds", "cuts"]
    writer.writerow([*head, *names, "cautions"])
    for group in groups:
        first, seeds = group.first, len(group.members)
        numbers = [number for column in columns for number in column.mean_and_std(group)]
        row = [group.name, group.goal, first.name, first.runtime, seeds, first.cuts, *numbers]
        writer.writerow([*row, "; ".join(cautions([group]))])
    return text.getvalue()
