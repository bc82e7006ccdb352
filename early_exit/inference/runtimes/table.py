"""Placeholder."""

import torch

from early_exit.inference.runtimes.base import Runtime
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
from early_exit.inference.runtimes.openvino import OpenVINORuntime


def find_runtime(name: str, device: str = "cpu", threads: int | None = None) -> Runtime:
    """The runtime called `name`."""
    engine, _, precision = name.partition("-")
    precision = precision or "f32"
    if engine == "torch":
        return EagerRuntime(name, precision, torch.device(device))
    cls = {"onnxruntime": OnnxRuntime, "openvino": OpenVINORuntime}[engine]
    return cls(name, precision, threads)
