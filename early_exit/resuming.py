"""What a training is in the middle of: saved, found again and put back."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit import checkpoint, runtime
from early_exit import config as configs
from early_exit.config import Config
from early_exit.cost import Cost
from early_exit.distributed import Group
from early_exit.engine import Average, Tally
from early_exit.errors import UserError
from early_exit.experiment import Data, Phase
from early_exit.network import MultiExitNetwork
from early_exit.splits import Share

log = logging.getLogger(__name__)

# Settings that a resumed run cannot change without being another run.
FIXED = (
    "data.", "model.", "run.regime", "run.seed", "optim.batch_size", "optim.decay_norm"
)
SECTIONS = {item.name for item in dataclasses.fields(Config)}  # others are a front door's own
MOVABLE = ("data.root", "data.workers", "data.bad_files")
# Settings that make a difference as long as there is something left to train.
RECIPE = ("optim.", "backbone_phase.", "loss.", "run.amp", "run.deterministic", "run.sync_bn")


@dataclass
class Position:
    """How far a run is: the next step of the epoch of the phase."""

    phase: int = 0
    epoch: int = 0
    step: int = 0


@dataclass
class Run:
    """What one training works on."""

    config: Config
    data: Data
    network: MultiExitNetwork
    cost: Cost
    phases: list[Phase]
    directory: Path
    device: torch.device
    precision: str
    group: Group
    unseen_val: str | None
    """Hash of the val images if no weight has seen them."""
    loss: Callable[..., Tensor]
    """What is minimised, as in the front door."""
    last_good: str = "none was saved"
    """Where the newest whole checkpoint lies."""

    @property
    def share(self) -> Share:
        """What this process computes of every step."""
        return Share(self.group.rank, self.group.world, self.config.optim.accumulate)


@dataclass
class Trainee:
    """What a phase changes, and where it stands: all that a checkpoint needs beside the run."""

    position: Position
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tally
    average: Average | None


def nth_epoch(phases: list[Phase], epoch: int) -> Position:
    """The start of the epoch'th epoch, counted through all phases."""
    total = sum(phase.optim.epochs for phase in phases)
    if not 0 <= epoch < total:
        raise UserError(f"--start-epoch is {epoch}, the run has epochs 0 to {total - 1}")
    if epoch >= phases[0].optim.epochs:
        raise UserError(
            f"--start-epoch {epoch} lies after the phase {phases[0].name}, without which"
            f" {phases[1].name} has nothing to begin with; --backbone FILE skips that phase"
        )
    return Position(0, epoch)


def find_resumed(resume: str | None, run_dir: Path | None) -> tuple[Path | None, dict | None]:
    """The checkpoint to go on from: its path and content, or nothing for a fresh start.

    `auto` looks in the run directory and may find none; a path must exist.
    """
    if resume is None:
        return None, None
    if resume == "auto":
        return checkpoint.newest(run_dir) if run_dir and run_dir.is_dir() else (None, None)
    path = Path(resume)
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}; check --resume")
    if not path.is_dir():
        return path, checkpoint.load(path)
    found, state = checkpoint.newest(path)
    if found is None:
        raise UserError(
            f"{resume} holds no checkpoint to go on from; --resume auto starts afresh there"
        )
    return found, state


def save(run: Run, trainee: Trainee, following: Position | None = None) -> None:
    """Writes the newest checkpoint: in the middle of an epoch, or before the `following` one."""
    tally = None if following else trainee.sums.gathered(run.group).state_dict()
    if not run.group.leads:
        return
    average = trainee.average
    state = {
        "network": run.network.state_dict(),
        "average": average.module.state_dict() if average else None,
        "averaged": average.steps if average else 0,
        "optimizer": trainee.optimizer.state_dict(),
        "scaler": trainee.scaler.state_dict(),
        "position": dataclasses.asdict(following or trainee.position),
        "tally": tally,
        "config": configs.to_dict(run.config),
        "exit_names": list(run.network.exit_names),
        "classes": list(run.data.classes),
        "normalisation": {"mean": list(run.data.mean), "std": list(run.data.std)},
        "val_hash": run.data.val_hash,
        "unseen_val": run.unseen_val,
        "versions": runtime.versions(),
    }
    try:
        checkpoint.save(run.directory, state)
    except UserError as error:
        raise type(error)(f"{error}; the last good checkpoint: {run.last_good}") from None
    run.last_good = str(run.directory / checkpoint.NAME)


