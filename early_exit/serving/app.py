"""The routes of the server. Nothing here computes: images are decoded in threads of their own, and
the model runs in the engine's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from early_exit.deployed import DeployedClassifier
from early_exit.serving import protocol, uploads
from early_exit.serving.body import Body
from early_exit.serving.engine import Engine, Overloaded, RowAnswer, SegmentFailed
from early_exit.serving.limits import LARGEST_BODIES, MAX_HEADERS, Admission, Limits
from early_exit.serving.metrics import Metrics
from early_exit.serving.refused import ClientGone, Refused
from early_exit.serving.waiting import answers_of, while_connected
from early_exit.system.text import in_a_line, shortened

log = logging.getLogger(__name__)

FEW_BYTES = 2**13  # of a request's body: converted without a change of threads
DECODERS = 2  # one image is decoded at a time (early_exit.data.decoding), another one resized
GONE = 499  # as nginx logs it; nobody reads the answer
OTHER = "other"  # routes that there are not

Handler = Callable[[Request, Body], Awaitable[Response]]
Result = TypeVar("Result")


class Service:
    """A model, its engine, and what the requests to it have in common. Used on the event loop."""

    def __init__(
        self,
        model: DeployedClassifier,
        engine: Engine,
        name: str,
        *,
        limits: Limits,
        max_rows: int,
        stall: float,
    ) -> None:
        """name: of the model, in addresses; max_rows: images in progress, at most; stall: seconds
        after which a run of a segment counts as hanging."""
        self.model, self.engine, self.limits, self.stall = model, engine, limits, stall
        manifest = model.manifest
        self.signature = protocol.Signature(
            name,
            f"{model.runtime.partition('-')[0]}_onnx",
            manifest.input.shape,
            len(manifest.classes),
        )
        self.metrics = Metrics(engine, manifest)
        self.admission = Admission(LARGEST_BODIES * limits.max_body, max_rows, engine)
        self.pool = ThreadPoolExecutor(DECODERS, "decoder")
        self.stopping = False
        self.unanswered = 0
        """Requests that were read whole and not answered within the grace period."""

    async def classify(self, request: Request, body: Body) -> Response:
        """POST /v1/classify."""
        content_type = request.headers.get("content-type", "")
        uploads.check_type(content_type)
        await body.read()
        answers = await while_connected(request.receive, self._classify(content_type, body))
        logits, exit_index = _arrays(answers)
        rows = []
        for found, answer in zip(
            self.model.predictions_of(logits, exit_index), answers, strict=True
        ):
            values = dataclasses.asdict(found)
            rows.append(
                {
                    "class": values.pop("name"),
                    **values,
                    "queued_ms": 1000 * answer.queued,
                    "computed_ms": 1000 * answer.computed,
                }
            )
        return _Json({"predictions": rows})

    async def _classify(self, content_type: str, body: Body) -> list[RowAnswer]:
        with self.admission.hold_rows(1):  # its others are not known yet
            files = await self._in_pool(
                uploads.files_of, content_type, body.content, self.limits.max_images
            )
            with self.admission.hold_rows(len(files) - 1):
                image_input = self.model.manifest.input
                images = await self._in_pool(uploads.pixels_of, files, image_input, self.limits)
                del files
                body.free()
                return await self._answers(images)

    async def infer(self, request: Request, body: Body) -> Response:
        """POST /v2/models/NAME/infer."""
        self._check_name(request)
        await body.read()
        length = request.headers.get(protocol.HEADER_LENGTH)
        asked, answers = await while_connected(request.receive, self._infer(body, length))
        payload, header = protocol.write_response(asked, self.signature, *_arrays(answers))
        if header is None:
            return Response(payload, media_type="application/json")
        return Response(
            payload, media_type=protocol.BINARY, headers={protocol.HEADER_LENGTH: str(header)}
        )

    async def _infer(
        self, body: Body, length: str | None
    ) -> tuple[protocol.InferRequest, list[RowAnswer]]:
        """Tensors do not wait for the images that are decoded."""
        with self.admission.hold_rows(1):
            convert = _directly if len(body.content) <= FEW_BYTES else asyncio.to_thread
            asked = await convert(
                protocol.read_request, body.content, length, self.signature, self.limits.max_images
            )
            with self.admission.hold_rows(len(asked.images) - 1):
                images = await convert(self.model.manifest.input.array, asked.images)
                body.free()
                return asked, await self._answers(images)

    async def _answers(self, images: np.ndarray) -> list[RowAnswer]:
        policy = self.engine.policy  # that they come with: it changes on the event loop alone
        answers = await answers_of(self.engine, images)
        self.metrics.count_exits(policy, [answer.exit_index for answer in answers])
        return answers

    async def server_metadata(self, _request: Request, _body: Body) -> Response:
        """GET /v2."""
        return _Json(protocol.server_metadata())

    async def live(self, _request: Request, _body: Body) -> Response:
        """GET /v2/health/live."""
        is_live = self.engine.stalled_for() <= self.stall
        return _Json({"live": is_live}, 200 if is_live else 503)

    async def ready(self, _request: Request, _body: Body) -> Response:
        """GET /v2/health/ready."""
        return _Json({"ready": not self.stopping}, 503 if self.stopping else 200)

    async def model_metadata(self, request: Request, _body: Body) -> Response:
        """GET /v2/models/NAME."""
        self._check_name(request)
        return _Json(protocol.model_metadata(self.signature))

    async def model_ready(self, request: Request, _body: Body) -> Response:
        """GET /v2/models/NAME/ready."""
        self._check_name(request)
        values = {"name": self.signature.name, "ready": not self.stopping}
        return _Json(values, 503 if self.stopping else 200)

    async def show_metrics(self, _request: Request, _body: Body) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def close(self) -> None:
        """Ends the decoders; what they have not begun is cancelled."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _check_name(self, request: Request) -> None:
        given, own = request.path_params["name"], self.signature.name
        if given != own:
            given = shortened(given, 80)
            raise Refused(404, f"there is no model {given}; this server has {own}")

    async def _in_pool(self, function: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, function, *arguments)


