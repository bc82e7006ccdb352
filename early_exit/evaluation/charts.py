"""The figures of the page, for plotly.

Whatever differs in colour also differs in dash, symbol or pattern; the colours are Okabe and Ito's.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from early_exit.evaluation.plots import BLUE, GREEN, GREY, ORANGE, YELLOW
from early_exit.evaluation.report import ClassRow, ExitRow, Report, StaticRow
from early_exit.evaluation.report_seconds import CurveSeconds
from early_exit.evaluation.tables import shown_classes
from early_exit.system.text import in_a_line, shortened

HEIGHT = 430  # pixels, of the figures of accuracy
SLIDER_CIRCLE = 15  # pixels
MAX_NAMED = 8  # names fit beside this many marks of a kind
MAX_LABEL = 40  # letters of a class's name beside the axis; the whole name is shown on hovering
PATTERNS = ("", "/", "x", ".", "-", "+", "\\", "|")
HOVER = "%{y:.2f} % at %{x:.4~g}<extra>%{fullData.name}</extra>"

Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    id: str
    """Of its element on the page."""
    figure: dict[str, Any]
    """As plotly's JSON."""
    slider_traces: tuple[int, ...] = ()
    """Indices of the two traces, of val and of test, that the slider moves."""


@dataclass(frozen=True)
class _Costs:
    """Where the marks of a figure of accuracy are along the axis of cost."""

    val: list[float]
    """Of each point of the curve, on val."""
    test: list[float]
    at_exit: list[float]
    """If every image exited at one exit, for each exit."""
    chosen: float
    """Of the chosen policy, on test."""
    static_networks: dict[str, float]


def charts(report: Report) -> list[Chart]:
    """All figures of a report."""
    found = [_macs_chart(report), *(_time_chart(report, row) for row in report.curve_seconds)]
    if report.early_exits:
        found.append(_shares_chart(report))
    found.append(_classes_chart(report))
    found += [_reliability_chart(index, row) for index, row in enumerate(report.exits)]
    return found


def _macs_chart(report: Report) -> Chart:
    """Accuracy against multiply-adds."""
    costs = _Costs(
        val=[100 * point.val.macs_share for point in report.curve],
        test=[100 * point.test.macs_share for point in report.curve],
        at_exit=[100 * row.macs_share for row in report.exits],
        chosen=100 * report.test.macs_share,
        static_networks={row.name: 100 * row.macs_share for row in report.static_networks},
    )
    return _accuracy_chart(report, "macs", costs, "multiply-adds, % of the plain network")


def _time_chart(report: Report, seconds: CurveSeconds) -> Chart:
    """Accuracy against time at one batch size. The chosen policy's time is the measured one."""
    size = seconds.batch_size
    timing = next(timing for timing in report.timing if timing.batch_size == size)
    costs = _Costs(
        val=[ms_per_image(seconds, share) for share in seconds.val],
        test=[ms_per_image(seconds, share) for share in seconds.test],
        at_exit=[ms_per_image(seconds, share) for share in seconds.at_exit],
        chosen=1000 * timing.live.total / timing.images,
        static_networks={
            name: ms_per_image(seconds, share) for name, share in seconds.static_networks.items()
        },
    )
    title = f"expected time per image, ms<br>batch size {size}, {report.environment.ran_in}"
    return _accuracy_chart(report, f"ms{size}", costs, title)


def ms_per_image(seconds: CurveSeconds, share: float) -> float:
    """Milliseconds per image. share: of the plain network's time."""
    return round(1000 * share * seconds.plain / seconds.batch_size, 6)


def _accuracy_chart(report: Report, id: str, costs: _Costs, x_title: str) -> Chart:
    traces, slider_traces = _mark_traces(report, costs), []
    if report.early_exits:  # in a plain network nothing is chosen
        slider_traces = _slider_traces()
        traces = [*_curve_traces(report, costs), *traces, _chosen_trace(report, costs)]
    first = len(traces)
    return Chart(
        id,
        _figure([*traces, *slider_traces], x=x_title, y="accuracy, %", height=HEIGHT),
        tuple(range(first, first + len(slider_traces))),
    )


