"""Checkpoints: plain dictionaries, written whole or not at all, read with weights_only.

A run has them in `checkpoint.pt`, an export of a run in the files of
`early_exit.training.exported`. Both are read here.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.config import Config
from early_exit.errors import Unavailable, UserError
from early_exit.model.network import MultiExitNetwork
from early_exit.system.disk_errors import IN_USE, write_errors
from early_exit.system.files import atomic_file, move
from early_exit.task import Task
from early_exit.training import exported, weight_files
from early_exit.training.rounding import rounded
from early_exit.training.state_dicts import Weights, check_finite, find_weights, load_into

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
        try:
            if newest.exists():
                move(newest, directory / PREVIOUS)
            move(directory / f"{NAME}.new", newest)
        except OSError as error:
            if error.errno not in IN_USE:
                raise
            log.warning(
                "%s cannot be replaced (%s): another process may have it open; the newest"
                " checkpoint is in %s.new",
                newest,
                error.strerror,
                NAME,
            )


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, a file or a run directory, on the CPU.

    Raises UserError if it is missing, damaged, or not a checkpoint of this program.
    """
    if path.is_dir():
        _, state = newest(path)
        if state is not None:
            return state
        raise UserError(
            f"{path} holds no {NAME} or {exported.WEIGHTS}; expected a run directory, an export or"
            " a file of weights"
        )
    return _checked(weight_files.read(path), path)


def _checked(state: Any, path: Path) -> dict[str, Any]:
    """What was read at `path`, if it is a checkpoint of this program; else raises UserError."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        hint = "; a trainer loads other weights with --backbone" if isinstance(state, dict) else ""
        raise UserError(f"{path} is not a checkpoint of this program{hint}")
    return state


def exists_in(directory: Path) -> bool:
    """Whether a directory is a run, with or without a checkpoint so far, or an export."""
    begun = all((directory / name).exists() for name in ("config.yaml", "versions.json"))
    saved = any((directory / name).exists() for name in (NAME, f"{NAME}.new", PREVIOUS))
    return begun or saved or exported.is_exported(directory)


def newest(directory: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The path and content of the newest complete checkpoint of a run, or of that of an export;
    (None, None) without one.

    If the newest is damaged, the previous one is returned, with a warning. Raises UserError if all
    are damaged, and Unavailable if one cannot be read now: it may be whole.
    """
    problem = None
    for name in (f"{NAME}.new", NAME, PREVIOUS):  # .new is complete, but not yet renamed
        path = directory / name
        if not path.exists():
            continue
        try:
            state = load(path)
        except Unavailable:
            raise
        except UserError as error:
            problem = error
            continue
        if problem:
            log.warning("%s; using %s instead", problem, path.name)
        return path, state
    if problem:
        raise problem
    if exported.is_exported(directory):
        path = directory / exported.WEIGHTS
        return path, _checked(exported.read(directory), directory / exported.SETTINGS)
    return None, None


def reported(state: dict[str, Any], rounded_to: str | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint that are reported: the average's if there is one.

    rounded_to: one of `early_exit.training.rounding.ROUNDINGS`; None: as they are. Raises UserError
    if they cannot be rounded.
    """
    weights = state.get("average") or state["network"]
    return rounded(weights) if rounded_to else weights


def build_network(
    state: dict[str, Any], task: Task, config: Config, path: Path, rounded_to: str | None = None
) -> MultiExitNetwork:
    """The network of a checkpoint that was read at `path`, with the weights that are reported, on
    the CPU. If its settings (`config`) leave the exits to the default, which may have changed
    since, they are those that it was trained with.

    rounded_to: as for `reported`. Raises UserError if the weights do not fit.
    """
    early = tuple(state["exit_names"][:-1])
    if config.model.exits is None and early:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, exits=early))
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        network = task.build_network(config, len(state["classes"]))
    load_into(network, reported(state, rounded_to), path)
    return network


def weights_hash(weights: dict[str, Tensor]) -> str:
    """A short hash of the weights of a network on the CPU."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_backbone(path: Path, own: Mapping[str, Tensor]) -> tuple[Weights, dict[str, Any]]:
    """A plain network's weights, from a checkpoint of this program or from any file of weights.

    own: the network's state dict. Returns the weights under the network's names, and the rest of
    the checkpoint, which is empty for another file.
    """
    content = load(path) if path.is_dir() else weight_files.read(path, blanks=True)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        content, prefix = load(path), "backbone."  # without blanks
        weights = {
            name.removeprefix(prefix): value
            for name, value in reported(content).items()
            if name.startswith(prefix)
        }
        return weights, {k: v for k, v in content.items() if k not in ("network", "average")}
    return find_weights(content, own, path), {}


def classifier_of_other_classes(
    network: MultiExitNetwork, weights: Mapping[str, Tensor]
) -> list[str]:
    """The names of the classifier's weights if they are of another number of classes than the
    network's and otherwise of the same shape; else none."""
    *_, classifier = network.units.values()
    ours = {id(parameter) for parameter in classifier.parameters()}
    found = []
    for name, parameter in network.backbone.named_parameters():
        theirs = weights.get(name)
        if id(parameter) not in ours or theirs is None or theirs.shape == parameter.shape:
            continue
        if len(parameter) != network.num_classes or theirs.shape[1:] != parameter.shape[1:]:
            return []
        found.append(name)
    return found


def load_backbone_into(
    network: MultiExitNetwork, path: Path, new_classifier: bool = False, advice: str = ""
) -> dict[str, Any]:
    """Loads a plain network's weights into the backbone; returns the rest of the checkpoint.

    new_classifier: whether a classifier for another number of classes is left out, so that the
    network keeps its own, untrained one. Otherwise it raises UserError; advice: what to do then.
    """
    own = network.backbone.state_dict()
    weights, meta = load_backbone(path, own)
    if other := classifier_of_other_classes(network, weights):
        count = len(weights[other[0]])
        if not new_classifier:
            raise UserError(
                f"{path} has a classifier of {count} classes, the data have {network.num_classes}"
                f"{advice}"
            )
        log.info(
            "%s: its classifier of %d classes is replaced by an untrained one of %d classes",
            path,
            count,
            network.num_classes,
        )
        weights = {**weights, **{name: own[name] for name in other}}
    owner = f"the plain network of {network.num_classes} classes"
    load_into(network.backbone, weights, path, owner)
    check_finite(network.backbone, path)
    return meta
