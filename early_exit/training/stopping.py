"""Ending a training early: on a signal, with everything saved, and on a loss that is not finite."""

import copy
import shlex
import signal
from collections.abc import Callable
from typing import NoReturn

from early_exit.errors import Failed
from early_exit.system.signals import Stopped, StopSignals
from early_exit.training.state import PhaseState, Run, save
from early_exit.training.steps import Tally


class Diverged(Failed):
    """The loss is not finite, so training cannot continue."""


def stop_if_diverged(run: Run, state: PhaseState, val: Tally | None = None) -> None:
    """Raises Diverged if a loss was not finite in any process, on train or, if given, on val."""
    bad = int(run.group.max((val or state.tally).bad_batch))
    if bad >= 0:
        step = bad // run.config.optim.accumulate + 1  # a tally counts micro-batches
        where = "on val after" if val else f"at step {step} of"
        raise Diverged(
            f"the loss is not finite {where} epoch {state.position.epoch + 1} of the phase"
            f" {run.phases[state.position.phase].name}; the last good checkpoint:"
            f" {run.last_good}; try a lower --lr or a longer warm-up"
        )


def stop_if_signalled(
    run: Run,
    state: PhaseState,
    stop: StopSignals,
    undo: Callable[[], None] | None = None,
) -> None:
    """If any process has received a signal, saves a checkpoint and raises Stopped.

    undo: called before the checkpoint is saved.
    """
    signum = run.group.agree(stop.signum)
    if signum is None:
        return
    stop.raise_at_once = False
    stop_if_diverged(run, state)
    if undo:
        undo()
    save(run, state)
    run.group.barrier()  # torchrun ends the others when the main process exits
    raise Stopped(
        f"stopped by signal {signum} and saved in epoch {state.position.epoch + 1} after"
        f" step {state.position.step}; continue with --resume {shlex.quote(str(run.directory))}",
        signum,
    )


def stop_while_waiting(
    run: Run,
    state: PhaseState,
    stop: StopSignals,
    undo: Callable[[], None] | None = None,
) -> NoReturn:
    """Stops after a signal although the next images do not come, as if a worker hangs on its
    storage. One process saves a checkpoint; several could only do so together."""
    if run.group.world == 1:
        stop_if_signalled(run, state, stop, undo)
    signum = stop.signum or signal.SIGTERM
    raise Stopped(
        f"stopped by signal {signum} while no images came (the storage may hang), so this epoch"
        f" is not saved; the last good checkpoint: {run.last_good}",
        signum,
    )


def make_undo(run: Run, state: PhaseState) -> Callable[[], None] | None:
    """A function that undoes the micro-batches of an incomplete step, called before a step begins;
    None if a step has only one.

    A checkpoint does not store gradients, so the step will be repeated from its first micro-batch:
    what the earlier ones changed in BatchNorm's statistics and in the tally must not be saved.
    """
    if run.config.optim.accumulate == 1:
        return None
    buffers = [buffer.clone() for buffer in run.network.buffers()]
    tally = copy.deepcopy(state.tally)

    def undo() -> None:
        for buffer, value in zip(run.network.buffers(), buffers, strict=True):
            buffer.copy_(value)
        state.tally = tally

    return undo
