"""The whole walk of a training: configuration in, run directory out."""

import copy
import dataclasses
import gc
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from early_exit import checkpoint, distributed, runtime
from early_exit import config as configs
from early_exit.config import Config
from early_exit.cost import Cost, network_cost
from early_exit.disk import locked, write_text
from early_exit.distributed import Group
from early_exit.engine import (
    Average,
    Tally,
    lr_at,
    make_optimizer,
    score_batches,
    set_training_mode,
    train_steps,
)
from early_exit.errors import UserError
from early_exit.experiment import (
    Data,
    FrontDoor,
    Phase,
    layout,
    load_backbone,
    plan_phases,
    setup,
)
from early_exit.journal import Journal, percents
from early_exit.heads import POOLED
from early_exit.losses import joint_loss, weights_at
from early_exit.network import MultiExitNetwork, synchronise_norms
from early_exit.splits import Share, seed_of

log = logging.getLogger(__name__)

# Settings that a resumed run cannot change without being another run.
FIXED = (
    "data.", "model.", "run.regime", "run.seed", "optim.batch_size", "optim.decay_norm"
)
MOVABLE = ("data.root", "data.workers", "data.bad_files")
# Settings that make a difference as long as there is something left to train.
RECIPE = ("optim.", "backbone_phase.", "loss.", "run.amp", "run.deterministic", "run.sync_bn")


MOST_NAMED = 8  # exits in a run directory's name


class Diverged(RuntimeError):
    """The loss is not finite, so nothing more can be learned from here."""


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


def default_run_dir(runs: Path, config: Config, exit_names: Sequence[str]) -> Path:
    """runs/NAME, where the name says data set, network, exits, regime and seed."""
    parts, early = [config.data.dataset, config.model.arch], list(exit_names[:-1])
    if len(early) > MOST_NAMED:  # a file system takes 255 letters
        early = [f"{len(early)}exits"]
    parts += [*early, config.run.regime] if early else ["plain"]
    return runs / "-".join([*parts, f"seed{config.run.seed}"])


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


def train(
    config: Config,
    door: FrontDoor,
    *,
    runs: Path,
    run_dir: Path | None = None,
    resume: str | None = None,
    start_epoch: int = 0,
    check: bool = False,
) -> Path:
    """Trains what `config` says and returns the run directory.

    run_dir: where to; None: a name made from the configuration under `runs`. An existing one is
    refused without `resume`, which is `auto` or a checkpoint's path. start_epoch: begin a fresh
    run at this epoch of its schedule. check: do everything but train and write; log the resolved
    configuration.

    Under torchrun every process calls this, and the first one writes. Raises UserError for what
    the user can mend, Diverged where the loss is not finite, and runtime.Stopped once a signal came
    and everything is saved.
    """
    device, precision = setup(config)
    with distributed.joined(device) as group:
        with group.leader_first():
            data = door.load_data(config.data)
        network = door.build_network(config, len(data.classes))
        cost = network_cost(network)
        phases = plan_phases(config, network.num_exits)
        refuse_misfits(config, phases, data.size("train"), device, group)
        directory = run_dir or default_run_dir(runs, config, network.exit_names)
        refuse_existing(directory, resume)
        refuse_unwritable(directory)
        write = group.leads and not check
        with locked(directory) if write else nullcontext():
            group.wait()  # nobody reads before the directory is ours
            path, state = find_resumed(resume, directory)
            if group.leaders(str(path)) != str(path):
                raise UserError(
                    f"{directory} looks otherwise from process {group.rank} than from the first;"
                    " the run directory must lie where all machines see it"
                )
            if state and start_epoch:
                raise UserError(
                    f"--start-epoch is for a fresh run; this one goes on where {path} stands"
                )
            meta, unseen_val = {}, data.val_hash
            if state:
                meta = state
            elif config.model.backbone:
                meta = load_backbone(network, Path(config.model.backbone))
                unseen_val = data.val_hash if meta.get("unseen_val") == data.val_hash else None
            data = data.normalised_by(meta.get("normalisation")).to(device, layout(config))
            network.to(device=device, memory_format=layout(config))
            if config.run.sync_bn:
                synchronise_norms(network)
            run = Run(
                config, data, network, cost, phases, directory, device, precision, group, unseen_val
            )
            position = restore(run, path, state) if state else nth_epoch(phases, start_epoch)
            if check:
                log.info("%s", yaml.safe_dump(configs.to_dict(config), sort_keys=False).rstrip())
                log.info(
                    "train %d, val %d, test %d images of %d classes",
                    *(data.size(split) for split in ("train", "val", "test")), len(data.classes),
                )
                describe(run)
            elif position.phase == len(phases):
                log.info("%s is trained already", directory)
            else:
                if group.leads:
                    write_settings(run)
                describe(run)
                walk(run, position, state)
    return directory