def _curve_traces(report: Report, costs: _Costs) -> list[Trace]:
    """The lines: one threshold for all exits, and random exits."""
    curve = report.curve
    lines = [
        ("val", costs.val, [point.val.accuracy for point in curve], BLUE, "solid", 2.5),
        ("test", costs.test, [point.test.accuracy for point in curve], ORANGE, "dash", 2),
        ("random exits, test", costs.test, [point.random for point in curve], GREY, "dot", 1.5),
    ]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": x,
            "y": [100 * value for value in accuracy],
            "hovertemplate": HOVER,
            "line": {"color": colour, "dash": dash, "width": width},
        }
        for name, x, accuracy, colour, dash, width in lines
    ]


def _mark_traces(report: Report, costs: _Costs) -> list[Trace]:
    """The marks: each exit, and the static networks."""
    enabled = [index for index, row in enumerate(report.early_exits) if row.enabled]
    static = [row for row in report.static_networks if row.name in costs.static_networks]
    return [
        _named_marks(
            "all images at one exit",
            [costs.at_exit[index] for index in enabled],
            [report.exits[index] for index in enabled],
            ORANGE,
            "square",
        ),
        _named_marks(
            "no exit is taken" if report.early_exits else "plain network",
            costs.at_exit[-1:],
            [replace(report.exits[-1], accuracy=report.final_accuracy)],
            "#000",
            "diamond",
        ),
        {
            **_named_marks(
                "static networks",
                [costs.static_networks[row.name] for row in static],
                static,
                GREEN,
                "triangle-up",
            ),
            "textposition": "top center",
        },
    ]


def _named_marks(
    name: str, x: list[float], rows: Sequence[ExitRow | StaticRow], colour: str, symbol: str
) -> Trace:
    """A mark for each row, with the row's name beside it."""
    return {
        "type": "scatter",
        "name": name,
        "mode": "markers+text" if len(rows) <= MAX_NAMED else "markers",
        "x": x,
        "y": [100 * row.accuracy for row in rows],
        "text": [as_text(row.name) for row in rows],
        "textposition": "bottom right",
        "textfont": {"size": 11, "color": colour},
        "marker": {"color": colour, "symbol": symbol, "size": 9},
        "cliponaxis": False,
        "hovertemplate": "%{text}: " + HOVER,
    }


