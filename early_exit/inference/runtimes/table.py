"""The runtimes by the name that `--runtime` takes. Importing this module imports no torch."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from early_exit.errors import UserError
from early_exit.inference.runtimes.packages import import_package

if TYPE_CHECKING:
    from early_exit.inference.runtimes.base import Runtime

DEPLOYABLE = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "openvino-int8")
"""The names of those that run ONNX models. What precedes the hyphen is the package."""
INTEGERS = ("onnxruntime-int8", "openvino-int8")
"""The names of those in 8-bit integers. A model is quantised for one of them alone."""
RUNTIMES = (
    *("torch", "torch-bf16", "torch-fp16"),
    *("compile", "compile-bf16", "compile-fp16"),
    *("cudagraph", "cudagraph-bf16", "cudagraph-fp16"),
    *DEPLOYABLE,
)
"""The names. What follows the hyphen is the precision; without one it is float32."""
NEEDED_TO_BUILD = {
    **dict.fromkeys(DEPLOYABLE, ("onnxscript",)),
    "openvino-int8": ("onnxscript", "nncf"),
}
"""The packages that building segments needs beside the runtime's own, which is enough to run what
was exported."""


def find_runtime(name: str, device: str = "cpu", threads: int | None = None) -> Runtime:
    """The runtime called `name`.

    device: as torch names it; threads: of ONNX Runtime and OpenVINO, None being one per processor
    that the process may use (torch has a setting of its own). Raises UserError for an unknown name,
    for a missing package or compiler, and for a device that the runtime does not run on.
    """
    check_name(name)
    _check(name, device)
    kind, precision = split_name(name)
    if kind == "onnxruntime":
        from early_exit.inference.runtimes.onnxruntime import OnnxRuntime

        return OnnxRuntime(name=name, precision=precision, threads=threads)
    if kind == "openvino":
        from early_exit.inference.runtimes.openvino import OpenVINORuntime

        return OpenVINORuntime(name=name, precision=precision, threads=threads)
    import torch

    from early_exit.inference.runtimes.compiled import CompiledRuntime
    from early_exit.inference.runtimes.cudagraph import CudaGraphRuntime
    from early_exit.inference.runtimes.eager import EagerRuntime

    kinds: dict[str, Callable[[str, str, torch.device], Runtime]]
    kinds = {"torch": EagerRuntime, "compile": CompiledRuntime, "cudagraph": CudaGraphRuntime}
    return kinds[kind](name, precision, torch.device(device))


def check_name(name: str, known: Sequence[str] = RUNTIMES) -> None:
    """Raises UserError for a name that is not among the known ones."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"there is no runtime {name!r}; {hint}runtimes are {', '.join(known)}")


def packages_of(name: str) -> tuple[str, ...]:
    """The packages beside torch that run the segments of the runtime called `name`."""
    return (split_name(name)[0],) if name in DEPLOYABLE else ()


def torch_name(compiled: bool, amp: str) -> str:
    """The name of torch's runtime, compiled or not. amp: bf16, fp16 or off."""
    name = "compile" if compiled else "torch"
    return name if amp == "off" else f"{name}-{amp}"


def available_runtimes(device: str) -> list[str]:
    """The runtimes that a network can be built for on a device, with the packages there are.

    Without fp16 on a CPU, and without bf16 where the processor is not made for it: they would be
    emulated, slowly.
    """
    import torch

    from early_exit.system.device import choose_precision

    fast = {"f32", "int8"}
    if device.startswith("cuda"):
        fast.add("fp16")
    if choose_precision("auto", torch.device(device)) == "bf16":
        fast.add("bf16")
    return [name for name in RUNTIMES if split_name(name)[1] in fast and _can_build(name, device)]


def split_name(name: str) -> tuple[str, str]:
    """The kind of a runtime and its precision: f32, bf16, fp16 or int8."""
    kind, _, precision = name.partition("-")
    return kind, precision or "f32"


def _can_build(name: str, device: str) -> bool:
    """Whether a network can be built for the runtime."""
    try:
        _check(name, device)
        for package in NEEDED_TO_BUILD.get(name, ()):
            import_package(package)
    except UserError:
        return False
    return True


def _check(name: str, device: str) -> None:
    """Raises UserError if the runtime cannot run here."""
    kind, _ = split_name(name)
    on_gpu = device.startswith("cuda")
    if name in DEPLOYABLE:
        if on_gpu:
            raise UserError(
                f"the runtime {name} runs on the CPU, got the device {device}; pass --device cpu"
            )
        import_package(kind)
    elif kind == "cudagraph":
        import torch

        if not (on_gpu and torch.cuda.is_available()):
            raise UserError(
                f"the runtime {name} needs a GPU, got the device {device}"
                f"{' without CUDA' if on_gpu else ''}; choose torch or compile"
            )
    elif kind == "compile" and not on_gpu:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"the runtime {name} needs the C++ compiler {compiler}, which is not installed;"
                " install it or set CXX to another one"
            )
