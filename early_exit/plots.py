"""The pictures of an evaluation, drawn with matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from early_exit.disk import written_whole
from early_exit.errors import UserError
from early_exit.report import Picture, Report
from early_exit.wording import title

# Okabe and Ito's colours, told apart by colour-blind readers and, by their lightness, in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "figure.dpi": 130,
    "savefig.bbox": "tight",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in the name of a class or a run is a dollar
}


def accuracy_vs_macs(report: Report, path: Path) -> None:
    """Test accuracy against MACs: the curve of shared thresholds, the chosen point, the final exit,
    every exit alone, and exits drawn by lot at the same shares."""
    with figure(path, (7, 4.6)) as (_, axes):
        curve = report.curve
        macs = [100 * point.test.macs_share for point in curve]
        axes.plot(
            macs, [100 * point.test.accuracy for point in curve], color=BLUE, lw=2,
            label="early exit, one threshold for all exits",
        )
        axes.plot(
            macs, [100 * point.random for point in curve], color=GREY, lw=1.5, ls="--",
            label="as many at each exit, at random",
        )
        alone = [row for row in report.exits[:-1] if row.on]
        axes.plot(
            [100 * row.macs_share for row in alone], [100 * row.accuracy for row in alone],
            "s", color=ORANGE, ms=7, label="everybody at one exit",
        )
        for row in alone:
            axes.annotate(
                row.name, (100 * row.macs_share, 100 * row.accuracy), textcoords="offset points",
                xytext=(9, 1), fontsize=9, color=ORANGE,
            )
        final = report.exits[-1]
        axes.plot(
            100 * final.macs_share, 100 * final.accuracy, "D", color="black", ms=7,
            label=f"everybody at the final exit: {100 * final.accuracy:.2f} %",
        )
        axes.plot(
            100 * report.test.macs_share, 100 * report.test.accuracy, "*", color=GREEN, ms=17,
            mec="black", mew=0.7, zorder=5,
            label=f"{'given' if report.thresholds_given else 'chosen on val'}:"
            f" {100 * report.test.accuracy:.2f} % at {100 * report.test.macs_share:.1f} %",
        )
        axes.set_xlabel("multiply-adds, % of the plain network")
        axes.set_ylabel("accuracy on test, %")
        axes.set_title(title(report))
        axes.legend(loc="lower right", fontsize=9)


def share_per_exit(report: Report, path: Path) -> None:
    """How many test images leave at each exit, how often they are right, and what that costs."""
    with figure(path, (7, 0.7 * len(report.exits) + 1.6)) as (_, axes):
        names = [row.name for row in report.exits]
        taken = [100 * row.taken for row in report.exits]
        bars = axes.barh(names, taken, color=BLUE, height=0.62)
        for bar, row in zip(bars, report.exits, strict=True):
            right = (
                "nobody"
                if row.taken_accuracy is None
                else f"{100 * row.taken_accuracy:.1f} % right"
            )
            axes.text(
                bar.get_width() + 1, bar.get_y() + bar.get_height() / 2,
                f"{100 * row.taken:.1f} % leave, {right}, each costs {100 * row.macs_share:.0f} %",
                va="center", fontsize=9.5,
            )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max(taken) * 1.9 + 12)
        axes.set_xticks([tick for tick in (0, 20, 40, 60, 80, 100) if tick <= max(taken) + 10])
        axes.set_xlabel("share of test images, %")
        axes.set_title(f"Where images leave ({report.chosen_by})")


def reliability(report: Report, path: Path) -> None:
    """Accuracy against confidence on test, a panel an exit, without and with its temperature; the
    larger a point, the more answers."""
    columns = min(4, len(report.exits))
    lines = -(-len(report.exits) // columns)
    with figure(path, (2.6 * columns, 2.7 * lines + 0.5), (lines, columns)) as (whole, grid):
        panels = np.atleast_1d(grid).ravel()
        for axes, row in zip(panels, report.exits, strict=False):
            axes.plot([0, 100], [0, 100], color=GREY, lw=1, ls="--")
            for bins, colour, marker, name in (
                (row.reliability_before, ORANGE, "s", "without"),
                (row.reliability, BLUE, "o", "with"),
            ):
                confidence, accuracy, share = 100 * np.array(bins).T
                axes.plot(confidence, accuracy, color=colour, lw=1)
                axes.scatter(
                    confidence, accuracy, 8 + 2 * share, color=colour, marker=marker, label=name,
                    clip_on=False,
                )
            errors = f"ECE {100 * row.ece_before:.1f} / {100 * row.ece_after:.1f} %"
            axes.set_title(f"{row.name}\n{errors}", fontsize=10)
            axes.set_aspect("equal")
            axes.set_xlim(0, 100)
            axes.set_ylim(0, 100)
        for axes in panels[len(report.exits) :]:
            axes.axis("off")
        panels[0].legend(fontsize=8, title="temperature", title_fontsize=8)
        whole.supxlabel("confidence, %", fontsize=10)
        whole.supylabel("accuracy on test, %", fontsize=10)
        whole.tight_layout()


def confusion(confused: np.ndarray, right: np.ndarray, path: Path) -> None:
    """How confused the images of test are whose final answer is right, and wrong: two histograms.

    confused: (images,); right: (images,) bool.
    """
    with figure(path, (7, 3.6)) as (_, axes):
        low, high = np.quantile(confused, (0.0, 0.999))
        edges = np.linspace(low, max(high, low + 1e-6), 41)  # all may be alike
        for mask, colour, style, hatch, name in (
            (right, BLUE, "-", None, "right"), (~right, ORANGE, "--", "///", "wrong")
        ):
            if mask.any():
                axes.hist(
                    confused[mask].clip(edges[0], edges[-1]), edges, density=True, fill=True,
                    histtype="stepfilled", facecolor=(colour + "33"), edgecolor=colour, ls=style,
                    lw=1.5, hatch=hatch, label=f"{name} at the end ({int(mask.sum()):,})",
                )
        axes.set_xlabel("confusion, deviations from the mean of val")
        axes.set_ylabel("density")
        axes.legend()


def gallery(pictures: Sequence[tuple[str, Sequence[Picture]]], path: Path) -> None:
    """Rows of images, each with a caption; none is empty."""
    columns = max(len(row) for _, row in pictures)
    with figure(path, (1.05 * columns + 2.0, 1.3 * len(pictures)), (len(pictures), columns)) as (
        whole, grid,
    ):
        lines = np.reshape(grid, (len(pictures), columns))
        for (caption, row), line in zip(pictures, lines, strict=True):
            for axes in line:
                axes.axis("off")
            line[0].text(
                -0.15, 0.5, caption, transform=line[0].transAxes, ha="right", va="center",
                fontsize=10,
            )
            for picture, axes in zip(row, line, strict=False):
                axes.imshow(picture.pixels, interpolation="nearest")
                axes.set_title(
                    picture.label, fontsize=8, pad=3, color="black" if picture.right else ORANGE,
                    fontweight="normal" if picture.right else "bold",
                )
        whole.subplots_adjust(hspace=0.45, wspace=0.08)


@contextmanager
def figure(path: Path, size: tuple[float, float], grid: tuple[int, int] = (1, 1)) -> Iterator:
    """Figure and axes; written to `path`, whole, when the block ends well."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "plots need matplotlib; run: pip install -r requirements.txt (or pass --no-plots)"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        whole, axes = pyplot.subplots(*grid, figsize=size)
        try:
            yield whole, axes
            with written_whole(path) as file:
                whole.savefig(file, format="png")
        finally:
            pyplot.close(whole)
