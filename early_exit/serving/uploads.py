"""From the body of a request to images: the files in it, and their pixels. Everything is in memory;
a file's name in a request is not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from early_exit.data.decoding import Unreadable, decode
from early_exit.manifest import ImageInput
from early_exit.serving.limits import Limits
from early_exit.serving.refused import Refused
from early_exit.system.text import shortened

FORM = "multipart/form-data"


def check_type(content_type: str) -> None:
    """Raises Refused for a type of body that holds no images."""
    kind = _kind(content_type)
    if kind != FORM and not kind.startswith("image/"):
        raise Refused(
            415,
            f"the body has the type {shortened(kind, 80) or 'unknown'}; expected an image, as"
            f" image/jpeg, or several as {FORM}",
        )


def files_of(content_type: str, body: bytes, max_images: int) -> list[bytes]:
    """The image files in a body of a type that `check_type` accepts, at least one.

    Raises Refused for a form that cannot be read (400), too many parts (413) and parts of another
    type (415).
    """
    if _kind(content_type) != FORM:
        return [body]
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Refused(400, f"the type {FORM} has no boundary")
    form = _Form(max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refused(400, f"the form cannot be read ({shortened(error, 120)})") from None
    if not form.has_ended:
        raise Refused(400, "the form is incomplete: its last boundary is missing")
    if not form.files:
        raise Refused(400, "the form has no parts; expected an image in each")
    return form.files


def pixels_of(files: Sequence[bytes], image_input: ImageInput, limits: Limits) -> np.ndarray:
    """The images as the first segment takes them, (B, C, H, W), decoded as in `predict`.

    Raises Refused, with the number of the image from 1 on, for one that cannot be decoded or has
    too many pixels (422).
    """
    images = []
    for number, file in enumerate(files, 1):
        try:
            image, _ = decode(file, limits.max_pixels)
            images.append(image_input.read(image))
        except Unreadable as error:
            which = f"image {number} of {len(files)}"
            reason = shortened(error.reason, 200)
            raise Refused(422, f"{which} cannot be read as an image ({reason})") from None
    return image_input.array(np.stack(images))


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


class _Form:
    """The parts of a form while it is parsed."""

    def __init__(self, max_images: int) -> None:
        self.max_images = max_images
        self.files: list[bytes] = []
        self.has_ended = False
        self._data: list[bytes] = []
        self._name, self._value = b"", b""
        self._type = ""

    def callbacks(self) -> Any:
        """As the parser takes them."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.files) == self.max_images:
            raise Refused(413, f"the form has more than {self.max_images} images")
        self._data, self._type = [], ""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-type":
            self._type = _kind(self._value.decode("latin-1"))
        self._name, self._value = b"", b""

    def _headers_finished(self) -> None:
        # curl names a file of an unknown suffix application/octet-stream
        if self._type and not self._type.startswith(("image/", "application/octet-stream")):
            number = len(self.files) + 1
            raise Refused(
                415, f"part {number} has the type {shortened(self._type, 80)}; expected an image"
            )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _part_end(self) -> None:
        self.files.append(b"".join(self._data))

    def _end(self) -> None:
        self.has_ended = True
