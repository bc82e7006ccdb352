"""Compares criteria at equal accuracy, with and without temperatures.

    python docs-src/figures/criteria_table.py runs/resnet20-mixed
    python docs-src/figures/criteria_table.py runs/resnet56-frozen6 --val-from test
    python docs-src/figures/criteria_table.py runs/b-lenet-0 runs/b-lenet-1 runs/b-lenet-2

The runs must have been evaluated, because their records are read. Thresholds are chosen on val and
reported on test. Means and deviations are over ten cuts of each run; the runs may be seeds of one
recipe. With --val-from train, each cut chooses on a random half of val and reports on all of test;
with --val-from test, each cut chooses on one half of test and reports on the other. Prints a table.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    )
    from early_exit.cli.border import run

    run("criteria_table", "criteria_table.py")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from run_records import CUTS, RunRecords, add_val_from

from early_exit.choosing.choice import choose
from early_exit.choosing.goals import Goal, MaxDrop
from early_exit.choosing.outcome import apply_policy
from early_exit.cli import flags
from early_exit.metrics import mean_std

CRITERIA = ("max_prob", "entropy", "margin")  # thresholds of patience are whole numbers


@dataclass(frozen=True)
class Summary:
    """What the chosen policies reach on test, each as mean and deviation in percent."""

    accuracy: str
    lost: str
    """Accuracy lost against the final exit, in points."""
    macs_share: str


def over_cuts(runs: Sequence[RunRecords], goal: Goal) -> Summary:
    """Chooses for `goal` on each of ten cuts of every run."""
    accuracies, lost, macs_shares = [], [], []
    for records in runs:
        cost = records.test.cost
        for seed in range(CUTS):
            val, test = records.cut(seed)
            outcome = apply_policy(choose(val, goal, cost), test, cost)
            accuracies.append(outcome.point.accuracy)
            lost.append(outcome.final_accuracy - outcome.point.accuracy)
            macs_shares.append(outcome.point.macs_share)
    return Summary(*map(percent, (accuracies, lost, macs_shares)))


def percent(values: Sequence[float]) -> str:
    """Mean and deviation of fractions, in percent."""
    return "{:.2f} ± {:.2f}".format(*mean_std([100 * value for value in values]))


def parser() -> flags.Parser:
    """The script's flags."""
    parser = flags.build_parser(
        "criteria_table.py",
        "python docs-src/figures/criteria_table.py RUN [RUN ...] [flags]",
        __doc__,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory that was evaluated"
    )
    add_val_from(parser)
    parser.add_argument(
        "--max-drop",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="accuracy that may be lost on val (default 0.5)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    args = parser().parse_args(argv)
    runs = [RunRecords.load(run, args.val_from) for run in args.runs]
    print("| criterion | temperatures | accuracy on test | points lost | MACs |")
    print("| --- | --- | ---: | ---: | ---: |")
    for criterion in CRITERIA:
        for calibrate in (False, True):
            goal = MaxDrop(args.max_drop / 100, criterion=criterion, calibrate=calibrate)
            found = over_cuts(runs, goal)
            temperatures = "fitted" if calibrate else "none"
            print(
                f"| {criterion} | {temperatures} | {found.accuracy} % | {found.lost}"
                f" | {found.macs_share} % |"
            )