async def _directly(function: Callable[..., Result], *arguments: Any) -> Result:
    """As `asyncio.to_thread`, without a thread."""
    return function(*arguments)


def build_app(service: Service) -> Starlette:
    """The routes of a service."""

    async def unknown(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.count(OTHER, error.status_code)
        return _error(error.status_code, error.detail, headers=error.headers)

    routes = [
        _route(service, method, path, handler)
        for method, path, handler in (
            ("POST", "/v1/classify", service.classify),
            ("GET", "/v2", service.server_metadata),
            ("GET", "/v2/health/live", service.live),
            ("GET", "/v2/health/ready", service.ready),
            ("GET", "/v2/models/{name}", service.model_metadata),
            ("GET", "/v2/models/{name}/ready", service.model_ready),
            ("POST", "/v2/models/{name}/infer", service.infer),
            ("GET", "/metrics", service.show_metrics),
        )
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: unknown})


def _route(service: Service, method: str, path: str, handler: Handler) -> Route:
    """A route whose errors are answered and whose requests are counted."""

    async def endpoint(request: Request) -> Response:
        begin = time.perf_counter()
        with Body(request, service.limits, service.admission) as body:
            response = await _answer(service, handler, request, body)
        service.metrics.count(path, response.status_code, time.perf_counter() - begin)
        return response

    return Route(path, endpoint, methods=[method])


async def _answer(service: Service, handler: Handler, request: Request, body: Body) -> Response:
    """What the handler answers, or its error as an answer."""
    try:
        try:
            _check_headers(request)
            return await handler(request, body)
        except Refused as error:
            response = _error(error.status, str(error), error.retry_after)
        except Overloaded as error:
            response = _error(503, str(error), error.retry_after)
        except SegmentFailed as error:  # which the engine logs
            response = _error(500, str(error))
        except ClientGone:
            raise
        except Exception:
            log.exception("an error in %s", request.url.path)
            response = _error(500, "an error in the server; its log says more")
        if response.status_code == 503:
            service.metrics.count_rejected()
        await body.discard()
        if not body.ended:
            response.headers["connection"] = "close"
        return response
    except ClientGone:
        return Response(status_code=GONE)
    except asyncio.CancelledError:  # the grace period is over
        if not service.stopping:
            raise
        service.unanswered += body.ended
        response = _error(503, "the server is ending", retry_after=1)
        response.headers["connection"] = "close"
        return response


def _check_headers(request: Request) -> None:
    """Raises Refused for long headers. Those that arrive in parts were refused before."""
    size = sum(len(name) + len(value) for name, value in request.headers.raw)
    if size > MAX_HEADERS:
        raise Refused(431, f"the headers have {size} bytes; at most {MAX_HEADERS} are accepted")


class _Json(JSONResponse):
    """JSON in ASCII: the name of a class or a file may be no valid Unicode."""

    def render(self, content: Any) -> bytes:
        """See `starlette.responses.JSONResponse`."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _error(
    status: int,
    message: str,
    retry_after: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error in the protocol's form, one line of text."""
    response = _Json({"error": in_a_line(message)}, status, headers=headers)
    if retry_after is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
    return response


def _arrays(answers: Sequence[RowAnswer]) -> tuple[np.ndarray, np.ndarray]:
    """The logits (B, K) and the exits (B,) of the answers."""
    logits = np.stack([answer.logits for answer in answers])
    return logits, np.array([answer.exit_index for answer in answers], np.int64)
