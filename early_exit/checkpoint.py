"""Checkpoints: plain dictionaries, written whole or not at all, read with weights_only."""

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.disk import written_whole
from early_exit.errors import UserError

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"
FORMAT = "early_exit checkpoint 1"

log = logging.getLogger(__name__)


def save(directory: Path, state: dict[str, Any]) -> None:
    """Writes `state` as the directory's newest checkpoint and keeps the one before it.

    At every moment one of the two files is whole.
    """
    newest = directory / NAME
    with written_whole(directory / f"{NAME}.new") as file:
        torch.save({"format": FORMAT, **state}, file)
    if newest.exists():
        os.replace(newest, directory / PREVIOUS)
    os.replace(directory / f"{NAME}.new", newest)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, a file or a run directory, on the CPU.

    Raises UserError, one line, where it is missing, torn, or not one of ours.
    """
    if path.is_dir():
        found, state = newest(path)
        if found:
            return state
        path = path / NAME
    state = _load(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this program"
            + ("; weights from elsewhere go to --backbone" if isinstance(state, dict) else "")
        )
    return state


def newest(directory: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest whole checkpoint of a run directory and its path, or nothing where there is none.

    A torn newest one falls back to the one before, with a warning; raises UserError where
    checkpoints exist and none is whole.
    """
    problem = None
    for name in (f"{NAME}.new", NAME, PREVIOUS):  # .new: whole, but not yet in its place
        path = directory / name
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            problem = error
            continue
        if problem:
            log.warning("%s; going on from %s", problem, path.name)
        return path, state
    if problem:
        raise problem
    return None, None


def reported(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint that are reported: the running average's where there is one."""
    return state.get("average") or state["network"]


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A plain network's weights from a file of ours or of somebody else's.

    Returns the state dict under the network's own names (a `module.` prefix is dropped, of a
    checkpoint of ours the `backbone.` part is taken) and, of a checkpoint of ours, what it says
    of itself (else an empty dictionary).
    """
    state = load(path) if path.is_dir() else _load(path)
    if isinstance(state, dict) and state.get("format") == FORMAT:
        prefix = "backbone."
        weights = {
            name.removeprefix(prefix): value
            for name, value in reported(state).items()
            if name.startswith(prefix)
        }
        return weights, {k: v for k, v in state.items() if k not in ("network", "average")}
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} holds no state dict, which --backbone expects")
    return {name.removeprefix("module."): value for name, value in state.items()}, {}


def load_into(module: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict(strict=True)` whose misfit is one line that names the first difference."""
    own = module.state_dict()
    for name in own:
        if name not in weights:
            if name.endswith(".num_batches_tracked"):
                continue  # files older than torch 0.4.1 lack it, and strict loading lets them
            raise UserError(
                f"{path} has no {name!r}, which this network needs: it was made for another"
                " --arch or other --exits"
            )
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"{path} holds {name!r} of shape {tuple(weights[name].shape)}, this network has"
                f" {tuple(own[name].shape)}: it was made for another --arch, other --exits or"
                " another number of classes"
            )
    extra = next((name for name in weights if name not in own), None)
    if extra:
        raise UserError(
            f"{path} holds {extra!r}, which this network does not have: it was made for another"
            " --arch or other --exits"
        )
    module.load_state_dict(weights)


def _load(path: Path) -> Any:
    """Whatever `torch.load` finds, with what can go wrong told in one line."""
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; check the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not check the sums when it reads
                torn = archive.testzip()
            if torn:
                raise UserError(f"{path} is damaged (the part {torn} fails its checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a file of weights alone (it is damaged, no checkpoint, or holds"
            " other objects, which are not loaded)"
        ) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # what bytes of another kind make of torch's reader has no bounds
        raise UserError(f"{path} cannot be read as a checkpoint: it is torn or damaged") from None
