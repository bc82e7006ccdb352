"""The figure of benchmarks/serving.py."""

from collections.abc import Sequence
from pathlib import Path

from serving_arms import ADAPTIVE, NAMES, PLAIN, REGROUPED, TOGETHER
from serving_results import Loaded

from early_exit.evaluation import plots

LINES = {
    PLAIN: (plots.GREY, "D", ":"),
    TOGETHER: (plots.ORANGE, "s", "--"),
    REGROUPED: (plots.BLUE, "o", "-"),
    ADAPTIVE: (plots.GREEN, "^", "-."),
}


def draw(found: Sequence[Loaded], target: float, title: str, path: Path) -> None:
    """p50, p99 and, if it is known, accuracy against requests/s. target: seconds of the p99."""
    accuracy = any(one.seen.accuracy is not None for one in found)
    panels = [
        ("median latency, ms", lambda one: 1000 * one.seen.p50),
        ("99th percentile of latency, ms", lambda one: 1000 * one.seen.p99),
    ]
    if accuracy:
        panels.append(("accuracy of the answers, %", lambda one: 100 * (one.seen.accuracy or 0)))
    else:
        panels.append(("answers/s", lambda one: one.seen.answers_per_second))
    with plots.figure(path, (16, 4.4), (1, len(panels))) as (drawn, grid):
        drawn.subplots_adjust(wspace=0.25)
        for axes, (label, value) in zip(grid, panels, strict=True):
            for name in dict.fromkeys(one.arm for one in found):
                points = [one for one in found if one.arm == name and one.seen.answered]
                colour, marker, dash = LINES[name]
                axes.plot(
                    [one.rate for one in points],
                    [value(one) for one in points],
                    color=colour,
                    marker=marker,
                    ls=dash,
                    lw=2,
                    label=NAMES[name],
                )
            axes.set_xlabel("requests/s")
            axes.set_ylabel(label)
            axes.set_xlim(left=0)
            if "latency" in label:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
        grid[1].axhline(1000 * target, color="black", lw=1)
        grid[1].annotate(
            f"target, {1000 * target:g} ms",
            (0, 1000 * target),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize=9,
        )
        handles, labels = grid[0].get_legend_handles_labels()
        drawn.legend(
            handles, labels, loc="upper center", ncols=len(labels), bbox_to_anchor=(0.5, 0)
        )
        drawn.suptitle(title)
