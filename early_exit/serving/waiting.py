"""Between the event loop and the engine: awaiting answers, as long as the client is connected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
from starlette.types import Receive

from early_exit.serving.engine import Engine, RowAnswer
from early_exit.serving.refused import ClientGone

Result = TypeVar("Result")


async def answers_of(engine: Engine, images: np.ndarray) -> list[RowAnswer]:
    """The engine's answers, in the order of the images. Their rows leave the engine if this task is
    cancelled.

    images: (B, C, H, W) as the first segment takes them. Raises what `Engine.submit` raises and
    SegmentFailed.
    """
    loop = asyncio.get_running_loop()
    complete: asyncio.Future[None] = loop.create_future()
    answers: dict[int, RowAnswer] = {}

    def take(answer: RowAnswer | Exception) -> None:
        if complete.done():
            return
        if isinstance(answer, Exception):
            complete.set_exception(answer)
            return
        answers[answer.row] = answer
        if len(answers) == len(images):
            complete.set_result(None)

    def on_answer(answer: RowAnswer | Exception) -> None:  # in a worker thread
        with contextlib.suppress(RuntimeError):  # the loop is closed: the grace period is over
            loop.call_soon_threadsafe(take, answer)

    request = engine.submit(images, on_answer)
    try:
        await complete
    except asyncio.CancelledError:
        request.cancel()
        raise
    return [answers[row] for row in range(len(images))]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work on a request whose body was read. The work is cancelled if the client
    closes the connection; then raises ClientGone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
