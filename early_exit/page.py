"""The report as one page to show around: it opens without a network and holds all it needs.

The figures are those of `early_exit.charts`, the written parts those of `early_exit.wording`.
"""

import base64
import html
import importlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml
from PIL import Image

from early_exit.charts import charts, milliseconds
from early_exit.disk import write_text
from early_exit.errors import UserError
from early_exit.report import Picture, Report
from early_exit.wording import sections, title

PICTURE_BYTES = 700_000  # of all pictures together; plotly itself takes 4.9 MB
SIDES = (128, 96, 64, 48, 32)  # of a picture in pixels, the largest that is small enough

Rows = Sequence[tuple[str, Sequence[Picture]]]


def require() -> None:
    """Raises UserError where plotly or markdown is not installed."""
    for name in ("plotly.offline", "markdown"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"the page needs {name.partition('.')[0]}; run: pip install -r requirements.txt"
                " (or pass --no-plots)"
            ) from None


def write(report: Report, galleries: Mapping[str, Rows], path: Path) -> None:
    """Writes the page, whole. galleries: rows of pictures by their title.

    Raises UserError where plotly or markdown is not installed.
    """
    require()
    import markdown
    from plotly.offline import get_plotlyjs

    converter = markdown.Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")  # what looks like HTML is a name, and shown
    converter.inlinePatterns.deregister("html")

    def convert(text: str) -> str:
        return re.sub(
            "(<table>.*?</table>)", r'<div class="wide">\1</div>',
            converter.reset().convert(text), flags=re.DOTALL,
        )

    points = _points(report)
    own = _thresholds(report)

    def off(index: int) -> tuple[bool, float]:
        point = report.curve[index]
        return {point.threshold} != own, abs(point.val.macs_share - report.val.macs_share)

    chosen = min(range(len(points)), key=off)
    figures, rings = charts(report)
    embedded = {
        "figures": figures,
        "rings": rings,
        "curve": points,
        "chosen": chosen,
        "exits": [row.name for row in report.exits],
        "batches": [pace.batch_size for pace in report.pace],
    }
    parts = sections(report)
    early = len(report.exits) > 1
    page = Template(_asset("report.html")).substitute(
        title=html.escape(title(report)),
        style=_asset("report.css").replace("$rendering", _rendering(galleries)),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        summary=convert(parts.pop("")),
        clocks=_clocks(report),
        legend=_legend(report),
        slider=_slider(report, len(points) - 1, chosen) if early else "",
        sections=_sections(report, parts, galleries, convert),
        data=json.dumps(embedded, allow_nan=False).replace("</", "<\\/"),
        script=_asset("report.js"),
    )
    write_text(path, page)


def _thresholds(report: Report) -> set[float | None]:
    """Of the early exits that are on."""
    return {row.threshold for row in report.exits[:-1] if row.on}


def _asset(name: str) -> str:
    return resources.files("early_exit").joinpath("assets", name).read_text()


def _points(report: Report) -> list[dict[str, Any]]:
    """What the slider shows at each stop."""
    points = []
    for index, point in enumerate(report.curve):
        entry: dict[str, Any] = {"threshold": point.threshold}
        for split, found, shares in (
            ("val", point.val, point.val_shares), ("test", point.test, point.test_shares)
        ):
            entry[split] = {
                "accuracy": round(found.accuracy, 6),
                "macs": round(found.macs_share, 6),
                "shares": [round(share, 5) for share in shares],
                "ms": [milliseconds(pace, getattr(pace, split)[index]) for pace in report.pace],
            }
        points.append(entry)
    return points


def _clocks(report: Report) -> str:
    """The figures against milliseconds, and what picks one."""
    places = [f'<div class="figure" id="ms{pace.batch_size}"></div>' for pace in report.pace]
    if not places:
        return "<p>Nothing was timed, so there is no figure against milliseconds.</p>"
    if len(places) == 1:
        return places[0]
    options = "".join(
        f'<option value="{pace.batch_size}">{pace.batch_size}</option>' for pace in report.pace
    )
    return (
        f'{"".join(places)}<p><label for="batch">images in a batch </label>'
        f'<select id="batch">{options}</select></p>'
    )


