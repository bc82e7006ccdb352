"""Shows where exits pay: every place on its own, then as many exits as are worth it.

    python docs-src/figures/placement.py runs/cdl-resnet56 --val-from test

For a run with an exit after every block (--regime cdl). First each exit is enabled on its own, with
the threshold that loses half a point on val, and its saving on test is drawn against its position.
Then exits are added, each time the one that saves most on val. The run must have been evaluated,
because its records are read. Means and deviations are over ten cuts, as in criteria_table.py.
Prints tables and draws docs-src/docs/imgs/placement.png.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    )
    from early_exit.cli.border import run

    run("placement", "placement.py")

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from run_records import CUTS, RunRecords, run_parser

from early_exit.choosing.choice import calibrated
from early_exit.choosing.curve import for_max_drop, shared_curve
from early_exit.choosing.goals import MaxDrop
from early_exit.choosing.outcome import Outcome, Point, apply_policy
from early_exit.choosing.overthinking import correct_answers
from early_exit.choosing.record import ExitRecord, Scores, score_record
from early_exit.cli import flags
from early_exit.evaluation import plots
from early_exit.inference.policy import Policy
from early_exit.metrics import mean_std
from early_exit.model.cost import Cost

IMAGE = Path(__file__).resolve().parents[1] / "docs/imgs/placement.png"
DROP = 0.005
MAX_ADDED = 8  # exits


@dataclass(frozen=True)
class Val:
    """The images that a cut chooses on, scored with all exits enabled."""

    policy: Policy
    """Calibrated; no row exits early."""
    scored: Scores
    cost: Cost

    @classmethod
    def of(cls, record: ExitRecord, cost: Cost) -> "Val":
        """Fits the temperatures and scores the record."""
        policy = calibrated(record, MaxDrop(DROP))
        return cls(policy, score_record(record, policy), cost)

    def choose(self, exits: Sequence[int]) -> tuple[Policy, float]:
        """The policy with only `exits` enabled that loses half a point, and its cost per image as
        a share of the plain network's MACs."""
        enabled = tuple(index in exits for index in range(self.policy.num_exits - 1))
        curve = shared_curve(self.scored, enabled, self.cost.cumulative(enabled))
        threshold = for_max_drop(curve, DROP)
        policy = dataclasses.replace(self.policy, enabled=enabled).with_threshold(threshold)
        macs = curve.macs[curve.thresholds == threshold][0]
        return policy, float(macs / self.cost.plain_macs)

    def add_exits(self) -> list[list[int]]:
        """Growing sets of exits; each adds the exit with which an image costs least."""
        exits: list[int] = []
        sets = []
        num_early = self.policy.num_exits - 1
        for _ in range(min(MAX_ADDED, num_early)):
            others = [index for index in range(num_early) if index not in exits]
            exits = [*exits, min(others, key=lambda index: self.choose([*exits, index])[1])]
            sets.append(exits)
        return sets


@dataclass(frozen=True)
class Cut:
    """One cut of the records: what was chosen on val, reported on test."""

    single: list[Point]
    """One per early exit: only this exit enabled."""
    exit_sets: list[list[int]]
    """The sets that `Val.add_exits` found, then all early exits."""
    several: list[Point]
    """One per set."""
    final_accuracy: float
    """Of the final exit on the same images."""


def measure_cut(records: RunRecords, seed: int) -> Cut:
    """Chooses on the images of one cut and reports on the others."""
    val_record, test = records.cut(seed)
    cost = test.cost
    val, early = Val.of(val_record, cost), range(len(cost.exit_names) - 1)

    def report(exits: Sequence[int]) -> Outcome:
        policy, _ = val.choose(exits)
        return apply_policy(policy, test, cost)

    single = [report([index]) for index in early]
    exit_sets = [*val.add_exits(), list(early)]
    return Cut(
        [outcome.point for outcome in single],
        exit_sets,
        [report(exits).point for exits in exit_sets],
        single[0].final_accuracy,
    )


def single_table(cuts: Sequence[Cut], cost: Cost, accuracy: np.ndarray) -> str:
    """One row per early exit that is enabled on its own. accuracy: (exits,) of each exit."""
    lines = [
        "| exit after | position | its head | accuracy of this exit | MACs saved | points lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for index, position in enumerate(positions(cost)):
        saved = percent([1 - cut.single[index].macs_share for cut in cuts])
        lost = percent([cut.final_accuracy - cut.single[index].accuracy for cut in cuts], 2)
        lines.append(
            f"| {cost.exit_names[index]} | {100 * position:.1f} %"
            f" | {100 * cost.head_macs[index] / cost.plain_macs:.2f} %"
            f" | {100 * accuracy[index]:.2f} % | {saved} % | {lost} |"
        )
    return "\n".join(lines)


def several_table(cuts: Sequence[Cut], cost: Cost) -> str:
    """One row per number of exits."""
    lines = [
        "| exits | accuracy on test | MACs | exits in the first cut |",
        "| ---: | ---: | ---: | --- |",
    ]
    sets = cuts[0].exit_sets
    for number, exits in enumerate(sets):
        points = [cut.several[number] for cut in cuts]
        is_all = number == len(sets) - 1
        names = "" if is_all else " ".join(cost.exit_names[index] for index in sorted(exits))
        lines.append(
            f"| {'all' if is_all else len(exits)}"
            f" | {percent([point.accuracy for point in points], 2)} %"
            f" | {percent([point.macs_share for point in points])} % | {names} |"
        )
    return "\n".join(lines)


def positions(cost: Cost) -> np.ndarray:
    """The share of the plain network's MACs before each early exit, (early exits,)."""
    return np.cumsum(cost.stage_macs)[:-1] / cost.plain_macs


def percent(values: Sequence[float], decimals: int = 1) -> str:
    """Mean and deviation of fractions, in percent."""
    mean, std = mean_std([100 * value for value in values])
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def draw(cuts: Sequence[Cut], cost: Cost, accuracy: np.ndarray) -> None:
    """Accuracy of each exit above, what it saves on its own below, against its position."""
    x = 100 * positions(cost)
    saved = [
        mean_std([100 * (1 - cut.single[index].macs_share) for cut in cuts])
        for index in range(len(x))
    ]
    means, deviations = zip(*saved, strict=True)
    with plots.figure(IMAGE, (7, 5), (2, 1)) as (figure, (above, below)):
        below.sharex(above)
        above.tick_params(labelbottom=False)
        above.plot(x, 100 * accuracy[:-1], "o-", color=plots.ORANGE, ms=5)
        above.axhline(100 * accuracy[-1], color=plots.GREY, ls="--", lw=1)
        above.text(0, 100 * accuracy[-1] - 1, "the whole network", va="top", fontsize=9)
        above.set_ylabel("accuracy of this exit, %")
        below.errorbar(x, means, deviations, fmt="s-", color=plots.BLUE, ms=5, capsize=2)
        below.axhline(0, color=plots.GREY, lw=1)
        below.set_ylabel("multiply-adds saved, %")
        below.set_xlabel("position of the only exit, % of the multiply-adds")
        figure.tight_layout()


def parser() -> flags.Parser:
    """The script's flags."""
    return run_parser("placement.py", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and draws the figure."""
    args = parser().parse_args(argv)
    records = RunRecords.load(args.run, args.val_from)
    cost, accuracy = records.test.cost, correct_answers(records.test).mean(axis=0)
    cuts = [measure_cut(records, seed) for seed in range(CUTS)]
    print(single_table(cuts, cost, accuracy))
    print(f"\n{several_table(cuts, cost)}")
    draw(cuts, cost, accuracy)
