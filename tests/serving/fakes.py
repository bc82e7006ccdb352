"""A small model of numpy functions and an engine for it, for tests of what is around the engine."""

import asyncio
import io
import threading
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from early_exit.deployed import DeployedClassifier
from early_exit.inference.criteria import get_traits
from early_exit.inference.infer import run_segments
from early_exit.inference.policy import Policy
from early_exit.manifest import ImageInput, Manifest, SegmentFile
from early_exit.model.macs import Cost
from early_exit.serving.engine import EngineState, RowAnswer
from early_exit.serving.load import LoadState

SHAPE = (3, 4, 4)
CLASSES = ("red", "green", "blue")
EXITS = ("layer1", "final")


def colour_segment(features, temperature=1.0, state=None):
    """Logits are the sums of the colours, in units in which a pure colour is answered surely."""
    logits = features.sum(axis=(2, 3), dtype=np.int64).astype(np.float32) / 256
    answer = logits / np.float32(temperature)
    best = answer.max(axis=1, keepdims=True)
    return features, logits, answer, 1 / np.exp(answer - best).sum(axis=1), None


def colour_model() -> DeployedClassifier:
    """Answers the strongest colour of an image; grey ones take the final exit."""
    policy = Policy(exit_names=EXITS, thresholds=(0.9,))
    manifest = Manifest(
        classes=CLASSES,
        input=ImageInput(type="uint8", shape=SHAPE, mean=(0.5,) * 3, std=(0.5,) * 3, crop=None),
        cost=Cost(
            exit_names=EXITS,
            stage_macs=(60, 40),
            head_macs=(10, 0),
            backbone_params=1,
            head_params=(1, 0),
        ),
        criterion="max_prob",
        traits=get_traits("max_prob"),
        runtime="onnxruntime",
        precision="f32",
        opset=18,
        segments=(SegmentFile("a", "", 0, 0), SegmentFile("b", "", 1, 1)),
        check={},
        network={},
        chosen_in={},
        test={},
        val_curve=[],
        versions={},
    )
    segments = [(0, colour_segment), (1, colour_segment)]
    return DeployedClassifier(CLASSES, policy, manifest.cost, manifest, segments, "onnxruntime")


class FakeRequest:
    """What `FakeEngine.submit` gives."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """As the engine's."""
        self.cancelled.set()


class FakeEngine:
    """Answers every request in a thread, the last row first, when `go` is set."""

    def __init__(self, model: DeployedClassifier) -> None:
        self.model, self.policy = model, model.policy
        self.go = threading.Event()
        self.go.set()
        self.submitted = threading.Semaphore(0)
        self.requests: list[FakeRequest] = []
        self.refuse_with: Exception | None = None
        self.fail_with: Exception | None = None
        self.expected_wait, self.stalled, self.answered = 0.0, 0.0, [0, 0]
        self.arrived = self.waiting = self.refused = 0

    def submit(
        self, images: np.ndarray, on_answer: Callable[[RowAnswer | Exception], None]
    ) -> FakeRequest:
        """As the engine's."""
        if self.refuse_with:
            raise self.refuse_with
        request = FakeRequest()
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(images, on_answer), daemon=True).start()
        self.submitted.release()
        return request

    def _answer(self, images, on_answer) -> None:
        assert self.go.wait(60)
        if self.fail_with:
            on_answer(self.fail_with)
            return
        answers = run_segments(self.model.segments, images, self.policy)
        for row in reversed(range(len(images))):
            exit_index = int(answers.exit_index[row])
            self.answered[exit_index] += 1
            on_answer(RowAnswer(row, answers.logits[row], exit_index, 0.25, 0.5))

    def set_policy(self, policy: Policy) -> None:
        """As the engine's."""
        self.policy = policy

    def count_refused(self, count: int) -> None:
        """As the engine's."""
        self.refused += count

    def load(self) -> LoadState:
        """As the engine's: rows take 10 ms in each segment and wait for the first one."""
        waiting = {self.policy.thresholds: (self.waiting, 0)}
        return LoadState(self.arrived, waiting, np.array([0.01, 0.01]), 0.0, {})

    def stalled_for(self) -> float:
        """As the engine's."""
        return self.stalled

    def snapshot(self) -> EngineState:
        """As the engine's."""
        return EngineState((3, 4), 7, tuple(self.answered), (5, 6), (50, 12), (0.5, 0.25))

    def close(self, timeout: float) -> bool:
        """As the engine's."""
        return True


def picture(colour: tuple[int, int, int], size=(9, 7), kind="PNG", **options: object) -> bytes:
    """An image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


def call(app, *requests: dict) -> list:
    """The app's responses to requests, one after the other."""

    httpx = pytest.importorskip("httpx")

    async def run() -> list:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(**request) for request in requests]

    return asyncio.run(run())


async def exchange(app, request: dict, receive: Callable) -> list[dict]:
    """The messages that the app sends for a request whose body `receive` gives, as ASGI has it."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    headers = request.get("headers", {})
    scope = {
        "type": "http",
        "method": request["method"],
        "path": request["url"],
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    return sent
