"""The limits of requests, and how much all requests in progress may hold together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from early_exit.serving.engine import Engine
from early_exit.serving.refused import Refused

MAX_HEADERS = 2**14  # bytes of a request's line and headers
LARGEST_BODIES = 16  # of the largest size, that are in memory at the same time


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a request."""

    max_body: int = 2**24
    """Bytes. 64 images of 3x224x224 pixels are 9.6 million as binary tensors."""
    max_images: int = 64
    max_pixels: int = 2**26
    """Of one image, by its header. As RGB this many take 192 MiB."""
    body_seconds: float = 30.0
    """To send the body."""


class Admission:
    """Counts what the requests in progress hold; what would be too much is refused with 503. Used
    on the event loop alone."""

    def __init__(self, max_bytes: int, max_rows: int, engine: Engine) -> None:
        self.max_bytes, self.max_rows, self.engine = max_bytes, max_rows, engine
        self.bytes = self.rows = 0

    def add_bytes(self, count: int) -> None:
        """Adds bytes of a body that is read.

        Raises Refused, and adds nothing, if there is no room; the engine then counts the request as
        one image that arrived.
        """
        if self.bytes + count > self.max_bytes:
            self.engine.count_refused(1)
            raise Refused(
                503, "too many requests are being read or decoded", self.engine.expected_wait
            )
        self.bytes += count

    @contextmanager
    def hold_rows(self, count: int) -> Iterator[None]:
        """A context that holds images, from before they are decoded until they are answered.

        Raises Refused if there are too many in progress; the engine then counts them as arrived.
        """
        if self.rows + count > self.max_rows:
            self.engine.count_refused(count)
            raise Refused(503, f"{self.rows} images are in progress", self.engine.expected_wait)
        self.rows += count
        try:
            yield
        finally:
            self.rows -= count
