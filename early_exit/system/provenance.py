"""Which code and which versions produced a result."""

import functools
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from early_exit.errors import UserError
from early_exit.system.failures import explain_machine
from early_exit.system.text import in_a_line


def check_torchvision() -> None:
    """Raises UserError if torchvision is missing or was built for another torch."""
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and "." not in (missing or ""):
            raise UserError(
                f"{missing or 'torchvision'} is not installed; run: pip install -r requirements.txt"
            ) from None
        if lacking := explain_machine(error):
            raise lacking from None
        for module, package in (("numpy", "numpy"), ("PIL.Image", "pillow")):
            try:
                importlib.import_module(module)
            except Exception as cause:  # compiled for another version: an error of any type
                raise UserError(
                    f"{package} cannot be imported ({in_a_line(cause)}); reinstall it: pip install"
                    f" --force-reinstall {package}"
                ) from None
        torch_version, vision_version = map(importlib.metadata.version, ("torch", "torchvision"))
        reason = " ".join(str(error).split())
        raise UserError(
            f"torch {torch_version} and torchvision {vision_version} do not fit together"
            f" ({reason}); reinstall both: pip install --force-reinstall torch torchvision"
        ) from None


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, the main packages and `more`, and the git revision of this source
    tree."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # built from source
            found[package] = "unknown"
    found["git"] = git_revision()
    return found


@functools.cache
def git_revision() -> str:
    """The commit of this source tree, with -dirty if it was changed; outside a git checkout, as in
    a container image, the value of EARLY_EXIT_REVISION."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("EARLY_EXIT_REVISION", "unknown")
    return done.stdout.strip()
