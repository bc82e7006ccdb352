"""A trained run read from its directory: its network, data, records and evaluations."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from early_exit import config as configs
from early_exit.choosing.overthinking import confusion, correct_answers
from early_exit.choosing.record import ExitRecord, RecordInfo, record
from early_exit.config import Config
from early_exit.data.base import Data
from early_exit.errors import UserError
from early_exit.model.cost import Cost, network_cost
from early_exit.model.network import MultiExitNetwork
from early_exit.system.device import (
    autocast_context,
    choose_device,
    choose_precision,
    describe_device,
    set_up,
)
from early_exit.system.files import locked, restore, restore_all
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.phases import plan_phases

log = logging.getLogger(__name__)

# The machine settings of evaluations, unless overridden; those of training are ignored.
EVALUATION = {"device": "auto", "amp": "off", "threads": None, "compile": False}


@dataclass(frozen=True)
class Loaded:
    """A trained network, on its device, in eval mode."""

    run_dir: Path
    config: Config
    network: MultiExitNetwork
    classes: tuple[str, ...]
    normalisation: dict[str, list[float]]
    """{"mean": [...], "std": [...]} of the images it was trained on."""
    device: torch.device
    precision: str
    weights: str
    """Hash of the weights, and which they are."""
    val_hash: str
    """Hash of the val images that training held out."""
    unseen_val: str | None
    """Hash of the val images if no weight has seen them."""

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """The context that the network runs in."""
        return partial(autocast_context, self.precision, self.device)


@dataclass(frozen=True)
class Trained(Loaded):
    """A trained network with its data, on the device."""

    data: Data
    cost: Cost


@dataclass(frozen=True)
class Splits:
    """The records of val and test, and the data they index."""

    val: ExitRecord
    test: ExitRecord
    data: Data
    origin: str
    """Where val came from, in words."""

    @cached_property
    def correct_val(self) -> np.ndarray:
        """Whether each exit on its own is right about each val image, (images, exits) bool."""
        return correct_answers(self.val)

    @cached_property
    def correct_test(self) -> np.ndarray:
        """Whether each exit on its own is right about each test image, (images, exits) bool."""
        return correct_answers(self.test)

    @cached_property
    def confusion(self) -> np.ndarray:
        """The confusion score of each test image, (images,)."""
        return confusion(self.test, self.val)


def check_run_directory(run_dir: Path) -> None:
    """Raises UserError if there is no run directory."""
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory at {run_dir}; training prints its path")


def evaluations(run_dir: Path, file: str) -> dict[str, Path]:
    """The paths of `file` in a run's evaluations that have it, by the name of the evaluation, in
    order. A name that begins with a dot was never finished."""
    restore_all(run_dir / "eval")
    return {
        path.parent.name: path
        for path in sorted(run_dir.glob(f"eval/*/{file}"))
        if not path.parent.name.startswith(".")
    }


def training_command(run_dir: Path) -> list[str]:
    """The script that trained a run and its flags; empty if the run does not say."""
    try:
        command = json.loads((run_dir / "versions.json").read_text("utf-8"))["command"]
        return [str(word) for word in command]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def load_network(run_dir: Path, task: Task, overrides: dict) -> Loaded:
    """The network of a run's newest checkpoint, using the machine as `EVALUATION` says.

    overrides: settings of the run that are changed, nested as in a preset.
    """
    check_run_directory(run_dir)
    path, state = checkpoint.newest(run_dir)
    if path is None or state is None:
        raise UserError(f"{run_dir} holds no checkpoint; train it first")
    settings = configs.merge(state["config"], {"run": EVALUATION})
    config = configs.build(task.config, configs.merge(settings, overrides))
    device = choose_device(config.run.device)
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        network = task.build_network(config, len(state["classes"]))
    checkpoint.load_into(network, checkpoint.reported(state), path)
    weights = f"weights {_weights_hash(network)} of {_describe_weights(config, network, state)}"
    network.to(device).to(memory_format=config.run.memory_format).eval()
    return Loaded(
        run_dir=run_dir,
        config=config,
        network=network,
        classes=tuple(state["classes"]),
        normalisation=state["normalisation"],
        device=device,
        precision=choose_precision(config.run.amp, device),
        weights=weights,
        val_hash=state["val_hash"],
        unseen_val=state["unseen_val"],
    )


def _weights_hash(network: MultiExitNetwork) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


def _describe_weights(config: Config, network: MultiExitNetwork, state: dict) -> str:
    """Which weights a checkpoint holds; warns if the run is not finished."""
    position, phases = state["position"], plan_phases(config, network.num_exits)
    words = "the last epoch"
    if position["phase"] < len(phases):
        phase = phases[position["phase"]]
        words = f"epoch {position['epoch']} of {phase.optim.epochs}, phase {phase.name}"
        log.warning("this run is not finished: its weights are those of %s", words)
    return words + (", running average" if state.get("averaged") else "")


def load_run(run_dir: Path, task: Task, overrides: dict) -> Trained:
    """The network of a run directory and its data, with seeds and threads set.

    Raises UserError if the data are not those that the run held out its val images from.
    """
    loaded = load_network(run_dir, task, overrides)
    set_up(loaded.config.run)
    data = task.load_data(loaded.config.data).normalised_by(loaded.normalisation)
    if data.val_hash != loaded.val_hash:
        raise UserError(
            f"{run_dir} held out other val images ({loaded.val_hash}) than this data set gives"
            f" ({data.val_hash}); check the data under --data"
        )
    return Trained(
        **vars(loaded),
        data=data.to(loaded.device, loaded.config.run.memory_format),
        cost=network_cost(loaded.network),
    )


def get_record(trained: Trained, split: str) -> ExitRecord:
    """The record of a split of the run's own data, from the run directory if it is there."""
    data, network, cost = trained.data, trained.network, trained.cost
    info = RecordInfo(
        split=split,
        split_hash=data.digest(split),
        exit_names=network.exit_names,
        stage_macs=cost.stage_macs,
        head_macs=cost.head_macs,
        precision=trained.precision,
        weights=trained.weights,
        device=describe_device(trained.device),
    )
    directory = trained.run_dir / "records" / f"{split}-{trained.precision}"
    with locked(directory.parent, wait=True):  # another evaluation may be making it
        restore(directory)
        if directory.exists():
            try:
                stored = ExitRecord.load(directory)
            except UserError as error:
                log.warning("%s; recording it again", error)
            else:
                if stored.info == info:
                    return stored
        log.info("recording every exit on %s", split)
        return record(
            network,
            data.eval_batches(split, data.eval_batch),
            data.size(split),
            info,
            trained.device,
            trained.autocast,
            directory,
        )


def get_splits(trained: Trained, val_from: str, cut_seed: int) -> Splits:
    """The records of val and test.

    val_from: `train`, or `test` to cut the official test set in two by `cut_seed`. Raises UserError
    if the weights may have seen the images of val.
    """
    if val_from == "train" and trained.unseen_val != trained.data.val_hash:
        raise UserError(
            f"the backbone of {trained.run_dir} was trained on another or an unknown split and may"
            " have seen the val images, so nothing can be fitted on them; pass --val-from test,"
            " which cuts the official test set into val and test"
        )
    test = get_record(trained, "test")
    if val_from == "train":
        return Splits(get_record(trained, "val"), test, trained.data, "held out from train")
    return Splits(
        *cut_record(test, trained.data, cut_seed),
        trained.data.cut_test(cut_seed),
        f"half of the official test set, cut by seed {cut_seed}",
    )


def cut_record(test: ExitRecord, data: Data, seed: int) -> tuple[ExitRecord, ExitRecord]:
    """The record of the official test set, cut into val and test."""
    val_half, test_half = data.test_halves(seed)
    name = f"{data.name} test, cut {seed}"
    return (
        test.subset(val_half, "val", f"{name}, val half"),
        test.subset(test_half, "test", f"{name}, test half"),
    )
