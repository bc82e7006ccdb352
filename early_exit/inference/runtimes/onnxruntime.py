"""ONNX Runtime, on the CPU. Loading and running models needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.infer import Array, RunSegment
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.onnx_models import OnnxModels, by_name
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.threads import share_threads


@dataclass(frozen=True)
class OnnxRuntime(OnnxModels):
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

    def quantise(self, model: bytes, example: Example) -> bytes:
        """The model in int8."""
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
