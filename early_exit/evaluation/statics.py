"""The static networks of a comparison: its plain runs, the public networks that its reports compare
with, and those of a file that the user names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from early_exit.errors import UserError
from early_exit.evaluation.groups import Group, names_of, same_networks
from early_exit.evaluation.literature import read_points
from early_exit.evaluation.stored import Evaluation
from early_exit.system.text import in_a_line

RUN, PUBLIC, LISTED = "plain runs", "public networks", "networks of --statics"


@dataclass(frozen=True)
class Static:
    """A network without exits."""

    kind: str
    """`RUN`, `PUBLIC` or `LISTED`."""
    name: str
    accuracy: float
    """On test; for a network that is not a run, as its source states it."""
    macs: int
    source: str
    """Who trained it."""
    groups: tuple[Group, ...] = ()
    """A run's evaluations."""


def static_networks(groups: Sequence[Group]) -> list[Static]:
    """The plain runs, then the public networks, each once and by rising MACs."""
    networks = same_networks(groups)
    runs = [
        Static(RUN, name, same[0].accuracy().mean, same[0].first.plain_macs, "", same)
        for name, same in zip(names_of(networks), networks, strict=True)
        if same[0].plain
    ]
    public: dict[tuple[str, int], Static] = {}
    for group in groups:
        for member in group.members:
            for row in member.public:
                static = Static(PUBLIC, row.name, row.accuracy, row.macs, row.source)
                public.setdefault((row.name, row.macs), static)
    return [
        *sorted(runs, key=lambda static: static.macs),
        *sorted(public.values(), key=lambda static: static.macs),
    ]


def listed_networks(path: Path, dataset: str) -> list[Static]:
    """The static networks of a YAML file, by rising MACs. Its format is that of `--points`.

    Raises UserError as `read_points` does, and for a network without `macs_millions`.
    """
    found = []
    for point in read_points(path, dataset):
        if point.macs is None:
            raise UserError(
                f"{path}: {in_a_line(point.label)} has no macs_millions, by which static networks"
                " are compared; add it"
            )
        network = Static(LISTED, point.label, point.accuracy, round(point.macs), point.source)
        found.append(network)
    return sorted(found, key=lambda static: static.macs)


Timed = dict[tuple[str, int], float]
"""Seconds per image of networks without exits in one process, by name and MACs."""


def timed_beside(member: Evaluation, batch_size: int) -> Timed:
    """The networks without exits that were timed in turns with an evaluation's policy: the public
    ones, and its own plain network by the name of its architecture."""
    seconds = member.seconds[batch_size]
    found = {
        (row.name, row.macs): seconds.networks[row.name]
        for row in member.public
        if row.name in seconds.networks
    }
    own = (str(member.settings["model.arch"]), member.plain_macs)
    return {own: seconds.plain} | found
