"""The body of a request, read with limits."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from early_exit.serving.limits import Admission, Limits
from early_exit.serving.refused import ClientGone, Refused
from early_exit.system.text import shortened


class Body:
    """The body of one request. A context: what it holds is free when the context ends, or after
    `free`."""

    def __init__(self, request: Request, limits: Limits, admission: Admission) -> None:
        self.receive, self.headers = request.receive, request.headers
        self.limits, self.admission = limits, admission
        self.deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self.content = b""
        self.ended = self._begun = False
        self._held = 0

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def free(self) -> None:
        """Lets go of the content, because images were made of it."""
        self.content = b""
        self.admission.bytes -= self._held
        self._held = 0

    async def read(self) -> None:
        """Reads the whole body into `content`.

        Raises Refused if it is empty (400), compressed (415), too large (413) or slow (408) or if
        the bodies of all requests are too large together (503), and ClientGone.
        """
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise Refused(415, f"the body is encoded as {shortened(encoding, 40)}; expected none")
        # the server has checked that it is a number
        if int(self.headers.get("content-length", 0)) > self.limits.max_body:
            raise self._too_large()
        parts = []
        try:
            async with asyncio.timeout_at(self.deadline):
                while not self.ended:
                    part = await self._next()
                    if self._held + len(part) > self.limits.max_body:
                        raise self._too_large()
                    self.admission.add_bytes(len(part))
                    self._held += len(part)
                    parts.append(part)
        except TimeoutError:
            seconds = f"{self.limits.body_seconds:g} seconds"
            raise Refused(408, f"the body did not arrive within {seconds}") from None
        if not self._held:
            raise Refused(400, "the body is empty")
        self.content = b"".join(parts)

    async def discard(self) -> None:
        """Reads the rest of a body whose request is refused: a client that sends before it reads
        would see a broken connection instead of the answer. Sets `ended` unless there is more than
        the largest body, or it is slow, or the client waits to be asked for it. Raises ClientGone.
        """
        if "expect" in self.headers and not self._begun:
            return
        size = 0
        try:
            async with asyncio.timeout_at(self.deadline):
                while not self.ended and size <= self.limits.max_body:
                    size += len(await self._next())
        except TimeoutError:
            return

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self.limits.max_body} bytes")

    async def _next(self) -> bytes:
        self._begun = True
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self.ended = not message.get("more_body", False)
        return message.get("body", b"")
