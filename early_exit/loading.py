"""A run, an export of it or a deployed model, ready to classify images.

    from early_exit import load
    classify = load("runs/mine")
    print(classify(["photo.jpg"]))

A deployed model needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from early_exit import deployed
from early_exit.errors import UserError
from early_exit.manifest import is_deployed
from early_exit.system.directories import restore_all

if TYPE_CHECKING:
    from early_exit.classifier import Classifier
    from early_exit.task import Task


def load(
    path: str | Path,
    evaluation: str | None = None,
    *,
    task: Task | str | None = None,
    device: str = "auto",
    overrides: dict[str, Any] | None = None,
    runtime: str | None = None,
    threads: int | None = None,
) -> Classifier | deployed.DeployedClassifier:
    """What classifies images with the policy that an evaluation chose.

    path: a run, one of its evaluations, an export, or a deployed model. evaluation, task, device,
    overrides: of a run, see `early_exit.classifier.load`. runtime: a name of
    `early_exit.inference.runtimes.table`; default: that in which the policy was chosen. In 8-bit
    integers a deployed model runs in its own alone, and a run needs its data. threads: of a
    deployed model, see `early_exit.deployed.load`.

    Raises UserError for an argument that has no effect on what is loaded, and if it cannot be
    loaded.
    """
    if is_deployed(Path(path)):
        given = {"evaluation": evaluation, "task": task, "overrides": overrides}
        _refuse(given, f"{path} is a deployed model")
        if device not in ("auto", "cpu"):
            raise UserError(f"{path} is a deployed model, which runs on the CPU, not on {device!r}")
        return deployed.load(path, runtime, threads)
    check_directory(Path(path))
    _refuse({"threads": threads}, f"{path} is not a deployed model")
    from early_exit.classifier import load as load_run  # imports torch

    return load_run(
        path, evaluation, task=task, device=device, overrides=overrides, runtime=runtime
    )


def check_directory(path: Path) -> None:
    """Raises UserError if there is no directory to load. Needs no torch."""
    if path.parent.name == "eval":  # an evaluation that was being replaced
        restore_all(path.parent)
    if not path.is_dir():
        raise UserError(f"there is no run or deployed model at {path}")


def _refuse(given: dict[str, Any], reason: str) -> None:
    """Raises UserError for arguments that were given."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(f"{' and '.join(names)} has no effect: {reason}; remove it")
