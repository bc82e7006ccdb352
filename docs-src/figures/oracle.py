"""How much accuracy a label that decides who exits makes up, and what an oracle would reach.

    python docs-src/figures/oracle.py runs/resnet20-mixed

Some earlier code lets an image leave where the cross-entropy against its *true* label is low.
Nobody has that label when it matters. Here that rule gets, for every threshold of ours, exactly as
many images at each exit as we let leave there, so that the cost is the same; whatever it is more
accurate by is made up. The oracle leaves at the first exit that is right. The run must have been
evaluated (its records are read). Prints a table and draws docs-src/docs/imgs/oracle.png.
"""

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import torch
from criteria import record_parser, records
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from early_exit import flags
from early_exit.disk import written_whole
from early_exit.choosing import Goal, choose, ladder, outcome
from early_exit.plots import BLUE, GREY, ORANGE, STYLE
from early_exit.records import ExitRecord, score_record

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "imgs" / "oracle.png"


def parser() -> flags.Parser:
    """The flags."""
    return record_parser("oracle.py", __doc__, several=False)


def by_label(surprise: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The exit (images,) that each image takes if at every exit `counts` of those that are left do
    so, with the lowest surprise (images, exits) about their label."""
    taken = np.full(len(surprise), len(counts) - 1)
    left = np.arange(len(surprise))
    for index, count in enumerate(counts[:-1]):
        order = left[np.argsort(surprise[left, index], kind="stable")]
        taken[order[:count]] = index
        left = order[count:]
    return taken


def surprise_of(record: ExitRecord) -> np.ndarray:
    """Cross-entropy of every exit against the true label, (images, exits)."""
    targets = torch.from_numpy(record.targets)
    columns = [
        cross_entropy(record.exit_logits(index), targets, reduction="none")
        for index in range(len(record.info.exit_names))
    ]
    return torch.stack(columns, dim=1).numpy()


def main() -> None:
    """Reads, draws and prints."""
    args = parser().parse_args()
    ((val, test),) = records(args)
    val, cost = val or test, test.cost
    surprise, rows = surprise_of(test), np.arange(len(test))
    chosen = choose(val, Goal(max_drop=0.005), cost)
    scored = score_record(test, chosen)
    right, shares = scored.right, np.array(cost.shares())
    points = []
    for policy in [chosen, *ladder(val, Goal(max_drop=0.0), cost)]:
        policy = dataclasses.replace(policy, temperatures=chosen.temperatures)
        point, taken = outcome(scored, policy, cost)
        label = by_label(surprise, np.bincount(taken, minlength=len(shares)))
        points.append((point.macs_share, point.accuracy, right[rows, label].mean()))
    oracle = np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1] - 1)
    best = shares[oracle].mean(), right[rows, oracle].mean()
    (macs, ours, label), curve = points[0], 100 * np.array(sorted(points[1:])).T

    print("| who decides | test | MACs |\n| --- | ---: | ---: |")
    for name, accuracy, share in (
        ("the network, thresholds chosen on val for half a point", ours, macs),
        ("the label, as many at each exit", label, macs),
        ("the oracle", best[1], best[0]),
        ("nobody: all at the final exit", right[:, -1].mean(), shares[-1]),
    ):
        print(f"| {name} | {100 * accuracy:.2f} % | {100 * share:.1f} % |")
    widest = (curve[2] - curve[1]).argmax()
    print(
        f"most is made up at {curve[0, widest]:.1f} % of the MACs: {curve[2, widest]:.2f} instead"
        f" of {curve[1, widest]:.2f} %"
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4))
        axes = figure.add_subplot()
        axes.fill_between(
            curve[0], curve[1], curve[2], facecolor="none", edgecolor=GREY, hatch="///", lw=0,
            label="made up: the label decides who exits",
        )
        axes.plot(curve[0], curve[2], color=GREY, lw=1.5, ls="--")
        axes.plot(curve[0], curve[1], color=BLUE, lw=2, label="the network decides")
        axes.plot(100 * best[0], 100 * best[1], "X", color=ORANGE, ms=11, mec="black", mew=0.6,
                  label="oracle: the first exit that is right (a bound)")
        axes.set_xlabel("multiply-adds, % of the plain network")
        axes.set_ylabel("accuracy on test, %")
        axes.legend(loc="lower right", fontsize=9)
        with written_whole(IMAGE) as file:
            figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
