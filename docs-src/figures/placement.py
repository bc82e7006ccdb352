"""Where exits pay: every place on its own, and as many as are worth it.

    python docs-src/figures/placement.py runs/cdl-resnet56 --val-from test

For a run with an exit after every block (--regime cdl). One exit alone is switched on after the
other, with the threshold that gives up half a point on val; what that saves on test is drawn
against where the exit lies. Then exits are added, each time the one that saves most on val. The run
must have been evaluated (its records are read). Means and deviations over ten cuts, as in
criteria.py. Prints tables and draws docs-src/docs/imgs/placement.png.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from criteria import CUTS, cut, record_parser, records
from matplotlib.figure import Figure

from early_exit import flags
from early_exit.choosing import Goal, choose, outcome
from early_exit.cost import Cost
from early_exit.disk import written_whole
from early_exit.metrics import mean_std
from early_exit.overthinking import right_answers
from early_exit.plots import BLUE, GREY, ORANGE, STYLE
from early_exit.policy import NEVER, Policy
from early_exit.records import ExitRecord, Scores, score_record
from early_exit.thresholds import for_max_drop, shared_curve

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "imgs" / "placement.png"
DROP = 0.005
MOST = 8  # exits that are added


def parser() -> flags.Parser:
    """The flags."""
    return record_parser("placement.py", __doc__, several=False)


def alone_on(policy: Policy, scored: Scores, on: Sequence[int], cost: Cost) -> tuple[Policy, float]:
    """The policy with only the exits `on`, its threshold for half a point given up on the sample,
    and what an image then costs there, as a share of the plain network's MACs."""
    enabled = tuple(index in on for index in range(policy.num_exits - 1))
    curve = shared_curve(scored, enabled, cost.cumulative(enabled))
    threshold = for_max_drop(curve, DROP)
    chosen = dataclasses.replace(policy, enabled=enabled).shared(threshold)
    return chosen, float(curve.macs[curve.thresholds == threshold][0] / cost.plain_macs)


def added(policy: Policy, scored: Scores, cost: Cost) -> list[list[int]]:
    """Exits, one more each time: the one with which the sample is cheapest."""
    on: list[int] = []
    steps = []
    for _ in range(min(MOST, policy.num_exits - 1)):
        others = [index for index in range(policy.num_exits - 1) if index not in on]
        price = {index: alone_on(policy, scored, [*on, index], cost)[1] for index in others}
        on = [*on, min(price, key=price.get)]
        steps.append(on)
    return steps


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """Mean and deviation, in percent."""
    mean, std = mean_std([100 * value for value in values])
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def shown(policy: Policy, test: ExitRecord, cost: Cost) -> tuple[float, float]:
    """Accuracy on test, and the share of MACs."""
    point, _ = outcome(score_record(test, policy), policy, cost)
    return point.accuracy, point.macs_share


def main() -> None:
    """Reads, draws and prints."""
    args = parser().parse_args()
    ((whole_val, whole_test),) = records(args)
    cost = whole_test.cost
    early = len(cost.exit_names) - 1
    alone: list[list[tuple[float, float]]] = [[] for _ in range(early)]
    several: list[list[tuple[float, float, str]]] = []
    for seed in range(CUTS):
        val, test = cut(whole_val, whole_test, seed)
        fitted = choose(val, Goal(thresholds=(NEVER,)), cost)  # temperatures, and nobody leaves
        scored = score_record(val, fitted)
        chosen = partial(alone_on, fitted, scored, cost=cost)
        for index in range(early):
            alone[index].append(shown(chosen([index])[0], test, cost))
        several.append(
            [
                (*shown(chosen(on)[0], test, cost),
                 " ".join(cost.exit_names[index] for index in sorted(on)))
                for on in [*added(fitted, scored, cost), range(early)]
            ]
        )
    accuracy = right_answers(whole_test).mean(axis=0)
    places = np.cumsum(cost.stage_macs)[:-1] / cost.plain_macs

    print("| exit after | lies at | its head | alone, test | saves | costs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for index in range(early):
        points, shares = zip(*alone[index], strict=True)
        saved = spread([1 - share for share in shares])
        lost = spread([accuracy[-1] - point for point in points], 2)
        print(
            f"| {cost.exit_names[index]} | {100 * places[index]:.1f} %"
            f" | {100 * cost.head_macs[index] / cost.plain_macs:.2f} %"
            f" | {100 * accuracy[index]:.2f} % | {saved} % | {lost} points |"
        )
    print("\n| exits | test | MACs | first cut's |\n| ---: | ---: | ---: | --- |")
    for number, cells in enumerate(zip(*several, strict=True)):
        points, shares, names = zip(*cells, strict=True)
        label = "all" if number == len(several[0]) - 1 else str(number + 1)
        which = "" if label == "all" else names[0]
        print(f"| {label} | {spread(points, 2)} % | {spread(shares)} % | {which} |")
    draw(places, accuracy, [[1 - share for _, share in points] for points in alone])


def draw(places: np.ndarray, accuracy: np.ndarray, saved: Sequence[Sequence[float]]) -> None:
    """Accuracy of each exit above, what it saves alone below, against where it lies."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 5))
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(100 * places, 100 * accuracy[:-1], "o-", color=ORANGE, ms=5)
        above.axhline(100 * accuracy[-1], color=GREY, ls="--", lw=1)
        above.text(0, 100 * accuracy[-1] - 1, "the whole network", va="top", fontsize=9)
        above.set_ylabel("alone, % right")
        means, deviations = zip(*(mean_std([100 * one for one in each]) for each in saved),
                                strict=True)
        below.errorbar(
            100 * places, means, deviations, fmt="s-", color=BLUE, ms=5, capsize=2
        )
        below.axhline(0, color=GREY, lw=1)
        below.set_ylabel("multiply-adds saved, %")
        below.set_xlabel("where the only exit lies, % of the multiply-adds")
        figure.tight_layout()
        with written_whole(IMAGE) as file:
            figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
