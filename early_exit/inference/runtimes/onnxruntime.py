"""ONNX Runtime, on the CPU. Loading and running models needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.infer import Array, RunSegment
from early_exit.inference.runtimes.base import Example, RunNetwork
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.threads import share_threads

if TYPE_CHECKING:
    from torch import Tensor, nn

    from early_exit.inference.segments import Segment


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime. Implements `early_exit.inference.runtimes.base.Runtime`."""

    name: str = "onnxruntime"
    precision: str = "f32"
    """f32 or int8."""
    threads: int | None = None
    """None: one per processor that the process may use."""
    slow_to_build: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "int8"):
            raise UserError(f"ONNX Runtime runs in f32 or int8, got {self.precision!r}")

    def array(self, images: Tensor) -> np.ndarray:
        """The images, channels first."""
        return images.cpu().contiguous().numpy()

    def segment(self, segment: Segment, example: Example) -> RunSegment:
        """Exports and loads a segment."""
        from early_exit.inference.runtimes.onnx_export import export_segment

        return self.load(self._quantised(export_segment(segment, example), example))

    def network(self, network: nn.Module, example: Tensor) -> RunNetwork:
        """Exports and loads a network without exits."""
        from early_exit.inference.runtimes.onnx_export import export_network

        model = self._quantised(export_network(network, example), Example(example))
        return as_network(self.load(model))

    def _quantised(self, model: bytes, example: Example) -> bytes:
        """The model in the runtime's precision."""
        if self.precision != "int8":
            return model
        from early_exit.inference.runtimes.quantise import quantise_for_onnxruntime

        return quantise_for_onnxruntime(model, example, self.threads)

    def load(self, model: bytes | Path) -> RunSegment:
        """An ONNX model with the inputs and outputs that `onnx_export` names."""
        ort = import_package("onnxruntime")
        options = ort.SessionOptions()
        share_threads(self.threads)
        options.use_per_session_threads = False
        options.log_severity_level = 3  # errors; warnings are about optimisations
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
        return OnnxSession(
            session,
            [item.name for item in session.get_inputs()],
            [item.name for item in session.get_outputs()],
        )

    def context(self) -> AbstractContextManager:
        """Nothing."""
        return nullcontext()

    def synchronize(self) -> None:
        """Every call waits for its result."""


@dataclass(frozen=True)
class OnnxSession:
    """A loaded model, called as a segment."""

    session: Any
    inputs: Sequence[str]
    outputs: Sequence[str]

    def __call__(self, features: Array, temperature: float = 1.0, state: Array | None = None):
        parts = features if isinstance(features, tuple) else (features,)
        feeds = dict(zip(self.inputs, parts, strict=False))
        if "temperature" in self.inputs:
            feeds["temperature"] = np.array(temperature, np.float32)
        if "state" in self.inputs:
            feeds["state"] = state
        return by_name(self.outputs, self.session.run(None, feeds))


def by_name(
    names: Sequence[str], values: Sequence[Array]
) -> tuple[Any, Array, Array, Array, Array | None]:
    """The outputs of a model, in the order of a segment's. At the final exit the features are the
    logits."""
    found = dict(zip(names, values, strict=True))
    maps = tuple(value for name, value in found.items() if name.startswith("next_features_"))
    logits = found["logits"]
    features = maps or found.get("next_features", logits)
    return features, logits, found.get("answer"), found.get("score"), found.get("next_state")


def as_network(segment: RunSegment) -> RunNetwork:
    """A model of a network without exits as a function from images to logits."""
    return lambda images: segment(images)[1]
