"""The figures of the page, for plotly.

What is told by colour is told by dash, symbol or pattern too, and the colours are Okabe and Ito's.
"""

import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from early_exit.plots import BLUE, GREEN, GREY, ORANGE
from early_exit.report import ClassRow, ExitRow, Pace, Report, Static
from early_exit.wording import shown_classes

PATTERNS = ("", "/", "x", ".", "-", "+", "\\", "|")
HEIGHT = 430  # pixels, of the figures of accuracy
RING = 15
NAMED = 8  # marks of a kind that have room for their names


def charts(report: Report) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Plotly's figures by the place where they go, and which of their traces the slider moves."""
    from plotly import graph_objects

    figures, rings = {}, {}

    def add(place: str, traces: list[dict], **layout: Any) -> None:
        figure = graph_objects.Figure(traces, _layout(**layout))
        figures[place] = json.loads(figure.to_json())

    traces, rings["macs"] = _accuracy_traces(
        report,
        along=tuple(
            [100 * point.macs_share for point in points]
            for points in zip(*((point.val, point.test) for point in report.curve), strict=True)
        ),
        alone=[100 * row.macs_share for row in report.exits],
        statics={static.name: 100 * static.macs_share for static in report.statics},
        star=100 * report.test.macs_share,
    )
    add("macs", traces, x="multiply-adds, % of the plain network", y="accuracy, %", height=HEIGHT)
    for pace in report.pace:
        place = f"ms{pace.batch_size}"
        timing = next(found for found in report.timing if found.batch_size == pace.batch_size)
        val, test, alone = (
            [milliseconds(pace, share) for share in shares]
            for shares in (pace.val, pace.test, pace.alone)
        )
        traces, rings[place] = _accuracy_traces(
            report,
            along=(val, test),
            alone=alone,
            statics={name: milliseconds(pace, share) for name, share in pace.statics.items()},
            star=1000 * timing.live.total / timing.images,
        )
        add(
            place, traces, y="accuracy, %", height=HEIGHT,
            x=f"milliseconds an image, batch of {pace.batch_size}",
        )
    names = [as_text(row.name) for row in report.exits]
    if len(names) > 1:
        add(
            "shares", _share_traces(names), x="share that leaves here, %",
            height=120 + 46 * len(names), xaxis={"range": [0, 100]}, barmode="group",
            yaxis={"autorange": "reversed", "type": "category", "automargin": True},
        )
    rows = shown_classes(report)
    labels = ["..." if row is None else as_text(row.name) for row in rows]
    add(
        "classes", _class_traces(rows, names, labels), x="share of the class that leaves here, %",
        height=150 + 26 * len(labels), barmode="stack",
        xaxis={"range": [0, 100]},
        yaxis={
            "autorange": "reversed", "automargin": True,
            "tickvals": list(range(len(labels))), "ticktext": labels,
        },
    )
    for index, row in enumerate(report.exits):
        errors = f"ECE {100 * row.ece_before:.1f} / {100 * row.ece_after:.1f} %"
        add(
            f"reliability{index}", _reliability_traces(row), height=290,
            x="confidence, %", y="accuracy, %", heading=f"{as_text(row.name)}: {errors}",
            xaxis={"range": [0, 102], "dtick": 25}, yaxis={"range": [0, 102], "dtick": 25},
            showlegend=False,
        )
    return figures, rings


def _accuracy_traces(
    report: Report,
    along: tuple[list[float], list[float]],
    alone: list[float],
    statics: dict[str, float],
    star: float,
) -> tuple[list[dict[str, Any]], list[int]]:
    """The traces of accuracy against a price, and the numbers of the two that the slider moves.

    along: the prices of the curve's points on val and test; alone: of every exit if all leave
    there; star: of the chosen point on test.
    """
    curve, (val, test) = report.curve, along
    hover = "%{y:.2f} % at %{x:.4~g}<extra>%{fullData.name}</extra>"
    lines = [
        ("val", val, [point.val.accuracy for point in curve], BLUE, "solid", 2.5),
        ("test", test, [point.test.accuracy for point in curve], ORANGE, "dash", 2),
        ("at random, test", test, [point.random for point in curve], GREY, "dot", 1.5),
    ]
    traces: list[dict] = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": prices,
            "y": [100 * value for value in accuracy], "hovertemplate": hover,
            "line": {"color": colour, "dash": dash, "width": width},
        }
        for name, prices, accuracy, colour, dash, width in lines
    ]
    traces += [
        _markers(
            "one exit for all",
            [price for price, row in zip(alone[:-1], report.exits, strict=False) if row.on],
            [row for row in report.exits[:-1] if row.on],
            ORANGE, "square", hover,
        ),
        _markers("whole network", alone[-1:], report.exits[-1:], "#000", "diamond", hover),
        {**_markers(
            "static networks", list(statics.values()),
            [static for static in report.statics if static.name in statics],
            GREEN, "triangle-up", hover,
        ), "textposition": "top center"},
        {
            "type": "scatter", "mode": "markers", "name": "chosen, test", "x": [star],
            "y": [100 * report.test.accuracy], "hovertemplate": hover,
            "marker": {"symbol": "star", "size": 17, "color": "#f0e442",
                       "line": {"color": "#000", "width": 1.2}},
        },
    ]
    if len(report.exits) == 1:  # nothing can be chosen
        return [trace for trace in traces if trace["mode"] != "lines"], []
    first = len(traces)
    for name, colour, symbol in (("slider, val", BLUE, "circle-open"),
                                 ("slider, test", ORANGE, "circle-open-dot")):
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": name, "x": [None], "y": [None],
                "hovertemplate": hover,
                "marker": {"symbol": symbol, "size": RING, "color": colour, "line": {"width": 3}},
            }
        )
    return traces, [first, first + 1]