def restore(run: Run, path: Path, state: dict[str, Any]) -> Position:
    """Puts a checkpoint's weights in and returns where it stood.

    Raises UserError where the checkpoint belongs to another run than the configuration's.
    """
    saved = configs.to_dict(configs.build(type(run.config), state["config"]))
    changed = list(configs.differences(saved, configs.to_dict(run.config)))
    for name, before, after in changed:
        # another file may bring the backbone; whether one does decides which phases there are
        moved = name in MOVABLE or (name == "model.backbone" and before and after) or (
            # the default places may be named or not
            name == "model.exits" and state["exit_names"] == list(run.network.exit_names)
        )
        if name.startswith(FIXED) and not moved or name.partition(".")[0] not in SECTIONS:
            raise UserError(
                f"{path} was trained with {name} = {_shown(before)}, this run asks for"
                f" {_shown(after)}; resume with the former, or start another --save-dir"
            )
    if state["classes"] != list(run.data.classes):
        raise UserError(
            f"{path} answers {len(state['classes'])} classes ({_few(state['classes'])}), the data"
            f" has {len(run.data.classes)} ({_few(run.data.classes)}); check the data's path"
        )
    if state["val_hash"] != run.data.val_hash:
        raise UserError(
            f"{path} held out other val images ({state['val_hash']}) than this data set gives"
            f" ({run.data.val_hash}); check the data under --data"
        )
    position = Position(**state["position"])
    begins = position.epoch == position.step == 0  # a phase goes on from what is reported
    weights = checkpoint.reported(state) if begins else state["network"]
    checkpoint.load_into(run.network, weights, path)
    run.unseen_val, run.last_good = state["unseen_val"], str(path)
    if position.phase < len(run.phases):
        epochs = run.phases[position.phase].optim.epochs
        if position.epoch >= epochs:
            raise UserError(f"{path} has done {position.epoch} epochs, --epochs asks for {epochs}")
    else:
        for name, before, after in changed:
            if name.startswith(RECIPE):
                raise UserError(
                    f"{path} has finished its training with {name} = {_shown(before)}, this run"
                    f" asks for {_shown(after)}; start another --save-dir"
                )
    log.info(
        "going on from %s: after epoch %d and step %d of phase %d%s",
        path, position.epoch, position.step, position.phase + 1,
        "".join(f"; {name} was {_shown(a)}, now {_shown(b)}" for name, a, b in changed),
    )
    return position


def put_back(trainee: Trainee, state: dict[str, Any], group: Group) -> None:
    """A checkpoint's momenta, scale, average and sums; rates and decay are those of the
    configuration. The sums are those of all processes, so the first one takes them."""
    optimizer = trainee.optimizer
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for parameter, kept in optimizer.state.items():
        if kept.get("momentum_buffer") is not None:  # in this run's memory layout
            momentum = torch.empty_like(parameter).copy_(kept["momentum_buffer"])
            kept["momentum_buffer"] = momentum
    for parameters, settings in zip(optimizer.param_groups, own, strict=True):
        parameters.update(settings)
    if state["scaler"]:  # empty if the run was not in fp16 until now
        trainee.scaler.load_state_dict(state["scaler"])
    if trainee.average and state.get("average"):  # else it begins here
        trainee.average.module.load_state_dict(state["average"])
        trainee.average.steps = state["averaged"]
    if state["tally"] and group.leads:
        trainee.sums.load_state_dict(state["tally"])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _few(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