def _chosen_trace(report: Report, costs: _Costs) -> Trace:
    """The star: the chosen policy."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "chosen policy, test",
        "x": [costs.chosen],
        "y": [100 * report.test.accuracy],
        "hovertemplate": HOVER,
        "marker": {
            "symbol": "star",
            "size": 17,
            "color": YELLOW,
            "line": {"color": "#000", "width": 1.2},
        },
    }


def _slider_traces() -> list[Trace]:
    """The circles that the slider moves."""
    circle = {"size": SLIDER_CIRCLE, "line": {"width": 3}}
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"slider, {split}",
            "x": [None],
            "y": [None],
            "hovertemplate": HOVER,
            "marker": {**circle, "symbol": symbol, "color": colour},
        }
        for split, colour, symbol in (
            ("val", BLUE, "circle-open"),
            ("test", ORANGE, "circle-open-dot"),
        )
    ]


def _shares_chart(report: Report) -> Chart:
    """Bars, set by the slider: how many images exit at each exit."""
    names = [as_text(row.name) for row in report.exits]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": split,
            "y": names,
            "x": [0.0] * len(names),
            "hovertemplate": "%{x:.1f} %",
            "marker": {"color": colour, "pattern": _pattern(shape, "#fff")},
        }
        for split, colour, shape in (("val", BLUE, ""), ("test", ORANGE, "/"))
    ]
    figure = _figure(
        traces,
        x="images that exit here, %",
        height=120 + 46 * len(names),
        xaxis={"range": [0, 100]},
        yaxis={"autorange": "reversed", "type": "category", "automargin": True},
        barmode="group",
    )
    return Chart("shares", figure, (0, 1))


def _classes_chart(report: Report) -> Chart:
    """Stacked bars: where the images of each class exit."""
    rows = shown_classes(report)
    labels = ["..." if row is None else as_text(row.name) for row in rows]
    shown = ["..." if row is None else as_text(shortened(row.name, MAX_LABEL)) for row in rows]
    ticks = {"tickvals": list(range(len(shown))), "ticktext": shown}
    figure = _figure(
        _class_traces(rows, [as_text(row.name) for row in report.exits], labels),
        x="images of the class that exit here, %",
        height=150 + 26 * len(labels),
        xaxis={"range": [0, 100]},
        yaxis={"autorange": "reversed", "automargin": True, **ticks},
        barmode="stack",
    )
    return Chart("classes", figure)


def _class_traces(
    rows: Sequence[ClassRow | None], names: list[str], labels: list[str]
) -> list[Trace]:
    """One trace per exit, from light to dark in cividis, whose order every reader sees."""
    from plotly.colors import sample_colorscale

    traces = []
    for index, name in enumerate(names):
        lightness = 1 - index / (len(names) - 1) if len(names) > 1 else 0.5
        pattern_colour = "#fff" if lightness < 0.5 else "#000"
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": list(range(len(rows))),
                "x": [0.0 if row is None else 100 * row.exited[index] for row in rows],
                "customdata": labels,
                "hovertemplate": "%{customdata}: %{x:.1f} %",
                "marker": {
                    "color": sample_colorscale("Cividis", lightness)[0],
                    "pattern": _pattern(PATTERNS[index % len(PATTERNS)], pattern_colour),
                },
            }
        )
    return traces


def _pattern(shape: str, colour: str) -> dict[str, Any]:
    return {"shape": shape, "fillmode": "overlay", "fgcolor": colour, "fgopacity": 0.6}


def _reliability_chart(index: int, row: ExitRow) -> Chart:
    """Accuracy against confidence, without and with the temperature."""
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 100],
        "y": [0, 100],
        "hoverinfo": "skip",
        "line": {"color": GREY, "dash": "dot", "width": 1},
    }
    bins = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [100 * confidence for confidence, _, _ in found],
            "y": [100 * accuracy for _, accuracy, _ in found],
            "customdata": [100 * share for _, _, share in found],
            "line": {"color": colour, "width": 1},
            "marker": {"symbol": symbol, "size": [5 + 14 * share**0.5 for _, _, share in found]},
            "cliponaxis": False,
            "hovertemplate": "confidence %{x:.0f} %, accuracy %{y:.1f} %,"
            " %{customdata:.1f} % of test",
        }
        for name, found, colour, symbol in (
            ("without temperature", row.reliability_before, ORANGE, "square-open"),
            ("with temperature", row.reliability, BLUE, "circle"),
        )
    ]
    errors = f"ECE {100 * row.ece_before:.1f} % before, {100 * row.ece_after:.1f} % after"
    figure = _figure(
        [diagonal, *bins],
        x="confidence, %",
        y="accuracy, %",
        height=290,
        title=f"{as_text(row.name)}: {errors}",
        xaxis={"range": [0, 102], "dtick": 25},
        yaxis={"range": [0, 102], "dtick": 25},
        showlegend=False,
    )
    return Chart(f"reliability{index}", figure)


def _figure(
    traces: list[Trace],
    *,
    x: str = "",
    y: str = "",
    height: int,
    title: str = "",
    xaxis: dict[str, Any] | None = None,
    yaxis: dict[str, Any] | None = None,
    **layout: Any,
) -> dict[str, Any]:
    """Traces and a layout as plotly's JSON. x, y: titles of the axes."""
    from plotly import graph_objects

    axis = {"gridcolor": "#ddd", "zeroline": False, "linecolor": "#555", "fixedrange": True}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}}
    figure = graph_objects.Figure(
        traces,
        {
            "template": "none",
            "height": height,
            "hovermode": "closest",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "title": {"text": title, "font": {"size": 13}, "x": 0.02, "xanchor": "left"},
            "margin": {"l": 55, "r": 15, "t": 34 if title else 8, "b": 62 if "<br>" in x else 45},
            "legend": {**legend, "traceorder": "normal"},
            "xaxis": {"title": {"text": x}, **axis, **(xaxis or {})},
            "yaxis": {"title": {"text": y}, **axis, **(yaxis or {})},
            **layout,
        },
    )
    return json.loads(figure.to_json())


def as_text(name: str) -> str:
    """A name in a figure, with the HTML escaped that plotly would interpret."""
    return html.escape(in_a_line(name), quote=False)
