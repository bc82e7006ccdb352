"""The epochs of a training: every phase walked from a position on, step by step."""

import copy
import dataclasses
import gc
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from early_exit import distributed, runtime
from early_exit.config import LossConfig
from early_exit.engine import (
    Average,
    Tally,
    lr_at,
    make_optimizer,
    score_batches,
    set_training_mode,
    train_steps,
)
from early_exit.experiment import Phase
from early_exit.journal import Journal, percents
from early_exit.losses import weights_at
from early_exit.resuming import Position, Run, Trainee, put_back, save
from early_exit.splits import Share, seed_of

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss is not finite, so nothing more can be learned from here."""


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
        goes = epoch_steps(run, phase, trainee, forward, apart)
        line = train_epoch(run, phase, trainee, goes, stop)
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


def own_settings(loss: LossConfig) -> dict[str, Any]:
    """What a front door's own settings of the loss add to the library's."""
    known = {item.name for item in dataclasses.fields(LossConfig)}
    return {name: value for name, value in vars(loss).items() if name not in known}


def listed(network: nn.Module, phase: Phase) -> Callable:
    """The network that a phase computes, giving a list of logits also where it is the plain one."""
    return (lambda images: [network(images)]) if phase.backbone_only else network


def epoch_steps(
    run: Run,
    phase: Phase,
    trainee: Trainee,
    forward: Callable,
    apart: Callable[[], AbstractContextManager],
) -> Iterator[bool]:
    """The goes of one epoch from the trainee's position on; whether each one ends a step."""
    config, optim, here = run.config, phase.optim, trainee.position
    total = run.data.steps_per_epoch(optim.batch_size)
    order = 1000 * here.phase + here.epoch  # a seed of its own for every epoch of every phase
    batches = run.data.train_batches(
        optim.batch_size, config.run.seed, order, here.step, run.share
    )
    return train_steps(
        forward,
        reseeded(batches, (config.run.seed, order), here.step, run.share),
        partial(
            run.loss,
            weights=weights_at(phase.weights, config.loss.start, here.epoch / optim.epochs),
            label_smoothing=optim.label_smoothing,
            distill=config.loss.distill,
            distill_temperature=config.loss.distill_temperature,
            **own_settings(config.loss),
        ),
        trainee.optimizer,
        trainee.scaler,
        partial(runtime.autocast, run.precision, run.device),
        (lr_at(optim, here.epoch + step / total) for step in range(here.step, total)),
        trainee.sums,
        optim.accumulate,
        apart,
    )


def train_epoch(
    run: Run, phase: Phase, trainee: Trainee, goes: Iterable[bool], stop: runtime.StopSignals
) -> dict[str, Any]:
    """Takes the goes of one epoch, with a bar; returns the epoch's line of the journal."""
    optim, here, sums = phase.optim, trainee.position, trainee.sums
    names = run.network.exit_names[-len(phase.weights) :]
    total = run.data.steps_per_epoch(optim.batch_size)
    terminal = run.group.leaders(sys.stderr.isatty())
    every = run.config.run.print_freq or (20 if terminal else None)
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
        for ended in goes:
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
        partial(run.loss, weights=phase.weights, **own_settings(run.config.loss)),
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
