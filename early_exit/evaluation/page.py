"""The report as one HTML file to share. It holds everything it needs and opens without a network.

The figures come from `early_exit.evaluation.charts`, the text from `early_exit.evaluation.markdown`
and the galleries from `early_exit.evaluation.pictures`. They are placed by ids, so headings can be
reworded freely.
"""

import html
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from early_exit.errors import UserError
from early_exit.evaluation.charts import charts, ms_per_image
from early_exit.evaluation.markdown import Section, sections, title
from early_exit.evaluation.pictures import gallery_sections, rendering
from early_exit.evaluation.plots import Rows
from early_exit.evaluation.report import Report
from early_exit.system.files import write_text

Converter = Callable[[str], str]
"""Markdown to HTML."""


def check_packages() -> None:
    """Raises UserError if plotly or markdown is not installed."""
    for name in ("plotly.offline", "markdown"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"the page needs {name.partition('.')[0]}; run: pip install -r requirements.txt"
            ) from None


def write(report: Report, galleries: Mapping[str, Rows], path: Path) -> None:
    """Writes the page, whole or not at all. galleries: by their id.

    Raises UserError if plotly or markdown is not installed.
    """
    check_packages()
    from plotly.offline import get_plotlyjs

    convert = _converter()
    summary, *others = sections(report)
    page = Template(_asset("report.html")).substitute(
        title=html.escape(title(report)),
        style=_asset("report.css").replace("$rendering", rendering(galleries)),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        summary=convert(summary.body),
        times=_time_figures(report),
        legend=_legend(report),
        slider=_slider(report) if report.early_exits else "",
        sections=_sections(report, others, gallery_sections(galleries), convert),
        data=json.dumps(_data(report), allow_nan=False).replace("</", "<\\/"),
        script=_asset("report.js"),
    )
    write_text(path, page)


def _asset(name: str) -> str:
    return resources.files("early_exit.evaluation").joinpath("assets", name).read_text("utf-8")


def _converter() -> Converter:
    """Markdown to HTML, without raw HTML: what looks like HTML in a name is shown as text."""
    import markdown

    converter = markdown.Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")

    def convert(text: str) -> str:
        return re.sub(
            "(<table>.*?</table>)",
            r'<div class="wide">\1</div>',
            converter.reset().convert(text),
            flags=re.DOTALL,
        )

    return convert


def _data(report: Report) -> dict[str, Any]:
    """What report.js reads."""
    found = charts(report)
    return {
        "figures": {chart.id: chart.figure for chart in found},
        "slider_traces": {chart.id: chart.slider_traces for chart in found},
        "curve": _slider_stops(report),
        "chosen": _chosen_stop(report),
        "exits": [row.name for row in report.exits],
        "batch_sizes": [seconds.batch_size for seconds in report.curve_seconds],
    }


def _slider_stops(report: Report) -> list[dict[str, Any]]:
    """What the page shows at each stop of the slider: one for each point of the curve."""
    stops = []
    for index, point in enumerate(report.curve):
        stop: dict[str, Any] = {"threshold": point.threshold}
        for split, outcome, shares in (
            ("val", point.val, point.val_shares),
            ("test", point.test, point.test_shares),
        ):
            percentages = {  # rounded as in the tables
                "accuracy": f"{100 * outcome.accuracy:.2f} %",
                "macs": f"{100 * outcome.macs_share:.1f} %",
                "shares": [f"{100 * share:.1f} %" for share in shares],
            }
            stop[split] = {
                "shown": percentages,
                "accuracy": round(outcome.accuracy, 6),
                "macs": round(outcome.macs_share, 6),
                "shares": [round(share, 5) for share in shares],
                "ms": [
                    ms_per_image(seconds, getattr(seconds, split)[index])
                    for seconds in report.curve_seconds
                ],
            }
        stops.append(stop)
    return stops


def _chosen_stop(report: Report) -> int:
    """The stop of the chosen policy; if its exits have different thresholds, the stop that is
    nearest in cost on val."""
    thresholds = _enabled_thresholds(report)

    def distance(index: int) -> tuple[bool, float]:
        point = report.curve[index]
        return {point.threshold} != thresholds, abs(point.val.macs_share - report.val.macs_share)

    return min(range(len(report.curve)), key=distance)


def _enabled_thresholds(report: Report) -> set[float | None]:
    """The thresholds of the enabled early exits."""
    return {row.threshold for row in report.early_exits if row.enabled}


def _time_figures(report: Report) -> str:
    """The elements of the figures of accuracy against time, and the menu that selects one."""
    sizes = [seconds.batch_size for seconds in report.curve_seconds]
    figures = "".join(f'<div class="figure" id="ms{size}"></div>' for size in sizes)
    if not sizes:
        missing = "The segments were not" if report.timing else "Nothing was"
        return f"<p>{missing} timed, so there is no figure of accuracy against time.</p>"
    if len(sizes) == 1:
        return figures
    options = "".join(f'<option value="{size}">{size}</option>' for size in sizes)
    return (
        f'{figures}<p><label for="batch">batch size </label>'
        f'<select id="batch">{options}</select></p>'
    )


