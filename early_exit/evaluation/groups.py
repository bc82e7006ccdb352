"""Groups of runs that differ only in the seed.

Two evaluations belong to one group if their runs have equal settings (except the seed, and settings
that do not affect the result) and they have the same name, goal, splits, runtime, precision and
rounding of weights.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from early_exit.evaluation.stored import Evaluation, Value
from early_exit.metrics import mean_std
from early_exit.system.device import PRECISIONS

GRID = 200  # multiply-adds at which the curves of several seeds are averaged


class MeanCurve(NamedTuple):
    """Mean test accuracy against a cost per image; all (P,). One seed has a deviation of 0."""

    costs: np.ndarray
    accuracy: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Group:
    """One evaluation, or several whose runs differ only in the seed: a row of a comparison."""

    members: tuple[Evaluation, ...]
    name: str = ""
    """The settings in which its runs differ from the others."""
    goal: str = ""
    label: str = ""
    """The name, and the goal if the compared goals differ."""

    @property
    def first(self) -> Evaluation:
        """One member, for what all have in common."""
        return self.members[0]

    @property
    def plain(self) -> bool:
        """Whether the network has no early exit."""
        return not self.first.exit_accuracy

    @property
    def given(self) -> bool:
        """Whether thresholds or a policy were given, not chosen on val."""
        return any(member.given for member in self.members)

    @property
    def batch_sizes(self) -> list[int]:
        """Batch sizes that were timed."""
        return sorted({size for member in self.members for size in member.speedups})

    def speedup(self, size: int) -> Value | None:
        """Over the plain network at a batch size; None unless every member was timed, all on one
        machine."""
        timed = all(size in member.speedups for member in self.members)
        if not timed or len({member.device for member in self.members}) > 1:
            return None
        return self.mean(lambda member: member.speedups[size])

    def mean(self, get: Callable[[Evaluation], Value | float | None]) -> Value | None:
        """Mean and deviation of a number over the members that have it. If one has it, its own
        value; if none has, None."""
        numbers = [number for number in map(get, self.members) if number is not None]
        values = [number if isinstance(number, Value) else Value(number) for number in numbers]
        if len(values) < 2:
            return values[0] if values else None
        return Value(*mean_std([value.mean for value in values]))

    def _required(self, get: Callable[[Evaluation], Value]) -> Value:
        """`mean` of a number that every evaluation has."""
        value = self.mean(get)
        assert value is not None, "a group has a member"
        return value

    def accuracy(self) -> Value:
        """Accuracy of the chosen policy."""
        return self._required(lambda member: member.accuracy)

    def final_accuracy(self) -> Value:
        """Accuracy of the final exit."""
        return self._required(lambda member: member.final_accuracy)

    def macs_share(self) -> Value:
        """MACs of the chosen policy, as a share of the plain network's."""
        return self._required(lambda member: member.macs_share)

    def macs(self) -> Value:
        """MACs of the chosen policy."""
        share, plain = self.macs_share(), self.first.plain_macs
        return Value(plain * share.mean, None if share.std is None else plain * share.std)

    def curve(self) -> MeanCurve:
        """The curve of a shared threshold, against MACs; see `mean_curve`."""
        return mean_curve([(member.curve_macs, member.curve_accuracy) for member in self.members])


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> MeanCurve:
    """The mean of curves (cost, accuracy) of several seeds, interpolated linearly at the same
    costs, evenly spaced over the range that all of them cover; one curve is returned as it is.

    curves: arrays (P,) by rising cost.
    """
    if len(curves) == 1:
        costs, accuracy = curves[0]
        return MeanCurve(costs, accuracy, np.zeros(len(costs)))
    low, high = max(costs[0] for costs, _ in curves), min(costs[-1] for costs, _ in curves)
    grid = np.unique(np.linspace(low, high, GRID)) if low <= high else np.empty(0)
    values = np.array([np.interp(grid, costs, accuracy) for costs, accuracy in curves])
    return MeanCurve(grid, values.mean(axis=0), values.std(axis=0, ddof=1))


def group_runs(evaluations: Sequence[Evaluation], each: bool = False) -> list[Group]:
    """Groups the evaluations, in the order of their first members.

    Groups in which a seed occurs twice are split up: two runs of one seed are not two seeds. each:
    whether every evaluation is a group of its own.
    """
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        own_group = each or evaluation.seed is None  # without config.yaml, settings are unknown
        key = str(evaluation.path) if own_group else _group_key(evaluation)
        groups.setdefault(key, []).append(evaluation)
    found: list[tuple[Evaluation, ...]] = []
    for members in groups.values():
        repeated = len({member.seed for member in members}) < len(members)
        found += [(member,) for member in members] if repeated else [tuple(members)]
    return [Group(members) for members in found]


def same_networks(groups: Sequence[Group]) -> list[tuple[Group, ...]]:
    """The groups, those together that differ in the goal or in the runtime alone, in the order of
    the first. In 8-bit integers or with rounded weights it is another network."""
    found: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        first = group.first
        key = (
            tuple(member.run for member in group.members),
            first.criterion,
            first.calibrated,
            first.val_from,
            first.cuts,
            first.rounded_to,
            first.runtime if _in_integers(group) else "",
        )
        found.setdefault(key, []).append(group)
    return [tuple(same) for same in found.values()]


def names_of(networks: Sequence[Sequence[Group]]) -> list[str]:
    """Names for what `same_networks` gave: the settings in which they differ, and the runtime in
    8-bit integers; where these are equal, also the seeds, and if they are equal too, the labels of
    the first evaluations."""
    names = [
        f"{same[0].name}, {same[0].first.runtime}" if _in_integers(same[0]) else same[0].name
        for same in networks
    ]
    with_seeds = [
        name if names.count(name) == 1 else f"{name}, {_seeds(same[0])}"
        for name, same in zip(names, networks, strict=True)
    ]
    return [
        name if with_seeds.count(name) == 1 else same[0].label
        for name, same in zip(with_seeds, networks, strict=True)
    ]


def _seeds(group: Group) -> str:
    """Of how many seeds a group is, or of which one."""
    count = len(group.members)
    return f"{count} seeds" if count > 1 else f"seed {group.first.seed}"


def _in_integers(group: Group) -> bool:
    return group.first.precision == PRECISIONS["int8"]


def _group_key(evaluation: Evaluation) -> str:
    """Equal for evaluations that differ only in the seed."""
    values = (
        evaluation.settings,
        evaluation.name,
        evaluation.goal,
        evaluation.criterion,
        evaluation.calibrated,
        evaluation.val_from,
        evaluation.cuts,
        evaluation.runtime,
        evaluation.precision,
        evaluation.rounded_to,
    )
    return json.dumps(values, sort_keys=True, default=str)
