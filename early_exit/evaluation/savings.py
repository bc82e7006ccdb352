"""What exits save at equal accuracy: for each static network the cheapest policy of a multi-exit
network that is not less accurate on test, and what it costs less.

Nothing is interpolated: a static network exists or does not, and so does a policy. Policies were
chosen on val and are only looked up on test. They are the evaluated ones; for multiply-adds, of an
evaluation on one split, also the thresholds of its curve that a budget on val would choose: those
that are more accurate on val than every cheaper one. Where several networks have the same val, the
same holds between them: val decides whose policy is used, not test. Thresholds or policies that the
user gave do not count, because nothing says what they were chosen on. In seconds only the evaluated
policies count, which were timed with exits taken.

The best static network at an accuracy is the cheapest one that reaches it. Up to its own accuracy
it costs the same, while exits cost the more the more accurate they are; so the smallest saving over
a range of accuracies is in one of the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from early_exit.evaluation.groups import Group
from early_exit.evaluation.panels import Panel
from early_exit.evaluation.statics import Static
from early_exit.evaluation.stored import Evaluation

ROUNDING = 1e-9  # of a mean of accuracies


class ExitPoint(NamedTuple):
    """A policy of a multi-exit network on test."""

    cost: float
    accuracy: float
    group: Group
    val: tuple[float, float] | None
    """Cost and accuracy on val, but seconds as measured on test; None if nothing says."""
    budget: float | None = None
    """The budget of MACs on val that chooses it; None: it is an evaluated policy."""


@dataclass(frozen=True)
class Saving:
    """A static network beside the cheapest policy that is not less accurate."""

    static: Static
    cost: float
    """Of the static network, in the policy's process where seconds are compared."""
    exits: ExitPoint | None
    """None: no policy is as accurate."""
    better: str
    """Name of a static network of its kind that is better; empty if none is."""

    @property
    def saving(self) -> float | None:
        """Which share of the static network's cost the policy saves; below 0, it costs more."""
        return None if self.exits is None else 1 - self.exits.cost / self.cost


def macs_savings(groups: Sequence[Group], statics: Sequence[Static]) -> list[Saving]:
    """In multiply-adds, heads counted; one for each static network."""
    points = unbeaten([point for group in groups for point in policies(group)])
    return _savings([(static, [(static.macs, points)], static.macs) for static in statics])


def seconds_savings(panel: Panel, statics: Sequence[Static]) -> list[Saving]:
    """In measured seconds, in the panel's unit; one for each static network that was timed.

    Beside a policy, a static network has the time of the policy's own process, if it was timed
    there. There are none if nothing relates the times of several machines, and if no network with
    exits was timed.
    """
    if panel.reference is None and len(panel.machines) > 1:
        return []
    if all(group.plain for group in panel.groups):
        return []
    points = unbeaten([_timed(panel, group) for group in filter(_counts, panel.groups)])
    rows = []
    for static in statics:
        cost = panel.static(static)
        if cost is None:
            continue
        rivals = [(panel.static(static, point.group) or cost, [point]) for point in points]
        if own := panel.own_group(static):  # other runtimes may round otherwise
            static = replace(static, accuracy=own.accuracy().mean)
        rows.append((static, rivals, cost))
    return _savings(rows)


def _timed(panel: Panel, group: Group) -> ExitPoint:
    """A group's evaluated policy at its measured seconds."""
    seconds, val = panel.measured(group).mean, _val(group)
    on_val = None if val is None else (seconds, val[1])
    return ExitPoint(seconds, group.accuracy().mean, group, on_val)


def unbeaten(points: Sequence[ExitPoint]) -> list[ExitPoint]:
    """The policies that are more accurate on val than every one that costs no more there, among
    those of the same val images. What nothing says val of remains."""
    kept = [point for point in points if point.val is None]
    by_val: dict[tuple[Any, ...], list[tuple[float, float, ExitPoint]]] = {}
    for point in points:
        if point.val is not None:
            images = point.group.first.val_images
            by_val.setdefault(images, []).append((*point.val, point))
    for same in by_val.values():
        best = -1.0
        for _, accuracy, point in sorted(same, key=lambda one: (one[0], -one[1])):
            if accuracy > best:
                best = accuracy
                kept.append(point)
    return kept


Rivals = Sequence[tuple[float, Sequence[ExitPoint]]]
"""Policies, each with the cost that a static network has beside them."""


def _savings(rows: Sequence[tuple[Static, Rivals, float]]) -> list[Saving]:
    """rows: static networks, the policies that each is compared with, and its own cost."""
    found = []
    for static, rivals, own in rows:
        enough = [
            (cost, point)
            for cost, points in rivals
            for point in points
            if point.accuracy >= static.accuracy - ROUNDING
        ]
        cost, exits = min(enough, key=lambda one: one[1].cost / one[0], default=(own, None))
        found.append(Saving(static, cost, exits, _better(static, own, rows)))
    return found


def _better(static: Static, own: float, rows: Sequence[tuple[Static, Rivals, float]]) -> str:
    """The name of the most accurate network of this kind that costs no more and is not less
    accurate, and differs in one of both; empty if there is none."""
    better = [
        other
        for other, _, cost in rows
        if other.kind == static.kind
        and cost <= own
        and other.accuracy >= static.accuracy
        and (cost, other.accuracy) != (own, static.accuracy)
    ]
    return max(better, key=lambda other: other.accuracy).name if better else ""


def policies(group: Group) -> list[ExitPoint]:
    """The policies of a group that were chosen on val, means over seeds: the evaluated one, and
    those of its curve, unless that is the curve of one cut of several."""
    if not _counts(group):
        return []
    chosen = [ExitPoint(group.macs().mean, group.accuracy().mean, group, _val(group))]
    return chosen if group.first.cuts else [*chosen, *budgets(group)]


def _counts(group: Group) -> bool:
    """Whether its policies were chosen on val."""
    return not group.plain and not group.given


def _val(group: Group) -> tuple[float, float] | None:
    """MACs and accuracy of the evaluated policy on val, means over seeds."""
    values = [member.val for member in group.members if member.val is not None]
    if len(values) < len(group.members):
        return None
    macs, accuracy = np.mean(values, axis=0).tolist()
    return macs, accuracy


def budgets(group: Group) -> list[ExitPoint]:
    """For every budget of MACs on val that changes the choice, what it chooses: the most accurate
    threshold on val within the budget. Means over seeds."""
    choices = [_choices(member) for member in group.members]
    if not all(len(budgets) for budgets, _ in choices):
        return []
    least = max(budgets[0] for budgets, _ in choices)
    levels = np.unique(np.concatenate([budgets for budgets, _ in choices]))
    levels = levels[levels >= least]
    within = [
        points[:, np.searchsorted(budgets, levels, side="right") - 1] for budgets, points in choices
    ]
    means = np.mean(within, axis=0).T.tolist()
    return [
        ExitPoint(macs, accuracy, group, (budget, on_val), budget)
        for (macs, accuracy, on_val), budget in zip(means, levels.tolist(), strict=True)
    ]


def _choices(member: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Budgets on val, rising, (C,), and what each chooses: MACs and accuracy on test and accuracy
    on val, (3, C)."""
    if member.curve_val is None:
        return np.empty(0), np.empty((3, 0))
    macs, accuracy = member.curve_val
    order = np.lexsort((-accuracy, macs))
    record = np.maximum.accumulate(accuracy[order])
    kept = order[np.r_[True, record[1:] > record[:-1]]]
    values = np.array([member.curve_macs, member.curve_accuracy, accuracy])
    return macs[kept], values[:, kept]
