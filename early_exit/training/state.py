"""The state of a training run: how it is saved, found again and restored."""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from early_exit import config as configs
from early_exit.config import Config, LossConfig
from early_exit.data.base import Data
from early_exit.data.file_lists import check_same_classes, with_val_of
from early_exit.data.splits import Shard
from early_exit.errors import UserError
from early_exit.model.cost import Cost, network_cost
from early_exit.model.network import MultiExitNetwork
from early_exit.system import provenance
from early_exit.system.device import autocast_context
from early_exit.system.distributed import Group
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.averages import Average
from early_exit.training.phases import Phase, plan_phases
from early_exit.training.state_dicts import load_into
from early_exit.training.steps import Tally

log = logging.getLogger(__name__)

# Settings that cannot change when a run is resumed, and the exceptions. Settings of a section that
# the library does not know belong to the task, and cannot change either.
FIXED = (
    "data.",
    "model.",
    "run.regime",
    "run.seed",
    "optim.batch_size",
    "optim.decay_norm",
    "optim.bias_lr_scale",
    "optim.head_lr_scale",
)
NOT_FIXED = ("data.root", "data.workers", "data.bad_files", "data.check_files")
SECTIONS = {item.name for item in dataclasses.fields(Config)}
# Settings that have no effect on a run that is already trained.
TRAINING_ONLY = (
    "optim.",
    "backbone_phase.",
    "loss.",
    "run.amp",
    "run.deterministic",
    "run.sync_bn",
)


@dataclass
class Position:
    """The next step of a run: its phase, epoch and step, each counted from 0."""

    phase: int = 0
    epoch: int = 0
    step: int = 0

    @property
    def starts_phase(self) -> bool:
        """Whether it is the first step of a phase."""
        return self.epoch == self.step == 0


@dataclass
class Run:
    """What one training works on. Raises UserError as `plan_phases` and `network_cost` do."""

    config: Config
    task: Task
    data: Data
    network: MultiExitNetwork
    directory: Path
    device: torch.device
    precision: str
    group: Group
    unseen_val: str | None
    """Hash of the val images if no weight has seen them."""
    last_good: str = "none was saved"
    """Path of the newest complete checkpoint."""
    phases: list[Phase] = field(init=False)
    cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        self.phases = plan_phases(self.config, self.network.num_exits)
        self.cost = network_cost(self.network)

    @property
    def shard(self) -> Shard:
        """The part of every step that this process computes."""
        return Shard(self.group.rank, self.group.world, self.config.optim.accumulate)

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """The context that the network runs in."""
        return partial(autocast_context, self.precision, self.device)

    def exit_names(self, phase: Phase) -> tuple[str, ...]:
        """The names of the exits that a phase computes."""
        return self.network.exit_names[-len(phase.weights) :]

    @property
    def task_loss_settings(self) -> dict[str, Any]:
        """The settings of the loss that the task adds to the library's."""
        known = {item.name for item in dataclasses.fields(LossConfig)}
        return {name: value for name, value in vars(self.config.loss).items() if name not in known}


@dataclass
class PhaseState:
    """What training changes in a phase, apart from the network: a checkpoint stores it."""

    position: Position
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tally: Tally
    """Of the current epoch."""
    average: Average | None


def position_of_epoch(phases: list[Phase], epoch: int) -> Position:
    """The start of `epoch`, counted from 0 over all phases.

    Raises UserError for an epoch the run does not have, and for one of a later phase, which needs
    the weights of the first.
    """
    total = sum(phase.optim.epochs for phase in phases)
    if not 0 <= epoch < total:
        raise UserError(f"--start-epoch is {epoch}, the run has epochs 0 to {total - 1}")
    if epoch >= phases[0].optim.epochs:
        raise UserError(
            f"--start-epoch {epoch} is in the phase {phases[1].name}, which needs the weights of"
            f" the phase {phases[0].name}; load them with --backbone FILE, which skips that phase"
        )
    return Position(0, epoch)


