"""Which criterion saves most at equal accuracy, with and without temperatures.

    python docs-src/figures/criteria.py runs/resnet20-mixed
    python docs-src/figures/criteria.py runs/resnet56-frozen6 --val-from test
    python docs-src/figures/criteria.py runs/b-lenet-0 runs/b-lenet-1 runs/b-lenet-2

The runs must have been evaluated (their records are read). Thresholds are chosen on val and shown
on test; ten cuts of each run, which may be seeds of one recipe, give mean and deviation.
--val-from train: ten random halves of val choose, all of test is shown; test: test is cut in two
ten times. Prints a table.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from early_exit import flags
from early_exit.choosing import Goal, choose, outcome
from early_exit.metrics import mean_std
from early_exit.policy import Policy
from early_exit.records import ExitRecord, score_record
from early_exit.splits import halves

CRITERIA = ("max_prob", "entropy", "margin")  # patience has whole numbers for thresholds
CUTS = 10


def parser() -> flags.Parser:
    """The flags."""
    parser = record_parser("criteria.py", __doc__)
    parser.add_argument("--max-drop", type=float, default=0.5, help="points (default 0.5)")
    return parser


def record_parser(script: str, docstring: str | None, several: bool = True) -> flags.Parser:
    """The flags that name records, of one run or several."""
    runs = "RUN ..." if several else "RUN"
    parser = flags.build_parser(
        script, f"python docs-src/figures/{script} {runs} [flags]", docstring
    )
    parser.add_argument(
        "runs", type=Path, nargs="+" if several else 1, metavar="RUN",
        help="run directory that was evaluated",
    )
    parser.add_argument(
        "--val-from", choices=("train", "test"), default="train",
        help="train: halves of val choose; test: halves of test (default train)",
    )
    return parser


def records(args: argparse.Namespace) -> list[tuple[ExitRecord | None, ExitRecord]]:
    """Of every run: of val, if it chooses, and of test."""
    return [
        (
            None if args.val_from == "test" else ExitRecord.load(run / "records" / "val-off"),
            ExitRecord.load(run / "records" / "test-off"),
        )
        for run in args.runs
    ]


def cut(val: ExitRecord | None, test: ExitRecord, seed: int) -> tuple[ExitRecord, ExitRecord]:
    """What is chosen on, and what is shown."""
    rows, rest = halves((val or test).targets, seed)
    chosen_on = (val or test).subset(rows, "val", "")
    return chosen_on, test if val else test.subset(rest, "test", "")


def over_cuts(
    runs: Sequence[tuple[ExitRecord | None, ExitRecord]],
    choice: Callable[..., Policy],
) -> list[str]:
    """Accuracy, accuracy lost, and MACs, in percent, means and deviations over ten cuts of every
    run, of what is chosen there."""
    outcomes = []
    for val, test in runs:
        cost = test.cost
        for seed in range(CUTS):
            chosen_on, shown_on = cut(val, test, seed)
            policy = choice(chosen_on, cost=cost)
            scored = score_record(shown_on, policy)
            point, _ = outcome(scored, policy, cost)
            lost = np.mean(scored.right[:, -1]) - point.accuracy
            outcomes.append((point.accuracy, lost, point.macs_share))
    return [
        "{:.2f} ± {:.2f}".format(*mean_std([100 * value for value in values]))
        for values in zip(*outcomes, strict=True)
    ]


def main() -> None:
    """Reads and prints."""
    args = parser().parse_args()
    runs = records(args)
    print("| criterion | temperatures | test | lost | MACs |\n| --- | --- | ---: | ---: | ---: |")
    for criterion in CRITERIA:
        for calibrate in (False, True):
            goal = Goal(max_drop=args.max_drop / 100, criterion=criterion, calibrate=calibrate)
            cells = over_cuts(runs, partial(choose, goal=goal))
            words = "fitted" if calibrate else "none"
            print(f"| {criterion} | {words} | {cells[0]} % | {cells[1]} | {cells[2]} % |")


if __name__ == "__main__":
    main()
