"""Names beside the marks of a figure, where they cover neither marks nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

FONT_SIZE = 8.5
OFFSETS = (  # in points, with the alignments of the text
    ((6, -5), "left", "top"),
    ((6, 4), "left", "bottom"),
    ((-6, 4), "right", "bottom"),
    ((-6, -5), "right", "top"),
    ((0, 8), "center", "bottom"),
    ((0, -8), "center", "top"),
    ((9, 0), "left", "center"),
    ((-9, 0), "right", "center"),
    ((10, -14), "left", "top"),
    ((10, 13), "left", "bottom"),
    ((-10, 13), "right", "bottom"),
    ((-10, -14), "right", "top"),
)


class Mark(NamedTuple):
    """A mark with a name."""

    x: float
    y: float
    name: str
    colour: str


def place(axes: Axes, marks: Sequence[Mark], others: np.ndarray) -> None:
    """Writes each name where it covers least: other names, marks, and what is drawn at `others`.

    The limits of the axes must be final. others: (P, 2), in data coordinates.
    """
    from matplotlib.patheffects import withStroke

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    points = np.array([(mark.x, mark.y) for mark in marks]).reshape(-1, 2)
    occupied = axes.transData.transform(np.concatenate([points, others.reshape(-1, 2)]))
    named = occupied[: len(points)]
    inside = axes.get_window_extent(renderer)
    placed: list[Bbox] = []
    for index, mark in enumerate(marks):
        text = axes.annotate(
            mark.name,
            (mark.x, mark.y),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=FONT_SIZE,
            color=mark.colour,
            zorder=6,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        found = []
        for order, (offset, horizontal, vertical) in enumerate(OFFSETS):
            text.set(position=offset, ha=horizontal, va=vertical)
            box = text.get_window_extent(renderer)
            low, high = box.get_points()
            covered = ((low <= occupied) & (occupied <= high)).all(axis=1)
            distance = np.hypot(*(named - (low + high) / 2).T)
            cost = (
                10 * (distance.argmin() != index)  # it would seem to be another mark's
                + 20 * sum(box.overlaps(other) for other in placed)
                + 20 * (box.x0 < inside.x0 or box.x1 > inside.x1)
                + 20 * (box.y0 < inside.y0 or box.y1 > inside.y1)
                + 8 * int(covered[: len(points)].sum())
                + int(covered.sum())
            )
            found.append((cost, order, box))
        _, order, box = min(found, key=lambda one: one[:2])
        offset, horizontal, vertical = OFFSETS[order]
        text.set(position=offset, ha=horizontal, va=vertical)
        placed.append(box)
