"""The galleries of the page, with their images embedded in the HTML."""

import base64
import html
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from early_exit.evaluation.plots import CAPTIONS, MAX_NAME, Rows
from early_exit.evaluation.report import Picture
from early_exit.system.text import in_a_line, shortened

MAX_BYTES = 700_000  # of all embedded images together; plotly itself has 4.9 MB
SIDES = (128, 96, 64, 48, 32)  # pixels; the largest that keeps to MAX_BYTES is used
SMALL = SIDES[-1]  # images up to this side are stored without loss and shown as sharp pixels

EmbeddedRows = list[tuple[str, list[tuple[Picture, str]]]]
"""Rows of a caption and pictures, each with its data URL."""


def gallery_sections(galleries: Mapping[str, Rows]) -> list[str]:
    """A section in HTML for each gallery that is not empty."""
    return [
        f'<section id="images-{name}"><h2>{html.escape(CAPTIONS[name])}</h2>'
        f"{_gallery(rows)}</section>"
        for name, rows in embedded(galleries).items()
        if rows
    ]


def embedded(galleries: Mapping[str, Rows]) -> dict[str, EmbeddedRows]:
    """The galleries with all images at the largest side at which they keep to `MAX_BYTES`."""
    for side in SIDES:
        found = {
            name: [
                (caption, [(picture, _data_url(picture.pixels, side)) for picture in pictures])
                for caption, pictures in rows
            ]
            for name, rows in galleries.items()
        }
        urls = [url for rows in found.values() for _, row in rows for _, url in row]
        if sum(map(len, urls)) <= MAX_BYTES:
            break
    return found


def rendering(galleries: Mapping[str, Rows]) -> str:
    """CSS `image-rendering`: sharp pixels for small images, smooth for large ones."""
    sides = [
        max(picture.pixels.shape[:2])
        for rows in galleries.values()
        for _, pictures in rows
        for picture in pictures
    ]
    return "pixelated" if max(sides, default=0) <= SMALL else "auto"


def _gallery(rows: EmbeddedRows) -> str:
    parts = []
    for caption, pictures in rows:
        heading = html.escape(caption.replace("\n", ", "))
        figures = "".join(_figure(picture, url) for picture, url in pictures)
        parts.append(f'<p class="row">{heading}</p><div class="gallery">{figures}</div>')
    return "".join(parts)


def _figure(picture: Picture, url: str) -> str:
    words = html.escape(in_a_line(picture.words))
    label = ", ".join(shortened(line.rstrip(","), MAX_NAME) for line in picture.label.split(",\n"))
    return (
        f"<figure{'' if picture.correct else ' class=wrong'}>"
        f'<img src="{url}" alt="{words}" title="{words}">'
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
    )


def _data_url(pixels: np.ndarray, side: int) -> str:
    """An image (H, W, 3), shrunk to at most `side`, as a data URL."""
    lossless = max(pixels.shape[:2]) <= SMALL  # JPEG artefacts would be visible
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    if lossless:
        image.save(file, "WEBP", lossless=True)
    else:
        image.save(file, "JPEG", quality=80)
    kind = "webp" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
