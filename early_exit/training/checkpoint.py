"""Checkpoints: plain dictionaries, written whole or not at all, read with weights_only."""

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.errors import UserError
from early_exit.model.network import MultiExitNetwork
from early_exit.system.files import atomic_file, move, write_errors

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"
FORMAT = "early_exit checkpoint 1"

log = logging.getLogger(__name__)


def save(directory: Path, state: dict[str, Any]) -> None:
    """Writes `state` as the newest checkpoint of a directory and keeps the previous one.

    One of the two files is complete at every moment.
    """
    newest = directory / NAME
    with atomic_file(directory / f"{NAME}.new") as file:
        torch.save({"format": FORMAT, **state}, file)
    with write_errors(newest):
        if newest.exists():
            move(newest, directory / PREVIOUS)
        move(directory / f"{NAME}.new", newest)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, a file or a run directory, on the CPU.

    Raises UserError if it is missing, damaged, or not a checkpoint of this program.
    """
    if path.is_dir():
        _, state = newest(path)
        if state is not None:
            return state
        path = path / NAME
    state = _read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        hint = "; load other weights with --backbone" if isinstance(state, dict) else ""
        raise UserError(f"{path} is not a checkpoint of this program{hint}")
    return state


def newest(directory: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The path and content of a directory's newest complete checkpoint; (None, None) without one.

    If the newest is damaged, the previous one is returned, with a warning. Raises UserError if all
    are damaged.
    """
    problem = None
    for name in (f"{NAME}.new", NAME, PREVIOUS):  # .new is complete, but not yet renamed
        path = directory / name
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            problem = error
            continue
        if problem:
            log.warning("%s; using %s instead", problem, path.name)
        return path, state
    if problem:
        raise problem
    return None, None


def reported(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint that are reported: the average's if there is one."""
    return state.get("average") or state["network"]


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A plain network's weights, from a checkpoint of this program or from any state dict.

    Returns the state dict, under the plain network's names (without the prefix `backbone.` or
    `module.`), and the rest of the checkpoint, which is empty for a state dict.
    """
    state = load(path) if path.is_dir() else _read(path)
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


def load_backbone_into(network: MultiExitNetwork, path: Path) -> dict[str, Any]:
    """Loads a plain network's weights into the backbone; returns the rest of the checkpoint."""
    weights, meta = load_backbone(path)
    load_into(network.backbone, weights, path)
    return meta


def load_into(module: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict(strict=True)`, but a mismatch raises UserError with one line that names the
    first difference. path: where the weights were read, for that line."""
    own = module.state_dict()
    for name in own:
        if name not in weights:
            if name.endswith(".num_batches_tracked"):
                continue  # files older than torch 0.4.1 lack it, and strict loading allows that
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


def _read(path: Path) -> Any:
    """What `torch.load` returns. Raises UserError if the file cannot be read."""
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; check the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not verify checksums
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged (its part {damaged} fails its checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} does not hold only weights: it is damaged, not a checkpoint, or holds other"
            " objects, which are not loaded for safety"
        ) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # torch may raise anything on a file of another kind
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is incomplete or damaged"
        ) from None
