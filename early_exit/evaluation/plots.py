"""The plots of an evaluation as PNG files, for report.md, the README and the docs, with matplotlib.

All other figures are only on the page (`early_exit.evaluation.charts`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.evaluation.decoration import optional
from early_exit.evaluation.markdown import title
from early_exit.evaluation.report import Picture, Report
from early_exit.system.files import write_bytes
from early_exit.system.text import shortened
from early_exit.trained import Splits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

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
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Hiragino Sans GB",
    "Arial Unicode MS",
    "Noto Emoji",
)
MAX_NAME = 24  # letters of a class's name in a figure
MAX_TITLE = 90
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
    """Draws the plots of a report into a directory, each alone: one that fails is left out. Returns
    the captions of the others by file name."""
    drawings: dict[str, Callable[[Path], None]] = {}
    if report.early_exits:  # in a plain network nothing is chosen
        drawings["accuracy_vs_macs"] = partial(accuracy_vs_macs, report)
        drawings["confusion"] = lambda path: confusion(
            splits.confusion, splits.correct_test[:, -1], path
        )
    drawings |= {name: partial(gallery, rows) for name, rows in galleries.items() if rows}

    captions = {}
    for name, caption in CAPTIONS.items():
        path = directory / f"{name}.png"
        if name in drawings:
            with optional(str(path)):
                drawings[name](path)
                captions[path.name] = caption
    return captions


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
        axes.set_title(shortened(title(report), MAX_TITLE))
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
            shortened(row.name, MAX_NAME),
            point,
            textcoords="offset points",
            xytext=(9, 1),
            fontsize=9,
            color=ORANGE,
        )
    axes.plot(
        100 * report.exits[-1].macs_share,
        100 * report.final_accuracy,
        "D",
        color="black",
        ms=7,
        label=f"no exit is taken: {100 * report.final_accuracy:.2f} %",
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
                    "\n".join(shortened(name, MAX_NAME) for name in picture.label.split("\n")),
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

    size: in inches; grid: rows and columns of axes. Needs matplotlib, but not pyplot; the user's
    settings and backend have no effect.
    """
    with own_settings(STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawn = Figure(figsize=size)
        FigureCanvasAgg(drawn)
        yield drawn, drawn.subplots(*grid)
        content = io.BytesIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn.savefig(content, format="png")
    write_bytes(path, content.getvalue())
    _report_missing_glyphs(path.name, [str(warning.message) for warning in caught])


@contextmanager
def own_settings(style: Mapping[str, Any]) -> Iterator[None]:
    """Matplotlib's defaults with those of `style`; silent on fonts and caches."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        matplotlib = _import_matplotlib()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(style)
            matplotlib.rcParams["font.family"] = _font_families()
            yield
    finally:
        logger.setLevel(level)


def _import_matplotlib() -> Any:
    """The package, also if the environment names a backend that it does not know: that would be an
    error of the import."""
    if "matplotlib" in sys.modules:
        return importlib.import_module("matplotlib")
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for others in this process
    return matplotlib


def _font_families() -> list[str]:
    """Matplotlib's own font, and for the letters that it lacks, those of `FALLBACK_FONTS` that are
    installed."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]


def _report_missing_glyphs(name: str, messages: Sequence[str]) -> None:
    """Logs in one line that letters of a figure could not be drawn."""
    found = [re.match(r"Glyph (\d+) ", message) for message in messages]
    letters = dict.fromkeys(chr(int(match[1])) for match in found if match)
    if letters:
        log.warning(
            "%s shows boxes instead of letters that no installed font has (%s); install a font for"
            " them, such as Noto Sans CJK",
            name,
            shortened("".join(letters), 20),
        )
