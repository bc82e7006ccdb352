"""The epochs of a training: every phase from a position on, step by step."""

import gc
import itertools
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from early_exit.data.splits import Shard, seed_of
from early_exit.model.losses import weights_at
from early_exit.system import distributed, signals
from early_exit.system.device import peak_memory, reset_peak_memory, synchronize
from early_exit.training.averages import make_average
from early_exit.training.cuda_graphs import replayed
from early_exit.training.journal import EpochRecord, Journal, percents
from early_exit.training.optimizer import lr_at, make_optimizer
from early_exit.training.phases import Phase
from early_exit.training.state import PhaseState, Position, Run, restore_phase, save
from early_exit.training.steps import (
    Forward,
    Score,
    Tally,
    as_list,
    set_training_mode,
    train_steps,
)
from early_exit.training.stopping import (
    make_undo,
    stop_if_diverged,
    stop_if_signalled,
    stop_while_waiting,
)
from early_exit.training.validation import validate

log = logging.getLogger(__name__)


def run_phases(
    run: Run,
    position: Position,
    saved: dict[str, Any] | None,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Trains every phase from `position` on.

    saved: the checkpoint that the position comes from. teacher: images (B, 3, H, W) to logits
    (B, K), which the loss gets. Raises Diverged if the loss is not finite,
    and signals.Stopped after a signal.
    """
    start = (position.phase, position.epoch)
    records: AbstractContextManager[Journal | None] = nullcontext()
    if run.group.is_main:
        records = Journal(run.directory, start, run.config.run.tensorboard)
    with signals.StopSignals() as stop, records as journal:
        for index in range(position.phase, len(run.phases)):
            if index > position.phase:
                position, saved = Position(index), None
            try:
                run_phase(run, position, saved, stop, journal, teacher)
            except signals.Interrupted:
                stop.raise_at_once = False
                signum = stop.signum or signal.SIGTERM
                raise signals.Stopped(
                    f"stopped by signal {signum} before the first step, so there was nothing to"
                    f" save; the last good checkpoint: {run.last_good}",
                    signum,
                ) from None
            gc.collect()  # frees CUDA graphs, and DDP's hooks before the next wrapper sets its own
    run.group.barrier()


def run_phase(
    run: Run,
    position: Position,
    saved: dict[str, Any] | None,
    stop: signals.StopSignals,
    journal: Journal | None,
    teacher: Callable[[Tensor], Tensor] | None,
) -> None:
    """Trains the epochs of one phase from `position` on."""
    phase, config = run.phases[position.phase], run.config
    stop.raise_if_signalled()  # until the first step is done, which may compile for minutes
    set_training_mode(run.network, phase.backbone_frozen)
    average = make_average(run.network, phase.optim)
    network = run.network.backbone if phase.backbone_only else run.network
    if config.run.compile:
        network.compile()
    forward, no_sync = make_forward(run, phase, network)
    state = PhaseState(
        position=position,
        optimizer=make_optimizer(network, phase.optim),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16"),
        tally=Tally(len(phase.weights), run.device),
        average=average,
    )
    if saved and not position.starts_phase:
        restore_phase(state, saved, run.group)
        saved.clear()  # frees a copy of every weight and momentum
    while position.epoch < phase.optim.epochs:
        stem_frozen = 0 < phase.optim.stem_epochs <= position.epoch
        set_training_mode(run.network, phase.backbone_frozen, stem_frozen)
        reset_peak_memory(run.device)
        steps = epoch_steps(run, phase, state, forward, no_sync, stop, teacher)
        trained = train_epoch(run, phase, state, steps, stop)
        val = validate(run, phase, state, stop)
        if journal:
            journal.write(epoch_record(run, phase, position, trained, val))
        last = position.epoch + 1 == phase.optim.epochs
        if last or (position.epoch + 1) % config.run.save_every == 0:
            next_epoch = Position(position.phase, position.epoch + 1)
            save(run, state, Position(position.phase + 1) if last else next_epoch)
        position.epoch, position.step = position.epoch + 1, 0
        state.tally = Tally(len(phase.weights), run.device)
    if average:
        run.network.load_state_dict(average.module.state_dict())


def make_forward(
    run: Run, phase: Phase, network: nn.Module
) -> tuple[Forward, Callable[[], AbstractContextManager]]:
    """The forward pass, as a list of logits, with CUDA graphs if asked for, whose backward averages
    the gradients over all processes; and the context in which it does not."""
    if run.config.run.cuda_graphs:
        return replayed(run, phase, network), nullcontext
    if run.group.world == 1:
        return as_list(network, phase.backbone_only), nullcontext
    wrapped = DistributedDataParallel(
        network,
        device_ids=[run.device] if run.device.type == "cuda" else None,
        find_unused_parameters=phase.may_leave_unused,
    )
    return as_list(wrapped, phase.backbone_only), wrapped.no_sync


def epoch_steps(
    run: Run,
    phase: Phase,
    state: PhaseState,
    forward: Forward,
    no_sync: Callable[[], AbstractContextManager],
    stop: signals.StopSignals,
    teacher: Callable[[Tensor], Tensor] | None,
) -> Iterator[bool]:
    """The steps of one epoch from the state's position on, as `train_steps` yields them."""
    config, optim, here = run.config, phase.optim, state.position
    total = run.data.steps_per_epoch(optim.batch_size)
    order = 1000 * here.phase + here.epoch  # another seed for every epoch of every phase
    batches = run.data.train_batches(optim.batch_size, config.run.seed, order, here.step, run.shard)
    loss_fn = partial(
        run.task.loss,
        weights=weights_at(phase.weights, config.loss.start, here.epoch / optim.epochs),
        label_smoothing=optim.label_smoothing,
        distill=config.loss.distill,
        distill_temperature=config.loss.distill_temperature,
        **({"teacher_weight": config.loss.teacher_weight} if teacher else {}),
        **run.task_loss_settings,
    )
    return train_steps(
        forward,
        seed_each(stop.wait_for(batches), (config.run.seed, order), here.step, run.shard),
        loss_fn,
        state.optimizer,
        state.scaler,
        run.autocast,
        (lr_at(optim, here.epoch + step / total) for step in range(here.step, total)),
        state.tally,
        optim.accumulate,
        no_sync,
        teacher,
    )


def seed_each(
    batches: Iterable[tuple[Tensor, Tensor]], numbers: tuple[int, ...], step: int, shard: Shard
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of an epoch from `step` on, with torch seeded before each by its position.

    So dropout is the same after a resume, and in one process or several. numbers: those of the run
    and the epoch.
    """
    positions = ((index, part) for index in itertools.count(step) for part in shard.numbers)
    for batch, position in zip(batches, positions, strict=False):
        torch.manual_seed(seed_of(*numbers, *position, 1))
        yield batch


@dataclass(frozen=True)
class TrainedEpoch:
    """The score on the augmented train images, and the speed."""

    score: Score
    seconds: float
    images: int


def train_epoch(
    run: Run,
    phase: Phase,
    state: PhaseState,
    steps: Iterable[bool],
    stop: signals.StopSignals,
) -> TrainedEpoch:
    """Trains one epoch from the state's position on, by running through `steps`."""
    here, batch_size = state.position, phase.optim.batch_size
    terminal = run.group.broadcast(sys.stderr.isatty())
    every = run.config.run.print_freq or (20 if terminal else None)
    bar = progress_bar(run, phase, here, terminal)
    synchronize(run.device)
    start, first = time.perf_counter(), here.step
    with bar, distributed.raise_if_lost():
        undo = make_undo(run, state)
        step_done = True
        try:
            for step_done in steps:
                stop.raise_at_once = False
                if step_done:
                    here.step += 1
                    if state.average:
                        state.average.update(run.network)
                    bar.update(batch_size)
                    if every and here.step % every == 0:
                        stop_if_diverged(run, state)
                        show_progress(run, phase, state, bar, terminal)
                stop_if_signalled(run, state, stop, undo=None if step_done else undo)
                undo = make_undo(run, state) if step_done else undo
        except signals.Interrupted:
            if stop.raise_at_once:
                raise
            stop_while_waiting(run, state, stop, undo=None if step_done else undo)
    stop_if_diverged(run, state)
    seconds = time.perf_counter() - start
    score = state.tally.gathered(run.group).score(run.exit_names(phase))
    return TrainedEpoch(score, seconds, (here.step - first) * batch_size)


def progress_bar(run: Run, phase: Phase, position: Position, terminal: bool) -> tqdm:
    """The bar of an epoch, counting images; only the main process shows it, on a terminal."""
    batch_size = phase.optim.batch_size
    return tqdm(
        total=run.data.steps_per_epoch(batch_size) * batch_size,
        initial=position.step * batch_size,
        unit="img",
        desc=f"{phase.name} {position.epoch + 1}/{phase.optim.epochs}",
        leave=False,
        disable=not terminal or not run.group.is_main,
        dynamic_ncols=True,
    )


def show_progress(run: Run, phase: Phase, state: PhaseState, bar: tqdm, terminal: bool) -> None:
    """Shows loss and accuracy so far, beside the bar or in the log. Waits for the device."""
    score = state.tally.score(run.exit_names(phase))
    text = f"loss {score.loss:.4f}, {percents(score.top1)}"
    bar.set_postfix_str(text, refresh=False)
    if not terminal:
        here, total = state.position, run.data.steps_per_epoch(phase.optim.batch_size)
        log.info("epoch %d: step %d/%d, %s", here.epoch + 1, here.step, total, text)


def epoch_record(
    run: Run, phase: Phase, position: Position, trained: TrainedEpoch, val: Score
) -> EpochRecord:
    """The journal's record of a finished epoch."""
    optim = phase.optim
    total = run.data.steps_per_epoch(optim.batch_size)
    return EpochRecord(
        phase=phase.name,
        phase_index=position.phase,
        epoch=position.epoch,
        epochs=optim.epochs,
        lr=lr_at(optim, position.epoch + (total - 1) / total),
        train_loss=trained.score.loss,
        train_top1=trained.score.top1,
        seconds=trained.seconds,
        images_per_second=trained.images / trained.seconds,
        val_loss=val.loss,
        val_top1=val.top1,
        val_top5=val.top5,
        peak_memory=peak_memory(run.device),
    )
