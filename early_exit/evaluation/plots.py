"""The plots of an evaluation as PNG files, for report.md, the README and the docs, with matplotlib.

All other figures are only on the page (`early_exit.evaluation.charts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.errors import UserError
from early_exit.evaluation.markdown import title
from early_exit.evaluation.report import Picture, Report
from early_exit.system.files import atomic_file
from early_exit.trained import Splits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: they differ for colour-blind readers, and in lightness when printed grey.
BLUE, ORANGE, GREEN, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#F0E442", "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "figure.dpi": 130,
    "savefig.bbox": "tight",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in the name of a class or a run does not start mathematics
}
Rows = Sequence[tuple[str, Sequence[Picture]]]
"""The rows of a gallery: a caption and pictures."""
CAPTIONS = {
    "accuracy_vs_macs": "Accuracy against multiply-adds",
    "gallery": "The easiest and hardest images of each exit (wrong answers in bold)",
    "confusion": "Confusion of the exits, by whether the final exit is right or wrong",
    "overthinking": "Right at an early exit, wrong at the final exit (both answers)",
}


def draw_all(
    report: Report, splits: Splits, galleries: Mapping[str, Rows], directory: Path
) -> dict[str, str]:
    """Draws the plots of a report into a directory; returns their captions by file name."""
    accuracy_vs_macs(report, directory / "accuracy_vs_macs.png")
    confusion(splits.confusion, splits.correct_test[:, -1], directory / "confusion.png")
    for name, rows in galleries.items():
        if rows:
            gallery(rows, directory / f"{name}.png")
    return {
        f"{name}.png": caption
        for name, caption in CAPTIONS.items()
        if (directory / f"{name}.png").exists()
    }


def accuracy_vs_macs(report: Report, path: Path) -> None:
    """Test accuracy against MACs: one threshold for all exits, random exits, all images at one
    exit, and the chosen policy."""
    with figure(path, (7, 4.6)) as (_, axes):
        macs = [100 * point.test.macs_share for point in report.curve]
        axes.plot(
            macs,
            [100 * point.test.accuracy for point in report.curve],
            color=BLUE,
            lw=2,
            label="one threshold for all exits",
        )
        axes.plot(
            macs,
            [100 * point.random for point in report.curve],
            color=GREY,
            lw=1.5,
            ls="--",
            label="random exits, as many at each exit",
        )
        _draw_exits(axes, report)
        chosen = "given" if report.choice.thresholds_given else "chosen on val"
        axes.plot(
            100 * report.test.macs_share,
            100 * report.test.accuracy,
            "*",
            color=GREEN,
            ms=17,
            mec="black",
            mew=0.7,
            zorder=5,
            label=f"{chosen}: {100 * report.test.accuracy:.2f} % at"
            f" {100 * report.test.macs_share:.1f} %",
        )
        axes.set_xlabel("multiply-adds, % of the plain network")
        axes.set_ylabel("accuracy on test, %")
        axes.set_title(title(report))
        axes.legend(loc="lower right", fontsize=9)


def _draw_exits(axes: Axes, report: Report) -> None:
    """A square for all images at each enabled early exit, a diamond for no exit taken."""
    enabled = [row for row in report.early_exits if row.enabled]
    points = [(100 * row.macs_share, 100 * row.accuracy) for row in enabled]
    axes.plot(
        [macs for macs, _ in points],
        [accuracy for _, accuracy in points],
        "s",
        color=ORANGE,
        ms=7,
        label="all images at one exit",
    )
    for row, point in zip(enabled, points, strict=True):
        axes.annotate(
            row.name, point, textcoords="offset points", xytext=(9, 1), fontsize=9, color=ORANGE
        )
    final = report.exits[-1]
    axes.plot(
        100 * final.macs_share,
        100 * final.accuracy,
        "D",
        color="black",
        ms=7,
        label=f"no exit is taken: {100 * final.accuracy:.2f} %",
    )


def confusion(confused: np.ndarray, correct: np.ndarray, path: Path) -> None:
    """Histograms of the confusion of the test images that the final exit gets right, and wrong.

    confused: (images,) the confusion; correct: (images,) bool, of the final exit.
    """
    with figure(path, (7, 3.6)) as (_, axes):
        low, high = np.quantile(confused, (0.0, 0.999))
        edges = np.linspace(low, max(high, low + 1e-6), 41)  # the values may all be equal
        for mask, colour, style, hatch, name in (
            (correct, BLUE, "-", None, "right"),
            (~correct, ORANGE, "--", "///", "wrong"),
        ):
            if mask.any():
                axes.hist(
                    confused[mask].clip(edges[0], edges[-1]),
                    edges,
                    density=True,
                    fill=True,
                    histtype="stepfilled",
                    facecolor=(colour + "33"),
                    edgecolor=colour,
                    ls=style,
                    lw=1.5,
                    hatch=hatch,
                    label=f"final exit {name} ({int(mask.sum()):,})",
                )
        axes.set_xlabel("confusion, standard deviations from the mean of val")
        axes.set_ylabel("density")
        axes.legend()


def gallery(rows: Rows, path: Path) -> None:
    """Rows of images, each with a caption. No row is empty."""
    columns = max(len(pictures) for _, pictures in rows)
    size = (1.05 * columns + 2.0, 1.3 * len(rows))
    with figure(path, size, (len(rows), columns)) as (drawn, grid):
        grid = np.reshape(grid, (len(rows), columns))
        for (caption, pictures), grid_row in zip(rows, grid, strict=True):
            for axes in grid_row:
                axes.axis("off")
            grid_row[0].text(
                -0.15,
                0.5,
                caption,
                transform=grid_row[0].transAxes,
                ha="right",
                va="center",
                fontsize=10,
            )
            for picture, axes in zip(pictures, grid_row, strict=False):
                axes.imshow(picture.pixels, interpolation="nearest")
                axes.set_title(
                    picture.label,
                    fontsize=8,
                    pad=3,
                    color="black" if picture.correct else ORANGE,
                    fontweight="normal" if picture.correct else "bold",
                )
        drawn.subplots_adjust(hspace=0.45, wspace=0.08)


@contextmanager
def figure(
    path: Path, size: tuple[float, float], grid: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, saved to `path` if the block raises nothing; whole or not at all.

    size: in inches; grid: rows and columns of axes. Raises UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "plots need matplotlib; run: pip install -r requirements.txt (or pass --no-plots)"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        drawn, axes = pyplot.subplots(*grid, figsize=size)
        try:
            yield drawn, axes
            with atomic_file(path) as file:
                drawn.savefig(file, format="png")
        finally:
            pyplot.close(drawn)
