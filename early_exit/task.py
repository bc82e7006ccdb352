"""A task: what the scripts of a data set bring, and the table of the known ones."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from early_exit.config import Config
from early_exit.data.base import Data
from early_exit.errors import UserError
from early_exit.model.losses import joint_loss
from early_exit.model.network import MultiExitNetwork


@dataclass(frozen=True)
class StaticNetwork:
    """A network without exits to compare with, and what is known of it."""

    name: str
    accuracy: float
    """On the official test set."""
    source: str
    """Who states the accuracy."""
    build: Callable[[], nn.Module]
    """Builds it, untrained: its latency does not depend on its weights."""


def no_static_networks(_config: Config, _num_classes: int) -> Sequence[StaticNetwork]:
    """For a task without networks to compare with."""
    return ()


@dataclass(frozen=True)
class Task:
    """What a data set's scripts bring: how networks are built and data are loaded."""

    build_network: Callable[[Config, int], MultiExitNetwork]
    """From the configuration and the number of classes."""
    load_data: Callable[[Any], Data]
    """From the data section of the configuration."""
    config: type[Config] = Config
    """The class of the configuration, with the task's own settings."""
    name: str = ""
    """By which a report names the task: a key of `TASKS`, or `package.module:NAME`."""
    static_networks: Callable[[Config, int], Sequence[StaticNetwork]] = no_static_networks
    """Networks without exits, trained by others on the same data, that could be used instead. From
    the configuration and the number of classes."""
    loss: Callable[..., Tensor] = joint_loss
    """What training minimises, called as `early_exit.model.losses.joint_loss` is. Settings of the
    configuration's loss beyond the library's are passed by name. On val it gets the
    weights and the task's own settings.
    """
    prepare: Callable[[Config, Image.Image], Image.Image] | None = None
    """Prepares an image file for evaluation: RGB to RGB. Default: the centre of the image, cropped
    to the network's aspect ratio and resized. For class folders: `early_exit.data.folders.prepare`.
    """


TASKS = {"cifar10": "cifar10.trainer:TASK", "imagenet": "imagenet.main:TASK"}
"""The tasks that a report may name, and where they are defined. Nothing else is imported because a
file says so; add yours to allow it, or pass it to `load`."""


def find_task(name: str) -> Task:
    """The task called `name` in `TASKS`. Raises UserError for a name that is not there."""
    if name not in TASKS:
        raise UserError(
            f"the run was made by the task {name!r}, which is not one of {', '.join(TASKS)}; pass"
            f" it by name if you trust it: --task package.module:NAME, or load(run, task=...)"
        )
    return import_task(TASKS[name])


def import_task(path: str) -> Task:
    """The task at `package.module:NAME`. Raises UserError if there is none."""
    module, _, attribute = path.partition(":")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"the task {path} cannot be imported ({error})") from None
    if not isinstance(task, Task):
        raise UserError(f"{path} is a {type(task).__name__}; expected a Task")
    return task
