"""The packages of the runtimes and of the server, which are extras of setup.cfg."""

import importlib
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
    missing or broken."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, reason = name.partition(".")[0], " ".join(str(error).split())
        raise UserError(
            f"the package {package} cannot be imported ({reason}); install it:"
            f' pip install "early-exit[{EXTRAS[package]}]"'
        ) from None
