"""Names for the groups of a comparison: the settings in which they differ, in few words."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from early_exit.choosing.goals import Goal
from early_exit.errors import UserError
from early_exit.evaluation.groups import Group

# The settings that name a group, in order of preference; all other settings come after them.
PREFERRED = (
    "model.arch",
    "model.exits",
    "run.regime",
    "model.head",
    "loss.weights",
    "optim.epochs",
)
EXIT_SETTINGS = ("run.regime", "model.head", "loss.")  # no effect on a plain network


def labelled(groups: Sequence[Group], labels: Sequence[str] | None = None) -> list[Group]:
    """The groups with their names, goals and labels.

    labels: one per group, instead of the names that are made from the settings. Raises UserError
    for another number of labels, and for two that are equal.
    """
    if labels and len(labels) != len(groups):
        rows = "; ".join(group.label for group in labelled(groups))
        raise UserError(f"--labels gives {len(labels)} for {len(groups)} rows, which are: {rows}")
    names, goals = _names(groups), _goals(groups)
    if labels:
        one_line = [" ".join(label.split()) for label in labels]
        for label in one_line:
            if one_line.count(label) > 1:
                raise UserError(f"--labels gives {label!r} to two rows; give each its own")
        names, full = one_line, one_line
    else:
        goals_differ = len({goal for goal in goals if goal}) > 1
        full = [
            f"{name}, {goal}" if goals_differ and goal else name
            for name, goal in zip(names, goals, strict=True)
        ]
    return [
        dataclasses.replace(group, name=name, goal=goal, label=label)
        for group, name, goal, label in zip(groups, names, goals, full, strict=True)
    ]


def _goals(groups: Sequence[Group]) -> list[str]:
    """Each group's goal; with the criterion, "no temperatures", the runtime, the precision and the
    rounding of weights if these differ.

    If two rows would be equal, the evaluation's name instead. A plain network has no goal, but a
    runtime.
    """
    goals = [_goal(group, groups) for group in groups]
    rows = [(group.first.run, goal) for group, goal in zip(groups, goals, strict=True)]
    return [
        group.first.name if rows.count(row) > 1 else row[1]
        for row, group in zip(rows, groups, strict=True)
    ]


def _goal(group: Group, groups: Sequence[Group]) -> str:
    evaluation = group.first
    runtimes_differ = len({other.first.runtime for other in groups}) > 1
    rounding = []
    if evaluation.rounded_to and len({other.first.rounded_to for other in groups}) > 1:
        rounding = [f"{evaluation.rounded_to} weights"]
    if group.plain:
        return ", ".join([*([evaluation.runtime] if runtimes_differ else []), *rounding])
    with_exits = [other.first for other in groups if not other.plain]

    def differ(field: str) -> bool:
        return len({getattr(other, field) for other in with_exits}) > 1

    parts = [evaluation.goal]
    if differ("criterion") and evaluation.criterion != Goal.criterion:
        parts.append(evaluation.criterion)
    if differ("calibrated") and not evaluation.calibrated:
        parts.append("no temperatures")
    if runtimes_differ:
        parts.append(evaluation.runtime)
    same_runtime = [other for other in with_exits if other.runtime == evaluation.runtime]
    if len({other.precision for other in same_runtime}) > 1:  # a runtime's name says its own
        parts.append(evaluation.precision)
    return ", ".join([*parts, *rounding])


def _names(groups: Sequence[Group]) -> list[str]:
    """For each group the settings that distinguish its run from the others, as few as suffice; its
    directory if no setting does."""
    runs = [group.first.run for group in groups]
    words = _distinguishing_words(groups)
    by_run = set(zip(words, runs, strict=True))
    names = []
    for group, own in zip(groups, words, strict=True):
        unique = sum(own == other for other, _ in by_run) == 1
        names.append(", ".join(_shortest(own, words)) if own and unique else _directory(group))
    if len(set(names)) < len(set(runs)):  # directories of the same name
        return [str(run) for run in runs]
    return names


def _distinguishing_words(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Each group's settings in words, without those that distinguish no more groups than the
    settings before them."""
    words: list[tuple[str, ...]] = [()] * len(groups)
    for key in differing_settings(groups):
        longer = [
            (*own, word) if (word := _in_words(group, key)) else own
            for own, group in zip(words, groups, strict=True)
        ]
        if len(set(longer)) > len(set(words)):
            words = longer
    return words


def _shortest(own: tuple[str, ...], all_words: Sequence[tuple[str, ...]]) -> list[str]:
    """The first word, and as few of the others as distinguish it from every other group."""
    needed = list(own)
    for word in own[:0:-1]:
        fewer = [other for other in needed if other != word]
        if not any(set(fewer) <= set(others) for others in all_words if others != own):
            needed = fewer
    return needed


def differing_settings(groups: Sequence[Group]) -> list[str]:
    """The settings in which the runs differ, in order of preference."""
    keys = dict.fromkeys((*PREFERRED, *(key for group in groups for key in group.first.settings)))
    words = {key: {_in_words(group, key) for group in groups} - {""} for key in keys}
    differing = [key for key in keys if len(words[key]) > 1]
    one_seed_each = all(len(group.members) == 1 for group in groups)
    return [*differing, "run.seed"] if one_seed_each else differing


def _in_words(group: Group, key: str) -> str:
    """A setting as part of a name; empty if it has no effect on the group."""
    if key == "run.seed":
        return f"seed {group.first.seed}"
    if key not in group.first.settings or (group.plain and key.startswith(EXIT_SETTINGS)):
        return ""
    value = group.first.settings[key]
    values = value if isinstance(value, list) else [value]
    text = " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in values)
    match key:
        case "model.arch" | "run.regime":
            return text
        case "model.exits":
            return _exits_in_words(values, text)
        case "model.head":
            return f"{text} heads"
        case "optim.epochs":
            return f"{text} epochs"
        case "model.backbone":
            return f"backbone {Path(text).name}"
    return f"{key.partition('.')[2].replace('_', ' ')} {text}"


def _exits_in_words(exits: list[str], text: str) -> str:
    if not exits:
        return "plain"
    if len(text) > 24:
        return f"{len(exits)} exits"
    return f"exits {text}" if len(exits) > 1 else f"exit {text}"


def _directory(group: Group) -> str:
    """The name of the run's directory; for several seeds, the common beginning of the names."""
    names = [Path(os.path.abspath(member.run)).name for member in group.members]
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(names)  # noqa: RUF071
    if any(name[len(common) : len(common) + 1].isdigit() for name in names):
        common = common.rstrip("0123456789")  # the first digits of the seeds
    return re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", common) or names[0]