def refuse_misfits(
    config: Config, phases: list[Phase], images: int, device: torch.device, group: Group
) -> None:
    """Raises UserError for settings that do not go with this machine or with each other."""
    pooled = set(config.model.head) & set(POOLED) and phases[-1].name == "joint"
    if config.run.deterministic and device.type == "cuda" and pooled:
        raise UserError(
            f"--deterministic on a GPU goes with {' '.join(config.model.head)} heads only on a"
            " frozen backbone: pooling to a grid has no deterministic gradient there; take --head"
            " conv"
        )
    if config.run.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn is for GPUs: torch has no synchronised BatchNorm on a CPU")
    size, goes = config.optim.batch_size, config.optim.accumulate
    parts = group.world * goes
    if size % parts or size < 2 * parts:
        raise UserError(
            f"a step of {size} images cannot be cut into {parts} equal parts of two or more"
            f" ({group.world} processes, {goes} goes each); change --batch-size or --accumulate"
        )
    if size > images:
        raise UserError(
            f"a step of {size} images is more than the {images} there are to train on; lower"
            " --batch-size"
        )


def refuse_existing(directory: Path, resume: str | None) -> None:
    """Raises UserError for a run directory that is not to be gone on with."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --save-dir")
    # a lock alone was left by a run that a mistake in its flags ended
    exists = directory.is_dir() and any(path.name != ".lock" for path in directory.iterdir())
    elsewhere = resume not in (None, "auto") and not (
        Path(resume).resolve().is_relative_to(directory.resolve())
    )
    if exists and (resume is None or elsewhere):
        raise UserError(
            f"{directory} exists; pass --resume auto to go on with it, or another --save-dir"
        )


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError where the run directory could not be made or written, without trying it."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written; choose another --save-dir")


def nth_epoch(phases: list[Phase], epoch: int) -> Position:
    """The start of the epoch'th epoch, counted through all phases."""
    total = sum(phase.optim.epochs for phase in phases)
    if not 0 <= epoch < total:
        raise UserError(f"--start-epoch is {epoch}, the run has epochs 0 to {total - 1}")
    index = 0
    while epoch >= phases[index].optim.epochs:
        epoch -= phases[index].optim.epochs
        index += 1
    return Position(index, epoch)


def write_settings(run: Run) -> None:
    """Writes config.yaml and versions.json."""
    for stray in run.directory.glob(f".{checkpoint.NAME}*"):
        stray.unlink()  # half a file of a killed process
    written = yaml.safe_dump(configs.to_dict(run.config), sort_keys=False)
    write_text(run.directory / "config.yaml", written)
    versions = {
        **runtime.versions(),
        "device": runtime.describe_device(run.device),
        "processes": run.group.world,
        "precision": run.precision,
        "command": sys.argv,
    }
    write_text(run.directory / "versions.json", json.dumps(versions, indent=2) + "\n")


