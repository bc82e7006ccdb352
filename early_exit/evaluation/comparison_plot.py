"""The figure of a comparison of groups of runs, with matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from early_exit.evaluation import plots
from early_exit.evaluation.groups import Group
from early_exit.system.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour, dash and marker of a curve: 7, 5 and 8 have no common factor, so 280 curves differ.
COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^vPXph"


def draw(groups: Sequence[Group], path: Path) -> None:
    """Test accuracy against MACs: for each group its curve, its chosen policy and its final exit;
    a plain network is one point."""
    with plots.figure(path, (8, 5.2)) as (_, axes):
        for index, group in enumerate(groups):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            if group.plain:
                _draw_point(axes, group, colour, fmt=marker, ms=9)
                axes.annotate(
                    shortened(group.label, plots.MAX_TITLE),
                    (1e-6 * group.macs().mean, 100 * group.accuracy().mean),
                    textcoords="offset points",
                    xytext=(4, 9),
                    ha="right",
                    fontsize=9,
                )
                continue
            dash = DASHES[index % len(DASHES)]
            first_mark = 0.02 + 0.14 * index / len(groups)  # marks of close curves do not overlap
            _draw_curve(axes, group, colour, ls=dash, marker=marker, markevery=(first_mark, 0.14))
            _draw_point(axes, group, colour, fmt="*", ms=15, mew=0.7)
        if not all(group.plain for group in groups):
            for shape, size, words in (
                ("*", 11, "chosen policy, ± as in the table"),
                ("D", 6, "final exit"),
            ):
                axes.plot([], [], shape, color="white", mec="black", ms=size, label=words)
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, handlelength=4)
        axes.set_xlabel("multiply-adds per image, millions")
        axes.set_ylabel("accuracy on test, %")
        axes.set_title(shortened(groups[0].first.dataset, plots.MAX_TITLE))


def _draw_point(axes: Axes, group: Group, colour: str, **style: Any) -> None:
    """The chosen policy, with bars of one standard deviation."""
    macs, accuracy = group.macs(), group.accuracy()
    axes.errorbar(
        1e-6 * macs.mean,
        100 * accuracy.mean,
        xerr=1e-6 * (macs.std or 0),
        yerr=100 * (accuracy.std or 0),
        ecolor=colour,
        capsize=3,
        zorder=5,
        mec="black",
        mfc=colour,
        **style,
    )


def _draw_curve(axes: Axes, group: Group, colour: str, **style: Any) -> None:
    """The curve of a shared threshold, its band over seeds, and the final exit."""
    curve = group.curve()
    macs, accuracy, std = 1e-6 * curve.macs, 100 * curve.accuracy, 100 * curve.std
    axes.plot(
        macs,
        accuracy,
        color=colour,
        lw=1.8,
        ms=7,
        mec="white",
        mew=0.6,
        label=re.sub(
            "^_", " _", shortened(group.label, plots.MAX_TITLE)
        ),  # matplotlib omits labels that begin with _
        **style,
    )
    if std.any():
        axes.fill_between(macs, accuracy - std, accuracy + std, lw=0, color=colour, alpha=0.2)
    final_macs = macs[-1] if len(macs) else 1e-6 * group.first.plain_macs
    axes.plot(
        final_macs,
        100 * group.final_accuracy().mean,
        "D",
        ms=6,
        mfc=colour,
        mec="black",
        mew=0.7,
        zorder=4,
    )
