"""OpenVINO, on the CPU. Loading and running models needs no torch."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.infer import Array, RunSegment
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.onnx_models import OnnxModels, by_name
from early_exit.inference.runtimes.packages import import_package
from early_exit.system.processors import processors


@dataclass(frozen=True)
class OpenVINORuntime(OnnxModels):
    """OpenVINO. Implements `early_exit.inference.runtimes.base.Runtime`.

    Between segments maps are channels last and, in bf16, bfloat16 (as uint16 arrays, because numpy
    has no bfloat16): the layout and type in which OpenVINO computes. With its default, channels
    first and float32, converting at each cut took a third of the time.
    """

    name: str = "openvino"
    precision: str = "f32"
    """f32, bf16 or int8."""
    threads: int | None = None
    """None: one per processor that the process may use."""
    slow_to_build: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "bf16", "int8"):
            raise UserError(f"OpenVINO runs in f32, bf16 or int8, got {self.precision!r}")

    def quantise(self, model: bytes, example: Example) -> bytes:
        """The model in int8."""
        from early_exit.inference.runtimes.quantise import quantise_for_openvino

        return quantise_for_openvino(model, example, self.threads)

    def load(self, model: bytes | Path) -> RunSegment:
        """An ONNX model with the inputs and outputs that `onnx_export` names.

        Raises UserError for bf16 on a processor without it, where OpenVINO would compute in another
        type and not say so.
        """
        ov = import_package("openvino")
        if self.precision == "bf16" and "BF16" not in capabilities():
            raise UserError(
                "OpenVINO has no bf16 on this processor; choose the runtime openvino, which"
                " computes in float32"
            )
        read = _core().read_model(model if isinstance(model, bytes) else str(model))
        between = ov.Type.bf16 if self.precision == "bf16" else ov.Type.f32
        process = ov.preprocess.PrePostProcessor(read)
        for ports, entry in ((read.inputs, process.input), (read.outputs, process.output)):
            for index, port in enumerate(ports):
                if "features" not in port.any_name:
                    continue
                tensor = entry(index).tensor().set_element_type(between)
                if len(port.partial_shape) == 4:
                    tensor.set_layout(ov.Layout("NHWC"))
                    entry(index).model().set_layout(ov.Layout("NCHW"))
        compiled = _core().compile_model(
            process.build(),
            "CPU",
            {
                # it would take bf16 by itself where the processor is made for it
                "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self.threads or processors(),
            },
        )
        return OpenVINOModel(compiled, compiled.create_infer_request())


@functools.cache
def _core() -> Any:
    return import_package("openvino").Core()


def capabilities() -> list[str]:
    """The types in which OpenVINO computes on this processor, such as FP32 and BF16."""
    return _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOModel:
    """A compiled model, called as a segment, by one thread after the other."""

    def __init__(self, compiled: Any, request: Any) -> None:
        self.request, self.lock = request, threading.Lock()
        self.package = import_package("openvino")
        self.inputs = [port.any_name for port in compiled.inputs]
        self.outputs = [port.any_name for port in compiled.outputs]
        self.input_types = [port.element_type for port in compiled.inputs]

    def __call__(self, features: Array, temperature: float = 1.0, state: Array | None = None):
        parts = iter(features if isinstance(features, tuple) else (features,))
        arrays = []  # OpenVINO's tensors use their memory and do not keep them alive
        for name in self.inputs:
            if name == "temperature":
                value: Any = np.array(temperature, np.float32)
            else:
                value = state if name == "state" else next(parts)
            arrays.append(np.require(value, requirements="C"))
        with self.lock:
            for index, (array, kind) in enumerate(zip(arrays, self.input_types, strict=True)):
                shape = self.package.Shape(list(array.shape))  # a tensor in the array's memory
                self.request.set_input_tensor(index, self.package.Tensor(array, shape, kind))
            self.request.infer()
            # the request's own memory, which the next call overwrites
            values = [
                _array(self.request.get_output_tensor(index)) for index in range(len(self.outputs))
            ]
        return by_name(self.outputs, values)


def _array(tensor: Any) -> np.ndarray:
    """A copy of OpenVINO's tensor; bfloat16 as uint16."""
    data = tensor.data
    return (data.view(np.uint16) if data.dtype == np.float16 else data).copy()
