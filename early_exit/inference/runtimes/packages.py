"""The packages of the runtimes, which are extras of setup.cfg."""

import importlib
from types import ModuleType

from early_exit.errors import UserError

EXTRAS = {
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxruntime",
    "openvino": "openvino",
    "nncf": "openvino",
}
"""The extra of each package."""


def import_package(name: str) -> ModuleType:
    """The package. Raises UserError, with the command that installs it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the package {name} cannot be imported ({error}); install it:"
            f' pip install "early-exit[{EXTRAS[name]}]"'
        ) from None
