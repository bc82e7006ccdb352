"""The packages of the runtimes and of the server, which are extras of setup.cfg."""

import importlib
import os
from types import ModuleType

from early_exit.errors import UserError

EXTRAS = {
    "onnx": "onnxruntime",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxruntime",
    "openvino": "openvino",
    "nncf": "openvino",
    **dict.fromkeys(("uvicorn", "starlette", "prometheus_client", "python_multipart"), "serve"),
}
"""The extra that installs each package."""


def import_package(name: str) -> ModuleType:
    """A package or a module in it. Raises UserError, with the command that installs it, if it is
    missing or broken.

    Turns ONNX Runtime's telemetry off, unless ORT_DISABLE_TELEMETRY is set to something else.
    """
    # Otherwise its import writes an id of the device and a database into ~/.cache and it sends
    # events to Microsoft (Privacy.md in the package); disable_telemetry_events() comes too late.
    # For any package, because others import ONNX Runtime too.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, reason = name.partition(".")[0], " ".join(str(error).split())
        raise UserError(
            f"the package {package} cannot be imported ({reason}); install it: pip install"
            f" {package.replace('_', '-')}, or this project with its extra {EXTRAS[package]}"
        ) from None