def find_resumed(resume: str | None, run_dir: Path | None) -> tuple[Path | None, dict | None]:
    """The checkpoint to resume from: its path and content, or (None, None) for a fresh start.

    resume: None; `auto`, which takes the newest checkpoint of the run directory, if there is one;
    or the path of a file or directory. Raises UserError if the path has no checkpoint.
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
    found, saved = checkpoint.newest(path)
    if found is None:
        raise UserError(
            f"there is no checkpoint in {resume}; --resume auto starts a fresh run there"
        )
    return found, saved


def save(run: Run, state: PhaseState, start: Position | None = None) -> None:
    """Writes a checkpoint within an epoch, or at the `start` of one if it is given.

    Every process calls it; the main one writes.
    """
    tally = None if start else state.tally.gathered(run.group).state_dict()
    if not run.group.is_main:
        return
    average = state.average
    content = {
        "network": run.network.state_dict(),
        "average": average.module.state_dict() if average else None,
        "averaged": average.steps if average else 0,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "position": dataclasses.asdict(start or state.position),
        "tally": tally,
        "config": configs.to_dict(run.config),
        "exit_names": list(run.network.exit_names),
        "classes": list(map(str, run.data.classes)),  # not of numpy, which cannot be read back
        "normalisation": {
            "mean": list(map(float, run.data.mean)),
            "std": list(map(float, run.data.std)),
        },
        "val_hash": run.data.val_hash,
        "unseen_val": run.unseen_val,
        "versions": provenance.versions(),
    }
    try:
        checkpoint.save(run.directory, content)
    except UserError as error:
        raise type(error)(f"{error}; the last good checkpoint: {run.last_good}") from None
    run.last_good = str(run.directory / checkpoint.NAME)


def restore(run: Run, path: Path, saved: dict[str, Any]) -> Position:
    """Loads a checkpoint's weights into the network and returns its position.

    path: where `saved` was read. Raises UserError if the checkpoint is of another run than the
    configuration's.
    """
    before = configs.to_dict(configs.build(type(run.config), saved["config"]))
    _keep_backbone(run, before["model"]["backbone"])
    changes = list(configs.differences(before, configs.to_dict(run.config)))
    check_fixed_settings(run, path, saved, changes)
    check_same_classes(run.data, path, saved["classes"])
    run.data, _ = with_val_of(run.data, path, saved["val_hash"])
    position = Position(**saved["position"])
    # a new phase starts from the weights that would be reported
    weights = checkpoint.reported(saved) if position.starts_phase else saved["network"]
    load_into(run.network, weights, path)
    run.unseen_val, run.last_good = saved["unseen_val"], str(path)
    check_remaining_epochs(run, path, position, changes)
    log.info(
        "resuming from %s: after epoch %d and step %d of phase %d%s",
        path,
        position.epoch,
        position.step,
        position.phase + 1,
        "".join(
            f"; {name} was {_value_text(old)}, now {_value_text(new)}" for name, old, new in changes
        ),
    )
    return position


def _keep_backbone(run: Run, file: str | None) -> None:
    """Keeps the file that a resumed run began with in its settings, because no other one is read.

    Whether there is one decides which phases there are, so that cannot change.
    """
    model = run.config.model
    if file and model.backbone and model.backbone != file:
        log.info(
            "--backbone %s is not read: the run continues from its own weights", model.backbone
        )
        model = dataclasses.replace(model, backbone=file)
        run.config = dataclasses.replace(run.config, model=model)


def check_fixed_settings(
    run: Run, path: Path, saved: dict[str, Any], changes: list[tuple[str, Any, Any]]
) -> None:
    """Raises UserError if a setting has changed that cannot change when a run is resumed."""
    for name, old, new in changes:
        allowed = (
            name in NOT_FIXED
            # the default exits may be named or not
            or (name == "model.exits" and saved["exit_names"] == list(run.network.exit_names))
        )
        fixed = name.startswith(FIXED) and not allowed
        if fixed or name.partition(".")[0] not in SECTIONS:
            raise UserError(
                f"{path} was trained with {name} = {_value_text(old)}, this run asks for"
                f" {_value_text(new)}; keep the old value, or choose another --save-dir"
            )


def check_remaining_epochs(
    run: Run, path: Path, position: Position, changes: list[tuple[str, Any, Any]]
) -> None:
    """Raises UserError if the settings ask for fewer epochs than are trained, or if a run that is
    already trained is to be trained otherwise."""
    if position.phase < len(run.phases):
        epochs = run.phases[position.phase].optim.epochs
        if position.epoch >= epochs:
            raise UserError(
                f"{path} has trained {position.epoch} epochs of this phase, --epochs asks for"
                f" {epochs}; ask for more, or choose another --save-dir"
            )
        return
    for name, old, new in changes:
        if name.startswith(TRAINING_ONLY):
            raise UserError(
                f"{path} is already trained, with {name} = {_value_text(old)}, and this run asks"
                f" for {_value_text(new)}; choose another --save-dir"
            )


def restore_phase(state: PhaseState, saved: dict[str, Any], group: Group) -> None:
    """Restores a phase from a checkpoint within it: optimiser, scaler, average and tally."""
    restore_optimizer_state(state.optimizer, saved["optimizer"])
    if saved["scaler"]:  # empty if the run has not used fp16
        state.scaler.load_state_dict(saved["scaler"])
    if state.average and saved.get("average"):  # otherwise the average starts here
        state.average.module.load_state_dict(saved["average"])
        state.average.steps = saved["averaged"]
    if saved["tally"] and group.is_main:  # it counts the images of all processes
        state.tally.load_state_dict(saved["tally"])


def restore_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores the momenta; learning rate, decay and other settings stay as configured."""
    configured = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for parameter, values in optimizer.state.items():
        if values.get("momentum_buffer") is not None:  # in this run's memory layout
            momentum = torch.empty_like(parameter).copy_(values["momentum_buffer"])
            values["momentum_buffer"] = momentum
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


def _value_text(value: Any) -> str:
    """The value of a setting for a message."""
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
