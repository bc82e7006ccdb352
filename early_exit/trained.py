"""A trained run, loaded: its network, its data, and what every exit said about them."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from early_exit import checkpoint, runtime
from early_exit import config as configs
from early_exit.config import Config
from early_exit.cost import Cost, network_cost
from early_exit.disk import locked
from early_exit.errors import UserError
from early_exit.experiment import Data, FrontDoor, layout, plan_phases, setup
from early_exit.network import MultiExitNetwork
from early_exit.records import ExitRecord, RecordInfo, record

log = logging.getLogger(__name__)

# How a trained network uses the machine, whatever training did. Float32 unless asked: the
# reference, and at batch 1 also the fastest on a CPU.
EVALUATION = {"amp": "off", "compile": False, "device": "auto", "threads": None}


@dataclass(frozen=True)
class Loaded:
    """The network of a run in eval mode on the device, and what its checkpoint says of it."""

    run_dir: Path
    config: Config
    network: MultiExitNetwork
    classes: tuple[str, ...]
    normalisation: dict[str, list[float]]
    device: torch.device
    precision: str
    weights: str
    """Hash of the weights and which they are."""
    val_hash: str
    """Hash of the val images that training held out."""
    unseen_val: str | None
    """Hash of the val images if no weight has seen them."""

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """The context that the network runs in."""
        return partial(runtime.autocast, self.precision, self.device)


@dataclass(frozen=True)
class Trained(Loaded):
    """With its data, on the device."""

    data: Data
    cost: Cost


def refuse_missing(run_dir: Path) -> None:
    """Raises UserError where there is no run directory."""
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory at {run_dir}; training prints the one it made")


def evaluations(run_dir: Path, file: str) -> dict[str, Path]:
    """That file of every evaluation of a run which has it, by the evaluation's name, in order. A
    name that begins with a dot is one that was never finished."""
    return {
        path.parent.name: path for path in sorted(run_dir.glob(f"eval/*/{file}"))
        if not path.parent.name.startswith(".")
    }


def training_command(run_dir: Path) -> list[str]:
    """The script that trained a run and its flags; empty where the run does not say."""
    try:
        command = json.loads((run_dir / "versions.json").read_text())["command"]
        return [str(word) for word in command]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def load_network(run_dir: Path, door: FrontDoor, overrides: dict) -> Loaded:
    """The network of a run directory's newest checkpoint, which uses the machine as evaluations do
    (`EVALUATION`), its settings changed by `overrides`."""
    refuse_missing(run_dir)
    path, state = checkpoint.newest(run_dir)
    if state is None:
        raise UserError(f"{run_dir} holds no checkpoint; train it first")
    settings = configs.merge(state["config"], {"run": EVALUATION})
    config = configs.build(door.config, configs.merge(settings, overrides))
    device = runtime.choose_device(config.run.device)
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        network = door.build_network(config, len(state["classes"]))
    checkpoint.load_into(network, checkpoint.reported(state), path)
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    position, phases = state["position"], plan_phases(config, network.num_exits)
    where = "the last epoch"
    if position["phase"] < len(phases):
        phase = phases[position["phase"]]
        where = f"epoch {position['epoch']} of {phase.optim.epochs}, phase {phase.name}"
        log.warning("this run is not finished: its weights are those of %s", where)
    where += ", running average" if state.get("averaged") else ""
    network.to(device, memory_format=layout(config)).eval()
    return Loaded(
        run_dir=run_dir,
        config=config,
        network=network,
        classes=tuple(state["classes"]),
        normalisation=state["normalisation"],
        device=device,
        precision=runtime.choose_precision(config.run.amp, device),
        weights=f"weights {digest.hexdigest()[:16]} of {where}",
        val_hash=state["val_hash"],
        unseen_val=state["unseen_val"],
    )


def load_run(run_dir: Path, door: FrontDoor, overrides: dict) -> Trained:
    """The network of a run directory and its data, with seeds and threads set; raises UserError
    where they do not belong together."""
    loaded = load_network(run_dir, door, overrides)
    setup(loaded.config)
    data = door.load_data(loaded.config.data).normalised_by(loaded.normalisation)
    if data.val_hash != loaded.val_hash:
        raise UserError(
            f"{run_dir} held out other val images ({loaded.val_hash}) than this data set gives"
            f" ({data.val_hash}); check the data under --data"
        )
    return Trained(
        **vars(loaded),
        data=data.to(loaded.device, layout(loaded.config)),
        cost=network_cost(loaded.network),
    )


def get_record(trained: Trained, split: str) -> ExitRecord:
    """The record of a split of the run's own data, from the run directory where it is there."""
    data, network, cost = trained.data, trained.network, trained.cost
    info = RecordInfo(
        split=split,
        split_hash=data.digest(split),
        exit_names=network.exit_names,
        stage_macs=cost.stage_macs,
        head_macs=cost.head_macs,
        precision=trained.precision,
        weights=trained.weights,
        device=runtime.describe_device(trained.device),
    )
    directory = trained.run_dir / "records" / f"{split}-{trained.precision}"
    with locked(directory.parent, wait=True):  # another evaluation may be making it
        if directory.exists():
            try:
                stored = ExitRecord.load(directory)
            except UserError as error:
                log.warning("%s; recording anew", error)
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


def val_and_test(
    trained: Trained, val_from: str, cut_seed: int
) -> tuple[ExitRecord, ExitRecord, Data, str]:
    """The records of val and test, the data they index, and where val came from, in words.

    Raises UserError where the weights may have seen the images of val.
    """
    if val_from == "train" and trained.unseen_val != trained.data.val_hash:
        raise UserError(
            f"the backbone of {trained.run_dir} was trained on another or an unknown split and may"
            " have seen the val images, so nothing can be fitted on them; pass --val-from test,"
            " which cuts the official test set into val and test"
        )
    test = get_record(trained, "test")
    if val_from == "train":
        return get_record(trained, "val"), test, trained.data, "held out from train"
    return (
        *cut_record(test, trained.data, cut_seed),
        trained.data.cut_test(cut_seed),
        f"half of the official test set, cut by seed {cut_seed}",
    )


def cut_record(test: ExitRecord, data: Data, seed: int) -> tuple[ExitRecord, ExitRecord]:
    """The record of all of test, cut into val and test."""
    chosen, rest = data.test_halves(seed)
    name = f"{data.name} test, cut {seed}"
    return (
        test.subset(chosen, "val", f"{name}, val half"),
        test.subset(rest, "test", f"{name}, test half"),
    )