def short_number(number: float) -> str:
    """A number rounded to three figures, without an exponent below a million."""
    return f"{float(f'{number:.3g}'):g}"


def _legend(report: Report) -> str:
    """What the marks of the figures of accuracy mean."""
    items = []
    if report.early_exits:
        items += _legend_of_exits(report)
    if report.curve_seconds:
        plain = ", ".join(
            f"{short_number(ms_per_image(seconds, 1.0))} ms (batch size {seconds.batch_size})"
            for seconds in report.curve_seconds
        )
        items.append(
            "<strong>expected time per image</strong>: the sum of the segments' times in"
            f" {html.escape(report.environment.ran_in)} at the mean numbers of rows that reach"
            " them, without comparing scores and the selection of rows. The plain network takes"
            f" {plain}"
        )
    if report.static_networks:
        sources = " ".join(dict.fromkeys(row.source for row in report.static_networks))
        timed = (
            "; their times are measured here, in the same runtime" if report.curve_seconds else ""
        )
        items.append(
            "<strong>static networks</strong> (triangle): networks without exits that could be used"
            f" instead, with the accuracy stated by {html.escape(sources)}{timed}"
        )
    return f'<ul class="key">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _legend_of_exits(report: Report) -> list[str]:
    origin = "given" if report.choice.thresholds_given else "chosen on val"
    goal = html.escape(report.choice.goal)
    timed = "; its time is measured with exits taken" if report.curve_seconds else ""
    return [
        "<strong>val, test</strong>: one threshold for all exits, from no exit taken to all images"
        " at the first enabled exit",
        "<strong>random exits</strong>: the same number of images exits at each exit, but the"
        " images are chosen at random",
        "<strong>all images at one exit</strong> (square): every test image exits there",
        "<strong>no exit is taken</strong> (diamond): every test image reaches the final exit, and"
        " the heads of all enabled exits are computed",
        f"<strong>chosen policy</strong> (star): {origin}, {goal}{timed}",
    ]


def _slider(report: Report) -> str:
    """The section with the slider and its table, which report.js fills."""
    rows = [("accuracy", "accuracy"), ("macs", "MACs, share of the plain network's")]
    ran_in = html.escape(report.environment.ran_in)
    rows += [
        (
            f"ms{seconds.batch_size}",
            f"expected time per image, batch size {seconds.batch_size}, {ran_in}",
        )
        for seconds in report.curve_seconds
    ]
    rows += [
        (f"share{index}", f"images that exit at {html.escape(row.name)}")
        for index, row in enumerate(report.exits)
    ]
    note = ""
    if len(_enabled_thresholds(report)) > 1:
        note = (
            "<p>The exits of the chosen policy have different thresholds, so it is not on the"
            " slider, which starts at the stop with the nearest cost on val.</p>"
        )
    return Template(_asset("slider.html")).substitute(
        last=len(report.curve) - 1,
        chosen=_chosen_stop(report),
        rows="".join(
            f'<tr><td>{words}</td><td id="{id}-val"></td><td id="{id}-test"></td></tr>'
            for id, words in rows
        ),
        note=note,
    )


def _sections(
    report: Report, written: Sequence[Section], galleries: Sequence[str], convert: Converter
) -> str:
    """The written sections with their figures, and the galleries before the last one."""
    *parts, last = [
        f'<section id="{section.id}"><h2>{html.escape(section.heading)}</h2>'
        f"{_before(section.id, report)}{convert(section.body)}{_after(section.id, report)}"
        "</section>"
        for section in written
    ]
    return "\n".join([*parts, *galleries, last])


def _before(section_id: str, report: Report) -> str:
    """The figures that a section begins with."""
    match section_id:
        case "calibration":
            figures = "".join(
                f'<div class="figure" id="reliability{index}"></div>'
                for index in range(len(report.exits))
            )
            return f'<div class="small">{figures}</div>'
        case "operations":
            return '<div class="figure" id="classes"></div>'
    return ""


def _after(section_id: str, report: Report) -> str:
    """What a section ends with, beyond its text."""
    match section_id:
        case "calibration":
            return (
                "<p>Filled circles: with the temperature; open squares: without. The larger a mark,"
                " the larger its share of the test images.</p>"
            )
        case "provenance":
            settings = html.escape(yaml.safe_dump(report.run.settings, sort_keys=False))
            return (
                "<details><summary>configuration</summary>"
                f"<pre><code>{settings}</code></pre></details>"
            )
    return ""