def _markers(
    name: str,
    x: list[float],
    rows: Sequence[ExitRow | Static],
    colour: str,
    symbol: str,
    hover: str,
) -> dict[str, Any]:
    """A mark with a name for each row."""
    return {
        "type": "scatter", "name": name,
        "mode": "markers+text" if len(rows) <= NAMED else "markers", "x": x,
        "y": [100 * row.accuracy for row in rows], "text": [as_text(row.name) for row in rows],
        "textposition": "bottom right", "textfont": {"size": 11, "color": colour},
        "marker": {"color": colour, "symbol": symbol, "size": 9}, "cliponaxis": False,
        "hovertemplate": "%{text}: " + hover,
    }


def _share_traces(names: list[str]) -> list[dict[str, Any]]:
    """Bars that the slider fills."""
    return [
        {
            "type": "bar", "orientation": "h", "name": split, "y": names,
            "x": [0.0] * len(names), "hovertemplate": "%{x:.1f} %",
            "marker": {"color": colour, "pattern": _pattern(shape, "#fff")},
        }
        for split, colour, shape in (("val", BLUE, ""), ("test", ORANGE, "/"))
    ]


def _class_traces(
    rows: Sequence[ClassRow | None], names: list[str], labels: list[str]
) -> list[dict[str, Any]]:
    """One trace an exit, from light to dark; the colours of cividis are in order for everybody."""
    from plotly.colors import sample_colorscale

    at = np.linspace(1, 0, len(names)) if len(names) > 1 else [0.5]
    return [
        {
            "type": "bar", "orientation": "h", "name": name, "y": list(range(len(rows))),
            "x": [0.0 if row is None else 100 * row.taken[index] for row in rows],
            "customdata": labels, "hovertemplate": "%{customdata}: %{x:.1f} %",
            "marker": {"color": sample_colorscale("Cividis", float(at[index]))[0],
                       "pattern": _pattern(
                           PATTERNS[index % len(PATTERNS)], "#fff" if at[index] < 0.5 else "#000"
                       )},
        }
        for index, name in enumerate(names)
    ]


def _pattern(shape: str, colour: str) -> dict[str, Any]:
    return {"shape": shape, "fillmode": "overlay", "fgcolor": colour, "fgopacity": 0.6}


def _reliability_traces(row: ExitRow) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "x": [0, 100], "y": [0, 100], "hoverinfo": "skip",
         "line": {"color": GREY, "dash": "dot", "width": 1}}
    ]
    for name, bins, colour, symbol in (
        ("without", row.reliability_before, ORANGE, "square-open"),
        ("with temperature", row.reliability, BLUE, "circle"),
    ):
        confidence, accuracy, share = 100 * np.array(bins).T
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": name, "x": confidence.tolist(),
                "y": accuracy.tolist(), "customdata": share.tolist(),
                "line": {"color": colour, "width": 1},
                "marker": {"symbol": symbol, "size": (5 + np.sqrt(share) * 1.4).tolist()},
                "cliponaxis": False,
                "hovertemplate": "%{x:.0f} % sure, %{y:.1f} % right, %{customdata:.1f} % of test",
            }
        )
    return traces


def _layout(
    x: str = "", y: str = "", height: int = 400, heading: str = "", **more: Any
) -> dict[str, Any]:
    axis = {"gridcolor": "#ddd", "zeroline": False, "linecolor": "#555", "fixedrange": True}
    own = {name: more.pop(name, {}) for name in ("xaxis", "yaxis")}
    return {
        "template": "none", "height": height, "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "title": {"text": heading, "font": {"size": 13}, "x": 0.02, "xanchor": "left"},
        "margin": {"l": 55, "r": 15, "t": 34 if heading else 8, "b": 45},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 11},
                   "traceorder": "normal"},
        "xaxis": {"title": {"text": x}, **axis, **own["xaxis"]},
        "yaxis": {"title": {"text": y}, **axis, **own["yaxis"]},
        **more,
    }


def as_text(name: str) -> str:
    """A name in a figure, where plotly would read some HTML."""
    return html.escape(name, quote=False)


def milliseconds(pace: Pace, share: float) -> float:
    """Milliseconds an image, from a share of the plain network's time."""
    return round(1000 * share * pace.plain / pace.batch_size, 6)