def describe(run: Run) -> None:
    """Logs where the run goes, the network's exits and their price."""
    log.info("run directory %s", run.directory)
    several = f" x {run.group.world}" if run.group.world > 1 else ""
    log.info(
        "%s on %s: %.2f M MACs, %.3f M parameters; %s%s; amp %s",
        run.config.model.arch, run.data.name, run.cost.plain_macs / 1e6,
        run.cost.backbone_params / 1e6, runtime.describe_device(run.device), several, run.precision,
    )
    for name, share, head in zip(
        run.cost.exit_names, run.cost.shares(), run.cost.head_macs, strict=True
    ):
        log.info(
            "exit %-9s costs %5.1f %% of the plain network, its head %.1f %%",
            name, 100 * share, 100 * head / run.cost.plain_macs,
        )


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
        if name.startswith(FIXED) and not moved:
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


def walk(run: Run, position: Position, state: dict[str, Any] | None) -> None:
    """Every phase from `position` on, a checkpoint's `state` put back into the first."""
    before = (position.phase, position.epoch)
    journal = Journal(run.directory, before, run.config.run.tensorboard)
    with runtime.StopSignals() as stop, journal if run.group.leads else nullcontext() as journal:
        for index in range(position.phase, len(run.phases)):
            if index > position.phase:
                position, state = Position(index), None
            try:
                walk_phase(run, position, state, stop, journal)
            except runtime.Interrupted:
                raise runtime.Stopped(
                    f"stopped by signal {stop.signum} before a first step, so there was nothing to"
                    f" save; the last good checkpoint: {run.last_good}",
                    stop.signum,
                ) from None
            gc.collect()  # a wrapper's hooks must be gone before the next one's are set
    run.group.wait()


def walk_phase(
    run: Run,
    position: Position,
    state: dict[str, Any] | None,
    stop: runtime.StopSignals,
    journal: Journal | None,
) -> None:
    """The epochs of one phase from `position` on."""
    phase, config = run.phases[position.phase], run.config
    stop.heed()  # until the first step, which may compile for minutes
    set_training_mode(run.network, phase.backbone_frozen)
    average = Average(run.network, phase.optim.ema) if phase.optim.ema else None
    network = run.network.backbone if phase.backbone_only else run.network
    if config.run.compile:
        network.compile()
    forward, apart = spread(network, phase, run)
    sums = Tally(len(phase.weights), run.device)
    trainee = Trainee(
        position,
        make_optimizer(network, phase.optim),
        torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16"),
        sums,
        average,
    )
    if state and (position.epoch or position.step):  # at the start of a phase all is new
        put_back(trainee, state, run.group)
        state.clear()  # a copy of every weight and momentum
    while position.epoch < phase.optim.epochs:
        set_training_mode(run.network, phase.backbone_frozen)
        runtime.reset_peak_memory(run.device)
        line = train_epoch(run, phase, trainee, forward, apart, stop)
        line |= score_val(run, phase, trainee, stop)
        line["peak_memory"] = runtime.peak_memory(run.device)
        if journal:
            journal.write(line)
        last = position.epoch + 1 == phase.optim.epochs
        if last or (position.epoch + 1) % config.run.save_every == 0:
            following = Position(position.phase, position.epoch + 1)
            save(run, trainee, Position(position.phase + 1) if last else following)
        position.epoch, position.step = position.epoch + 1, 0
        trainee.sums = Tally(len(phase.weights), run.device)
    if average:
        run.network.load_state_dict(average.module.state_dict())


def spread(
    network: nn.Module, phase: Phase, run: Run
) -> tuple[Callable, Callable[[], AbstractContextManager]]:
    """The network's forward, giving a list of logits, whose backward averages the gradients over
    all processes; and the context in which it does not."""
    wrapped, apart = network, nullcontext
    if run.group.world > 1:
        wrapped = DistributedDataParallel(
            network,
            device_ids=[run.device] if run.device.type == "cuda" else None,
            # an exit of weight 0 gets no gradient; a frozen backbone's final one is not waited for
            find_unused_parameters=not all(phase.weights[: -1 if phase.backbone_frozen else None]),
        )
        apart = wrapped.no_sync
    return listed(wrapped, phase), apart


