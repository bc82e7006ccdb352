"""Measures how much accuracy is fictitious if the label decides who exits, and draws an oracle.

    python docs-src/figures/oracle.py runs/resnet20-mixed

Some earlier code lets an image exit if the cross-entropy against its *true* label is low. That
label is not available in use. Here, for each threshold of our policy, that rule lets exactly as
many images exit at each exit as our policy does, so the cost is the same and all additional
accuracy is fictitious. The oracle exits at the first exit that is correct. The run must have been
evaluated, because its records are read. Prints a table and draws docs-src/docs/imgs/oracle.png.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    )
    from early_exit.cli.border import run

    run("oracle", "oracle.py")

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from run_records import RunRecords, run_parser
from torch.nn.functional import cross_entropy

from early_exit.choosing.choice import candidates, choose
from early_exit.choosing.goals import MaxDrop
from early_exit.choosing.outcome import Outcome, outcome_of
from early_exit.choosing.record import ExitRecord, score_record
from early_exit.cli import flags
from early_exit.evaluation import plots

IMAGE = Path(__file__).resolve().parents[1] / "docs/imgs/oracle.png"
MAX_DROP = 0.005


@dataclass(frozen=True, order=True)
class Compared:
    """A policy and the rule that uses the label, with as many images at each exit."""

    macs_share: float
    policy_accuracy: float
    label_accuracy: float


@dataclass(frozen=True)
class Oracle:
    """Exits at the first exit that is correct, or at the final one."""

    macs_share: float
    accuracy: float


def label_losses(record: ExitRecord) -> np.ndarray:
    """The cross-entropy of every exit against the true label, (images, exits)."""
    targets = torch.from_numpy(record.targets)
    columns = [
        cross_entropy(record.exit_logits(index), targets, reduction="none")
        for index in range(len(record.info.exit_names))
    ]
    return torch.stack(columns, dim=1).numpy()


def exits_by_label(losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The exit of each image, (images,), if the label decides: at exit i, the `counts[i]` remaining
    images with the lowest loss exit.

    losses: (images, exits); counts: (exits,).
    """
    exit_index = np.full(len(losses), len(counts) - 1)
    remaining = np.arange(len(losses))
    for index, count in enumerate(counts[:-1]):
        order = remaining[np.argsort(losses[remaining, index], kind="stable")]
        exit_index[order[:count]] = index
        remaining = order[count:]
    return exit_index


def compare(outcome: Outcome, losses: np.ndarray) -> Compared:
    """A policy beside the rule that uses the label."""
    counts = np.bincount(outcome.exit_index, minlength=losses.shape[1])
    correct, by_label = outcome.scored.correct, exits_by_label(losses, counts)
    label_accuracy = correct[np.arange(len(correct)), by_label].mean()
    return Compared(outcome.point.macs_share, outcome.point.accuracy, label_accuracy)


def oracle_of(correct: np.ndarray, shares: np.ndarray) -> Oracle:
    """correct: (images, exits) bool; shares: (exits,) of the plain network's MACs."""
    exit_index = np.where(correct.any(axis=1), correct.argmax(axis=1), correct.shape[1] - 1)
    return Oracle(shares[exit_index].mean(), correct.any(axis=1).mean())


def draw(curve: Sequence[Compared], oracle: Oracle) -> None:
    """Accuracy against multiply-adds with and without the label, and the oracle.

    curve: in order of rising multiply-adds.
    """
    macs, policy, label = 100 * np.array([dataclasses.astuple(row) for row in curve]).T
    with plots.figure(IMAGE, (7, 4.4)) as (_, axes):
        axes.fill_between(
            macs,
            policy,
            label,
            facecolor="none",
            edgecolor=plots.GREY,
            hatch="///",
            lw=0,
            label="fictitious: the label decides who exits",
        )
        axes.plot(macs, label, color=plots.GREY, lw=1.5, ls="--")
        axes.plot(macs, policy, color=plots.BLUE, lw=2, label="the policy decides")
        axes.plot(
            100 * oracle.macs_share,
            100 * oracle.accuracy,
            "X",
            color=plots.ORANGE,
            ms=11,
            mec="black",
            mew=0.6,
            label="oracle: the first correct exit (a bound)",
        )
        axes.set_xlabel("multiply-adds, % of the plain network")
        axes.set_ylabel("accuracy on test, %")
        axes.legend(loc="lower right", fontsize=9)


def parser() -> flags.Parser:
    """The script's flags."""
    return run_parser("oracle.py", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and draws the figure."""
    args = parser().parse_args(argv)
    records = RunRecords.load(args.run, args.val_from)
    val, test = records.cut(0) if records.val is None else (records.val, records.test)
    cost = test.cost
    chosen, losses = choose(val, MaxDrop(MAX_DROP), cost), label_losses(test)
    scored = score_record(test, chosen.with_all_enabled())
    point = compare(outcome_of(scored, chosen, cost), losses)
    curve = sorted(
        compare(outcome_of(scored, policy, cost), losses)
        for policy in candidates(val, MaxDrop(MAX_DROP), cost)
    )
    shares = np.array(cost.shares())
    oracle = oracle_of(scored.correct, shares)

    print("| exits decided by | accuracy on test | MACs |\n| --- | ---: | ---: |")
    for name, accuracy, share in (
        ("the policy, chosen on val for half a point", point.policy_accuracy, point.macs_share),
        ("the label, as many at each exit", point.label_accuracy, point.macs_share),
        ("the oracle", oracle.accuracy, oracle.macs_share),
        ("nothing: all images at the final exit", scored.correct[:, -1].mean(), shares[-1]),
    ):
        print(f"| {name} | {100 * accuracy:.2f} % | {100 * share:.1f} % |")
    widest = max(curve, key=lambda row: row.label_accuracy - row.policy_accuracy)
    print(
        f"the difference is largest at {100 * widest.macs_share:.1f} % of the MACs:"
        f" {100 * widest.label_accuracy:.2f} instead of {100 * widest.policy_accuracy:.2f} %"
    )
    draw(curve, oracle)
