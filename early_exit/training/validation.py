"""The loss and accuracy of every exit on val, after each epoch."""

import itertools
import math
from collections.abc import Iterator
from functools import partial

from early_exit.data.splits import Shard
from early_exit.model.network import MultiExitNetwork
from early_exit.system.signals import Interrupted, StopSignals
from early_exit.training.phases import Phase
from early_exit.training.state import PhaseState, Run
from early_exit.training.steps import Score, Tally, as_list, score_batches
from early_exit.training.stopping import stop_if_diverged, stop_if_signalled, stop_while_waiting


def validate(run: Run, phase: Phase, state: PhaseState, stop: StopSignals) -> Score:
    """Scores the weights that would be reported now. A signal saves a checkpoint and ends it."""
    network = reported_network(run, state)
    tally = Tally(len(phase.weights), run.device)
    score_until_signalled(run, state, stop, val_batches(run, phase, network, tally, stop))
    total = tally.gathered(run.group)
    stop_if_diverged(run, state, total)
    return total.score(run.exit_names(phase))


def reported_network(run: Run, state: PhaseState) -> MultiExitNetwork:
    """The network whose weights would be reported, in eval mode, with the main process's buffers:
    the average's if there is one."""
    run.group.broadcast_buffers(run.network)
    if state.average:
        run.group.broadcast_buffers(state.average.module)
    network = state.average.module if state.average else run.network
    network.eval()
    return network


def val_batches(
    run: Run, phase: Phase, network: MultiExitNetwork, tally: Tally, stop: StopSignals
) -> Iterator[None]:
    """Scores the batches of val that are this process's, adding them to `tally`."""
    shard = Shard(run.group.rank, run.group.world)
    return score_batches(
        as_list(network.backbone if phase.backbone_only else network, phase.backbone_only),
        stop.wait_for(run.data.eval_batches("val", run.data.eval_batch, shard)),
        partial(run.task.loss, weights=phase.weights, **run.task_loss_settings),
        run.autocast,
        tally,
    )


def score_until_signalled(
    run: Run, state: PhaseState, stop: StopSignals, batches: Iterator[None]
) -> None:
    """Runs through the batches; all processes check together for a signal after each."""
    # the same number of checks in every process, even if one has fewer batches
    checks = math.ceil(run.data.size("val") / (run.data.eval_batch * run.group.world))
    try:
        # a batch may compile for minutes; several processes can only stop together
        stop.raise_at_once = False
        if run.group.world == 1:
            stop.raise_if_signalled()
        for _ in itertools.zip_longest(range(checks), batches):
            stop_if_signalled(run, state, stop)
    except Interrupted:
        stop_while_waiting(run, state, stop)
    finally:
        stop.raise_at_once = False