def listed(network: nn.Module, phase: Phase) -> Callable:
    """The network that a phase computes, giving a list of logits also where it is the plain one."""
    return (lambda images: [network(images)]) if phase.backbone_only else network


def score_val(
    run: Run, phase: Phase, trainee: Trainee, stop: runtime.StopSignals
) -> dict[str, Any]:
    """Loss and accuracy on val of the weights that would be reported, for the journal."""
    run.group.share_buffers(run.network)
    if trainee.average:
        run.group.share_buffers(trainee.average.module)
    reported = trainee.average.module if trainee.average else run.network
    network = reported.backbone if phase.backbone_only else reported
    reported.eval()
    size, share = run.data.eval_batch, Share(run.group.rank, run.group.world)
    scored = Tally(len(phase.weights), run.device)
    steps = score_batches(
        listed(network, phase),
        run.data.eval_batches("val", size, share),
        partial(joint_loss, weights=phase.weights),
        partial(runtime.autocast, run.precision, run.device),
        scored,
    )
    # as many turns for every process, so that all look around together
    turns = math.ceil(run.data.size("val") / (size * run.group.world))
    try:
        stop.at_once = run.group.world == 1  # here too something may compile; all leave together
        for _ in itertools.zip_longest(range(turns), steps):
            leave_if_asked(run, trainee, stop)
    except runtime.Interrupted:
        leave_if_asked(run, trainee, stop)
    finally:
        stop.at_once = False
    scored = scored.gathered(run.group)
    stop_if_diverged(run, trainee, scored)
    val_loss, val_top1 = scored.read()
    names = run.network.exit_names[-len(phase.weights) :]
    line = {"val_loss": val_loss, "val_top1": dict(zip(names, val_top1, strict=True))}
    top5 = scored.top5()
    return line | ({"val_top5": dict(zip(names, top5, strict=True))} if top5 else {})


def train_epoch(
    run: Run,
    phase: Phase,
    trainee: Trainee,
    forward: Callable,
    apart: Callable[[], AbstractContextManager],
    stop: runtime.StopSignals,
) -> dict[str, Any]:
    """The steps of one epoch from the trainee's position on; returns its line of the journal."""
    config, optim, here, sums = run.config, phase.optim, trainee.position, trainee.sums
    names = run.network.exit_names[-len(phase.weights) :]
    total = run.data.steps_per_epoch(optim.batch_size)
    order = 1000 * here.phase + here.epoch  # a seed of its own for every epoch of every phase
    batches = run.data.train_batches(
        optim.batch_size, config.run.seed, order, here.step, run.share
    )
    steps = train_steps(
        forward,
        reseeded(batches, (config.run.seed, order), here.step, run.share),
        partial(
            joint_loss,
            weights=weights_at(phase.weights, config.loss.start, here.epoch / optim.epochs),
            label_smoothing=optim.label_smoothing,
            distill=config.loss.distill,
            distill_temperature=config.loss.distill_temperature,
        ),
        trainee.optimizer,
        trainee.scaler,
        partial(runtime.autocast, run.precision, run.device),
        (lr_at(optim, here.epoch + step / total) for step in range(here.step, total)),
        sums,
        optim.accumulate,
        apart,
    )
    terminal = run.group.leaders(sys.stderr.isatty())
    every = config.run.print_freq or (20 if terminal else None)
    bar = tqdm(
        total=total * optim.batch_size, initial=here.step * optim.batch_size, unit="img",
        desc=f"{phase.name} {here.epoch + 1}/{optim.epochs}", leave=False,
        disable=not terminal or not run.group.leads,
        dynamic_ncols=True,
    )
    runtime.synchronize(run.device)
    began, first = time.perf_counter(), here.step
    with bar, distributed.together():
        undo = before_step(run, trainee)
        for ended in steps:
            stop.at_once = False
            if ended:
                here.step += 1
                if trainee.average:
                    trainee.average.update(run.network)
                bar.update(optim.batch_size)
                if every and here.step % every == 0:
                    stop_if_diverged(run, trainee)
                    loss, accuracy = sums.read()
                    text = f"loss {loss:.4f}, {percents(dict(zip(names, accuracy, strict=True)))}"
                    bar.set_postfix_str(text, refresh=False)
                    if not terminal:
                        log.info("epoch %d: step %d/%d, %s", here.epoch + 1, here.step, total, text)
            leave_if_asked(run, trainee, stop, undo=None if ended else undo)
            undo = before_step(run, trainee) if ended else undo
    stop_if_diverged(run, trainee)
    seconds = time.perf_counter() - began
    loss, accuracy = sums.gathered(run.group).read()
    return {
        "phase": phase.name,
        "phase_index": here.phase,
        "epoch": here.epoch,
        "epochs": optim.epochs,
        "lr": lr_at(optim, here.epoch + (total - 1) / total),
        "train_loss": loss,
        "train_top1": dict(zip(names, accuracy, strict=True)),
        "seconds": seconds,
        "images_per_second": (here.step - first) * optim.batch_size / seconds,
    }