def _legend(report: Report) -> str:
    """What the marks of the two figures mean, in words."""
    timed, early = bool(report.pace), len(report.exits) > 1
    items = []
    if early:
        items += [
            "<strong>val, test</strong>: one threshold for all exits, from never leaving early to"
            " always",
            "<strong>at random</strong>: as many leave at each exit, but drawn by lot",
            "<strong>one exit for all</strong> (square): every test image leaves there",
            "<strong>whole network</strong> (diamond): everybody goes on to the final exit, past"
            " all heads that are on",
            f"<strong>chosen</strong> (star): {'given' if report.thresholds_given else 'on val'},"
            f" {html.escape(report.chosen_by)}"
            + ("; its time is measured with exits taken" if timed else ""),
        ]
    if timed:
        plain = ", ".join(
            f"{milliseconds(pace, 1.0):.3g} ms (batch of {pace.batch_size})" for pace in report.pace
        )
        items.append(
            "<strong>milliseconds</strong> of all marks but the star are the sum of the stages'"
            " times at the numbers of rows that reach them on average, without what deciding and"
            f" dropping rows cost around them. The plain network takes {plain} an image"
        )
    if report.statics:
        sources = " ".join(dict.fromkeys(static.source for static in report.statics))
        items.append(
            "<strong>static networks</strong> (triangle): what one could use instead, with the"
            f" accuracy stated by {html.escape(sources)}"
            + ("; their times are measured here" if timed else "")
        )
    return f'<ul class="key">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _slider(report: Report, last: int, chosen: int) -> str:
    rows = [("accuracy", "right"), ("macs", "multiply-adds, of the plain network's")]
    rows += [
        (f"ms{pace.batch_size}", f"expected for an image, batch of {pace.batch_size}, stages alone")
        for pace in report.pace
    ]
    rows += [
        (f"share{index}", f"leave at {html.escape(row.name)}")
        for index, row in enumerate(report.exits)
    ]
    off = ""
    if len(_thresholds(report)) > 1:
        off = (
            "<p>The chosen policy has a threshold for each exit and is not on the slider, which"
            " begins at the stop that costs as much on val.</p>"
        )
    return Template(_asset("slider.html")).substitute(
        last=last,
        chosen=chosen,
        rows="".join(
            f'<tr><td>{words}</td><td id="{name}-val"></td><td id="{name}-test"></td></tr>'
            for name, words in rows
        ),
        off=off,
    )


def _sections(report: Report, parts: Mapping[str, str], galleries: Mapping[str, Rows], convert):
    """The written parts, with the figures that go with them."""
    small = "".join(
        f'<div class="figure" id="reliability{index}"></div>'
        for index in range(len(report.exits))
    )
    before = {
        "How far the exits can be believed": f'<div class="small">{small}</div>',
        "Operations and energy": '<div class="figure" id="classes"></div>',
    }
    settings = html.escape(yaml.safe_dump(report.settings, sort_keys=False))
    after = {
        "How far the exits can be believed":
            "<p>Filled circles: with the temperature; open squares: without. The larger, the more"
            " of test.</p>",
        "How this was made":
            "<details><summary>configuration</summary>"
            f"<pre><code>{settings}</code></pre></details>",
    }
    written = []
    for heading, body in parts.items():
        if heading == "How this was made":
            written += [
                f"<section><h2>{html.escape(caption)}</h2>{_gallery(rows)}</section>"
                for caption, rows in _small(galleries).items() if rows
            ]
        written.append(
            f"<section><h2>{html.escape(heading)}</h2>{before.get(heading, '')}{convert(body)}"
            f"{after.get(heading, '')}</section>"
        )
    return "\n".join(written)


def _gallery(rows: Sequence[tuple[str, Sequence[tuple[Picture, str]]]]) -> str:
    written = []
    for caption, pictures in rows:
        shown = "".join(
            f'<figure{"" if picture.right else " class=wrong"}>'
            f'<img src="{address}" alt="{html.escape(picture.words)}"'
            f' title="{html.escape(picture.words)}">'
            f"<figcaption>{html.escape(picture.label)}</figcaption></figure>"
            for picture, address in pictures
        )
        heading = html.escape(caption.replace("\n", ", "))
        written.append(f'<p class="row">{heading}</p><div class="gallery">{shown}</div>')
    return "".join(written)


def _small(
    galleries: Mapping[str, Rows]
) -> dict[str, list[tuple[str, list[tuple[Picture, str]]]]]:
    """The galleries, every picture with its address, as large as they can be together."""
    for side in SIDES:
        small = {
            title: [
                (caption, [(picture, _encoded(picture.pixels, side)) for picture in pictures])
                for caption, pictures in rows
            ]
            for title, rows in galleries.items()
        }
        addresses = (row for rows in small.values() for _, row in rows)
        if sum(len(address) for row in addresses for _, address in row) <= PICTURE_BYTES:
            break
    return small


def _encoded(pixels: np.ndarray, side: int) -> str:
    """A picture (H, W, 3) as an address that holds it, no larger than `side`."""
    image, small = Image.fromarray(pixels), max(pixels.shape[:2]) <= SIDES[-1]
    image.thumbnail((side, side))
    file = io.BytesIO()
    if small:  # a photograph of so few pixels would suffer
        image.save(file, "WEBP", lossless=True)
    else:
        image.save(file, "JPEG", quality=80)
    kind = "webp" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _rendering(galleries: Mapping[str, Rows]) -> str:
    """Small pictures show their pixels, large ones are smoothed."""
    sides = [max(p.pixels.shape[:2]) for rows in galleries.values() for _, row in rows for p in row]
    return "pixelated" if max(sides, default=0) <= SIDES[-1] else "auto"
