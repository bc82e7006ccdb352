"""The weights of a run in the files that model hubs take: `model.safetensors` and `config.json`.

The first has the weights by name, in the format of https://github.com/huggingface/safetensors. The
second has everything else that using them needs. Neither can run code. `early_exit.export` writes
them; `early_exit.training.checkpoint` reads them wherever it reads a run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.errors import UserError
from early_exit.system.disk_errors import read_error
from early_exit.system.files import write_bytes, write_text
from early_exit.training import weight_files
from early_exit.training.rounding import ROUNDINGS, to_float16

WEIGHTS = "model.safetensors"
SETTINGS = "config.json"
# What of a checkpoint is in `config.json`, and its types.
TYPES: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "position": dict,
    "config": dict,
    "exit_names": list,
    "classes": list,
    "normalisation": dict,
    "val_hash": str,
    "unseen_val": (str, type(None)),
}
OPTIONAL = ("versions", "averaged", "rounded_to")  # older checkpoints lack them


def write(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes the two files of a checkpoint that has no more than its weights, under `network`, and
    what `TYPES` and `OPTIONAL` list.

    With `rounded_to`, the weights are written in float16, which they must have been rounded to.
    """
    settings = {name: value for name, value in state.items() if name != "network"}
    weights = to_float16(state["network"]) if state.get("rounded_to") else state["network"]
    content = weight_files.safetensors(weights)
    settings["sha256"] = {WEIGHTS: hashlib.sha256(content).hexdigest()}
    write_bytes(directory / WEIGHTS, content)
    write_text(directory / SETTINGS, json.dumps(settings, indent=1, allow_nan=False) + "\n")


def is_exported(directory: Path) -> bool:
    """Whether a directory has weights in this form. A file `config.json` alone may be anything."""
    return (directory / WEIGHTS).exists()


def read(directory: Path) -> dict[str, Any]:
    """What `write` was given; rounded weights in float32.

    Raises UserError if a file is missing, damaged or of another program, or if the two do not
    belong together.
    """
    settings, path = _read_settings(directory / SETTINGS), directory / WEIGHTS
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise read_error(str(path), error) from None
    if settings.pop("sha256") != {WEIGHTS: found}:
        weight_files.read(path)  # names a file of another kind, or one that is cut off
        raise UserError(
            f"{path} is not the file that {directory / SETTINGS} was written with: it is damaged or"
            " was replaced; copy both again"
        )
    weights: dict[str, Tensor] = weight_files.read(path)
    if settings.get("rounded_to"):
        weights = {
            name: value.float() if value.dtype == torch.float16 else value
            for name, value in weights.items()
        }
    return {**settings, "network": weights}


def _read_settings(path: Path) -> dict[str, Any]:
    """What `config.json` holds. Raises UserError if it is missing, damaged or another program's."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise read_error(str(path), error) from None
    except ValueError:
        raise UserError(f"{path} is incomplete or not JSON; copy it again") from None
    types = {**TYPES, "sha256": dict}
    if not isinstance(settings, dict) or not all(
        name in settings and isinstance(settings[name], kind) for name, kind in types.items()
    ):
        raise UserError(
            f"{path} was not written by early_exit.export; a trainer loads the weights beside it"
            f" with --backbone {path.with_name(WEIGHTS)}"
        )
    if settings.get("rounded_to") not in (None, *ROUNDINGS):
        raise UserError(
            f"{path} is of weights rounded to {settings['rounded_to']}, this program knows"
            f" {', '.join(ROUNDINGS)}; update early-exit"
        )
    return settings