def reseeded(
    batches: Iterable[tuple[Tensor, Tensor]], numbers: tuple[int, ...], step: int, share: Share
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch from `step` on. Before each one torch is seeded by its position, so
    that dropout too is the same after a resume, and in one process or several."""
    places = ((at, part) for at in itertools.count(step) for part in share.numbers)
    for batch, place in zip(batches, places, strict=False):
        torch.manual_seed(seed_of(*numbers, *place, 1))
        yield batch


def before_step(run: Run, trainee: Trainee) -> Callable[[], None] | None:
    """What takes back the first goes of a step, where a step has several: its gradients are not
    saved, and what the goes have left in BatchNorm's statistics and in the sums must not be."""
    if run.config.optim.accumulate == 1:
        return None
    buffers = [buffer.clone() for buffer in run.network.buffers()]
    sums = copy.deepcopy(trainee.sums)

    def undo() -> None:
        for buffer, value in zip(run.network.buffers(), buffers, strict=True):
            buffer.copy_(value)
        trainee.sums = sums

    return undo


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


def stop_if_diverged(run: Run, trainee: Trainee, held_out: Tally | None = None) -> None:
    """Raises Diverged once a loss was not finite in any process, on train or (held_out) on val."""
    bad = int(run.group.most((held_out or trainee.sums).bad_step))
    if bad >= 0:
        step = bad // run.config.optim.accumulate + 1  # sums count goes
        where = "on val after" if held_out else f"at step {step} of"
        raise Diverged(
            f"the loss is not finite {where} epoch {trainee.position.epoch + 1} of the phase"
            f" {run.phases[trainee.position.phase].name}; the last good checkpoint:"
            f" {run.last_good}; try a lower --lr or a longer warm-up"
        )


def leave_if_asked(
    run: Run,
    trainee: Trainee,
    stop: runtime.StopSignals,
    undo: Callable[[], None] | None = None,
) -> None:
    """Once a signal came to any process: saves and raises runtime.Stopped. undo: what is to be
    taken back before."""
    signum = run.group.agree(stop.signum)
    if signum is None:
        return
    stop_if_diverged(run, trainee)
    if undo:
        undo()
    save(run, trainee)
    run.group.wait()  # torchrun ends the others when the first one leaves
    raise runtime.Stopped(
        f"stopped by signal {signum} and saved in epoch {trainee.position.epoch + 1} after"
        f" step {trainee.position.step}; go on with --resume {run.directory}",
        signum,
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _few(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
