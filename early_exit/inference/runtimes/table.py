"""Placeholder."""

import torch

from early_exit.errors import UserError
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
    if engine not in ("onnxruntime", "openvino"):
        raise UserError(
            f"there is no runtime {name!r}; use one of {', '.join(available_runtimes(device))}"
        )
    cls = {"onnxruntime": OnnxRuntime, "openvino": OpenVINORuntime}[engine]
    return cls(name, precision, threads)


def available_runtimes(device: str = "cpu") -> list[str]:
    """The names of the runtimes that this machine has."""
    names = ["torch", "torch-bf16", "onnxruntime", "openvino", "openvino-bf16"]
    return names if device == "cpu" else names[:2]
