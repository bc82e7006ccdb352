"""The panels of seconds of a comparison: what was timed in one runtime at one batch size.

Seconds of two reports were measured in two processes, perhaps on two machines, and are not mixed.
If a network without exits was timed in all of them, every time is a share of that network's time in
the same process. If there is none, times are in milliseconds, and the panel says where they come
from.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.evaluation.groups import Group, MeanCurve, mean_curve
from early_exit.evaluation.statics import RUN, Static, timed_beside
from early_exit.evaluation.stored import Evaluation, Value
from early_exit.system.device import PRECISIONS
from early_exit.system.text import in_a_line


@dataclass(frozen=True)
class Panel:
    """What was timed in one runtime at one batch size."""

    runtime: str
    precision: str
    batch_size: int
    groups: tuple[Group, ...]
    """Those of which every member was timed in it."""
    reference: tuple[str, int] | None
    """Name and MACs of the network whose time is the unit; None: milliseconds."""
    left_out: tuple[Group, ...] = ()
    """Those evaluated in the runtime that were not timed at the batch size."""

    @property
    def members(self) -> list[Evaluation]:
        """The evaluations, one process each."""
        return [member for group in self.groups for member in group.members]

    @property
    def title(self) -> str:
        """Runtime, precision and batch size."""
        return f"{self.runtime} ({self.precision}), batch {self.batch_size}"

    @property
    def unit(self) -> str:
        """Of the axis and of the table."""
        return "ms" if self.reference is None else f"% of {in_a_line(self.reference[0])}'s"

    def cost(self, member: Evaluation, seconds: float) -> float:
        """Seconds per image of a member's report in the panel's unit."""
        if self.reference is None:
            return 1000 * seconds
        return 100 * seconds / timed_beside(member, self.batch_size)[self.reference]

    def measured(self, group: Group) -> Value:
        """The measured cost of the chosen policy, with exits taken, or of a plain run's network."""

        def cost(member: Evaluation) -> float:
            seconds = member.seconds[self.batch_size]
            return self.cost(member, seconds.plain if group.plain else seconds.live)

        found = group.mean(cost)
        assert found is not None, "every member was timed"
        return found

    def curve(self, group: Group) -> MeanCurve | None:
        """The curve of a shared threshold against the cost expected from the segments' times; None
        if the segments were not timed."""
        curves = []
        for member in group.members:
            seconds = member.seconds[self.batch_size].curve
            if seconds is None:
                return None
            costs = np.array([self.cost(member, value) for value in seconds])
            order = np.argsort(costs, kind="stable")
            curves.append((costs[order], member.curve_accuracy[order]))
        return mean_curve(curves)

    def static(self, static: Static, beside: Group | None = None) -> float | None:
        """The cost of a static network; None if it was not timed.

        beside: the group whose own reports are used if they have it; a run's own come first.
        """
        if static.kind == RUN:
            own = self.own_group(static)
            return self.measured(own).mean if own else None
        if self.precision == PRECISIONS["int8"]:
            return None  # its accuracy in 8-bit integers is not known
        for members in (beside.members if beside else (), self.members):
            timed = [
                (member, timed_beside(member, self.batch_size).get((static.name, static.macs)))
                for member in members
            ]
            costs = [self.cost(member, seconds) for member, seconds in timed if seconds is not None]
            if costs:
                return float(np.mean(costs))
        return None

    def own_group(self, static: Static) -> Group | None:
        """A plain run's evaluation in the panel; None for another network, and if it has none."""
        own = (group for group in self.groups if any(group is run for run in static.groups))
        return next(own, None)

    @property
    def machines(self) -> list[str]:
        """The machines and the versions of packages that its seconds were measured with."""
        return list(
            dict.fromkeys(
                f"{member.device} ({_versions(member)})" if _versions(member) else member.device
                for member in self.members
            )
        )

    @property
    def caution(self) -> str:
        """What forbids to compare its costs, in words; empty if nothing does."""
        if len(self.machines) > 1:
            return f"measured on {len(self.machines)} machines or versions"
        if self.reference is None and len(self.members) > 1:
            return f"measured in {len(self.members)} processes"
        return ""


def _versions(member: Evaluation) -> str:
    """The versions of packages; the revision of the code is not among them."""
    return ", ".join(
        f"{name} {version}" for name, version in member.versions.items() if name != "git"
    )


def panels_of(groups: Sequence[Group], batch_size: int | None = None) -> list[Panel]:
    """One panel for each runtime in which anything was timed at the batch size.

    batch_size: default: in each runtime the smallest that all groups timed in it have; if there is
    none, the smallest of those that most have.
    """
    by_runtime: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        by_runtime.setdefault((group.first.runtime, group.first.precision), []).append(group)
    found = []
    for (runtime, precision), inside in by_runtime.items():
        counts = Counter(size for group in inside for size in _sizes(group))
        if not counts:
            continue
        size = batch_size
        if size is None:
            size = min(counts, key=lambda size: (-counts[size], size))
        timed = tuple(group for group in inside if size in _sizes(group))
        others = tuple(group for group in inside if size not in _sizes(group))
        if timed:
            reference = _reference(timed, size)
            found.append(Panel(runtime, precision, size, timed, reference, others))
    return found


def _sizes(group: Group) -> set[int]:
    """The batch sizes that every member was timed at."""
    return set.intersection(*(set(member.seconds) for member in group.members))


def _reference(groups: Sequence[Group], batch_size: int) -> tuple[str, int] | None:
    """The most expensive of the networks without exits that were timed in every report; None for
    one report, whose milliseconds need none."""
    members = [member for group in groups for member in group.members]
    if len(members) == 1:
        return None
    common = set.intersection(*(set(timed_beside(member, batch_size)) for member in members))
    return max(common, key=lambda key: (key[1], key[0]), default=None)
