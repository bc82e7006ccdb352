"""The figure of a comparison of groups of runs, with matplotlib."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.evaluation import mark_labels, plots
from early_exit.evaluation.comparison import Comparison
from early_exit.evaluation.groups import Group, MeanCurve, names_of, same_networks
from early_exit.evaluation.mark_labels import Mark
from early_exit.evaluation.panels import Panel
from early_exit.evaluation.statics import LISTED, PUBLIC, Static
from early_exit.evaluation.stored import Value
from early_exit.system.text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour, dash and marker of a series: 7, 5 and 8 have no common factor, so 280 series differ.
COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^vPXph"
# By kind of static network, but for plain runs: words for the legend, and the mark.
STATIC_STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    PUBLIC: (
        "public networks, as their sources state",
        {"marker": ">", "color": plots.GREY, "mec": "black", "ms": 8},
    ),
    LISTED: (
        "static networks of --statics",
        {"marker": "s", "color": "white", "mec": "black", "ms": 6},
    ),
}
LITERATURE_STYLE: dict[str, Any] = {
    "marker": "D",
    "mfc": "none",
    "mec": plots.GREY,
    "mew": 1.4,
    "ms": 6.5,
}
COLUMNS = 3
SAME = 0.002  # curves of one network that differ by less are drawn once
LINE = 46  # letters of a line of the legend


@dataclass(frozen=True)
class _Series:
    """One network, its evaluations for several goals and in several runtimes, and how it is
    drawn."""

    groups: tuple[Group, ...]
    name: str
    index: int
    first_mark: float
    """Where along its curve the markers begin, so that those of close curves do not overlap."""

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def marker(self) -> str:
        return MARKERS[self.index % len(MARKERS)]

    @property
    def label(self) -> str:
        """matplotlib omits labels that begin with _."""
        label = shortened(self.name, plots.MAX_TITLE)
        return re.sub("^_", " _", "\n".join(textwrap.wrap(label, LINE)) or label)


@dataclass(frozen=True)
class _Axis:
    """One kind of cost: what each thing costs, in the unit of the axis."""

    title: str
    label: str
    chosen: Callable[[Group], Value | None]
    curve: Callable[[Group], MeanCurve | None]
    static: Callable[[Static], float | None]
    exact: bool
    """Whether it is the same in every measurement."""


def draw(comparison: Comparison, path: Path) -> None:
    """Test accuracy against MACs, and in a panel for each runtime against seconds: for each
    multi-exit run its curve and its chosen policy; static networks and literature are marks."""
    groups, count = comparison.groups, 1 + len(comparison.panels)
    networks = same_networks(groups)
    series = [
        _Series(same, name, index, 0.02 + 0.14 * index / len(networks))
        for index, (same, name) in enumerate(zip(networks, names_of(networks), strict=True))
    ]
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    size = (8, 5.2) if count == 1 else (6.0 * columns, 5.0 * rows)
    title = shortened(groups[0].first.dataset, plots.MAX_TITLE)
    axes_of = [_macs_axis(title), *map(_seconds_axis, comparison.panels)]
    with plots.figure(path, size, (rows, columns)) as (drawn, grid):
        drawn.subplots_adjust(wspace=0.2, hspace=0.42)
        cells = np.reshape(grid, -1)
        for axes in cells[count:]:
            axes.set_visible(False)
        for axis, axes in zip(axes_of, cells, strict=False):
            literature = comparison.points if axis is axes_of[0] else ()
            marks = [
                Mark(1e-6 * point.macs, 100 * point.accuracy, point.label, plots.GREY)
                for point in literature
                if point.macs is not None
            ]
            _draw_panel(axes, axis, series, comparison, marks)
        _draw_legend(cells[columns - 1], series, comparison)


def _macs_axis(title: str) -> _Axis:
    def curve(group: Group) -> MeanCurve:
        found = group.curve()
        return found._replace(costs=1e-6 * found.costs)

    return _Axis(
        title,
        "multiply-adds per image, millions",
        chosen=lambda group: _scaled(group.macs(), 1e-6),
        curve=curve,
        static=lambda static: 1e-6 * static.macs,
        exact=True,
    )


def _seconds_axis(panel: Panel) -> _Axis:
    def timed(group: Group) -> bool:
        return any(group is other for other in panel.groups)

    caution = f"\n(!) {panel.caution}" if panel.caution else ""
    return _Axis(
        panel.title + caution,
        f"time per image, {panel.unit}",
        chosen=lambda group: panel.measured(group) if timed(group) else None,
        curve=lambda group: panel.curve(group) if timed(group) else None,
        static=panel.static,
        exact=False,
    )


def _draw_panel(
    axes: Axes,
    axis: _Axis,
    series: Sequence[_Series],
    comparison: Comparison,
    literature: Sequence[Mark],
) -> None:
    for one in series:
        _draw_curves(axes, axis, one)
        for group in one.groups:
            if (chosen := axis.chosen(group)) is not None:
                _draw_chosen(axes, one, chosen, group)
    marks = _draw_statics(axes, axis, comparison.statics)
    for mark in literature:
        axes.plot(mark.x, mark.y, ls="", zorder=5, **LITERATURE_STYLE)
    axes.set(xlabel=axis.label, ylabel="accuracy on test, %")
    axes.set_title(axis.title, fontsize=11)
    _set_limits(axes, comparison)
    drawn = [line.get_xydata() for line in axes.get_lines()]
    others = np.concatenate([np.asarray(xy, dtype=float) for xy in drawn]) if drawn else np.empty(0)
    mark_labels.place(axes, [*marks, *literature], others)


def _draw_curves(axes: Axes, axis: _Axis, series: _Series) -> None:
    """The curve of the first evaluation with its band over seeds, those of others that differ, as
    with other exits enabled, as thin lines, and the final exit."""
    found = [axis.curve(group) for group in series.groups if not group.plain]
    curves = [curve for curve in found if curve is not None]
    for index, curve in enumerate(curves):
        costs, accuracy, std = curve.costs, 100 * curve.accuracy, 100 * curve.std
        if index and axis.exact and not any(_close(curve, other) for other in curves[:index]):
            axes.plot(costs, accuracy, color=series.colour, lw=0.9)
        if index:
            continue
        axes.plot(
            costs,
            accuracy,
            color=series.colour,
            lw=1.8,
            ms=7,
            mec="white",
            mew=0.6,
            ls=DASHES[series.index % len(DASHES)],
            marker=series.marker,
            markevery=(series.first_mark, 0.14),
        )
        if std.any():
            band = (accuracy - std, accuracy + std)
            axes.fill_between(costs, *band, lw=0, color=series.colour, alpha=0.2)
    if curves and axis.exact:
        first, costs = series.groups[0], curves[0].costs
        end = costs[-1] if len(costs) else 1e-6 * first.first.plain_macs
        mark: dict[str, Any] = {"mfc": series.colour, "mec": "black"}
        axes.plot(end, 100 * first.final_accuracy().mean, "D", ms=6, mew=0.7, zorder=4, **mark)


def _close(one: MeanCurve, other: MeanCurve) -> bool:
    """Whether two curves differ by less than `SAME` over the costs of both."""
    if not len(one.costs) or not len(other.costs):
        return not len(one.costs)
    inside = (one.costs >= other.costs[0]) & (one.costs <= other.costs[-1])
    expected = np.interp(one.costs[inside], other.costs, other.accuracy)
    return bool(np.all(np.abs(one.accuracy[inside] - expected) < SAME))


def _draw_chosen(axes: Axes, series: _Series, cost: Value, group: Group) -> None:
    """The chosen policy, or the plain network, with bars of one standard deviation."""
    accuracy = _scaled(group.accuracy(), 100)
    mark: dict[str, Any] = {"fmt": "*", "ms": 15, "mew": 0.7}
    if group.plain:
        mark = {"fmt": series.marker, "ms": 9}
    axes.errorbar(
        cost.mean,
        accuracy.mean,
        xerr=cost.std or 0,
        yerr=accuracy.std or 0,
        ecolor=series.colour,
        capsize=3,
        zorder=5,
        mec="black",
        mfc=series.colour,
        **mark,
    )


def _draw_statics(axes: Axes, axis: _Axis, statics: Sequence[Static]) -> list[Mark]:
    """The networks that are no run; returns their marks."""
    marks = []
    for static in statics:
        cost = axis.static(static) if static.kind in STATIC_STYLES else None
        if cost is not None:
            name = shortened(static.name, plots.MAX_NAME)
            marks.append(Mark(cost, 100 * static.accuracy, name, "black"))
            axes.plot(cost, 100 * static.accuracy, ls="", zorder=4, **STATIC_STYLES[static.kind][1])
    return marks


def _set_limits(axes: Axes, comparison: Comparison) -> None:
    """Beside static networks and literature, curves are cut below what can be compared with them,
    equally in all panels."""
    marks = [static.accuracy for static in comparison.statics]
    marks += [point.accuracy for point in comparison.points]
    if not marks:
        return
    marks += [group.accuracy().mean for group in comparison.groups]
    marks += [group.final_accuracy().mean for group in comparison.groups]
    low, high = 100 * min(marks), 100 * max(marks)
    room = max(high - low, 1.0)
    low, high = low - 0.6 * room, high + 0.15 * room
    axes.set_ylim(low, high)
    seen = [
        x
        for line in axes.get_lines()
        for x, y in np.asarray(line.get_xydata(), dtype=float).tolist()
        if low <= y <= high
    ]
    edge = 0.05 * (max(seen) - min(seen) or max(seen))
    axes.set_xlim(min(seen) - edge, max(seen) + edge)


def _draw_legend(axes: Axes, series: Sequence[_Series], comparison: Comparison) -> None:
    """The legend right of the axes."""
    from matplotlib.lines import Line2D

    handles = []
    for one in series:
        style: dict[str, Any] = {"mec": "white", "mew": 0.6, "ms": 7, "lw": 1.8}
        dash = DASHES[one.index % len(DASHES)]
        if one.groups[0].plain:
            style, dash = {"mec": "black", "ms": 9}, ""
        handles.append(
            Line2D([], [], color=one.colour, marker=one.marker, ls=dash, label=one.label, **style)
        )
    kinds: list[tuple[str, dict[str, Any]]] = []
    if not all(group.plain for group in comparison.groups):
        shape = {"color": "white", "mec": "black"}
        kinds += [("chosen policy, ± as in the table", {"marker": "*", "ms": 11, **shape})]
        kinds += [("final exit", {"marker": "D", "ms": 6, **shape})]
    drawn = {static.kind for static in comparison.statics}
    kinds += [words for kind, words in STATIC_STYLES.items() if kind in drawn]
    if any(point.macs is not None for point in comparison.points):
        kinds.append(("literature, under other rules", LITERATURE_STYLE))
    handles += [Line2D([], [], ls="", label=words, **style) for words, style in kinds]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, handlelength=4
    )


def _scaled(value: Value, scale: float) -> Value:
    return Value(scale * value.mean, None if value.std is None else scale * value.std)
