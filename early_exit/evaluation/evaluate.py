"""A whole evaluation: from a run directory to a policy, a report, pages and plots.

Choose on val, apply to test, measure with exits taken, report. `choose` is given val and nothing
else.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from early_exit import config as configs
from early_exit.choosing import cdl, overthinking
from early_exit.choosing.goals import (
    ConditionalDeepLearning,
    FixedPolicy,
    FixedThresholds,
    Goal,
    Risk,
    check_given,
    choose,
    exits_to_time,
    timed_batch,
)
from early_exit.choosing.outcome import Outcome, apply_policy
from early_exit.choosing.record import ExitRecord, score_record
from early_exit.errors import UserError
from early_exit.evaluation import page, plots, rows
from early_exit.evaluation.decoration import optional
from early_exit.evaluation.live import Measurements, measure, time_for_choice
from early_exit.evaluation.markdown import to_markdown
from early_exit.evaluation.report import (
    Choice,
    Cuts,
    EnergyEstimate,
    Environment,
    MeanStd,
    Report,
    RunInfo,
    to_json,
)
from early_exit.inference.policy import Policy
from early_exit.inference.segment_times import SegmentTimes
from early_exit.metrics import mean_std
from early_exit.model import energy
from early_exit.output import prepare_output, source_run
from early_exit.system import provenance, torchrun
from early_exit.system.device import PRECISIONS, describe_device
from early_exit.system.directories import atomic_directory
from early_exit.system.disk_errors import is_writable
from early_exit.system.files import write_text
from early_exit.system.locks import locked
from early_exit.task import Task
from early_exit.trained import (
    Splits,
    Trained,
    cut_record,
    get_record,
    get_splits,
    load_run,
    unfinished_of,
)

log = logging.getLogger(__name__)

MANY_EXITS = 7  # early exits of which all segments between them are timed for a goal in seconds
FEW_EXITS = 2  # where a segment takes a minute to build


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an evaluation does beyond choosing a policy; the flags of eval.py."""

    val_from: str = "train"
    """`train`: val is what training held out; `test`: val is half of the official test set."""
    cut_seed: int = 0
    """Seed of the cut that `val_from="test"` makes."""
    cuts: int = 1
    """Over how many cuts, from `cut_seed` on, the choice is repeated."""
    batch_sizes: tuple[int, ...] = (1, 256)
    """Batch sizes that are timed."""
    timing_images: int = 2000
    """Test images that are timed at most."""
    live: bool = True
    """Whether test is run with exits taken, and timed."""
    draw: bool = True
    """Whether plots and the page are made."""

    def __post_init__(self) -> None:
        if self.val_from not in ("train", "test"):
            raise UserError(f"--val-from is train or test, got {self.val_from!r}")
        if (self.cuts > 1 or self.cut_seed) and self.val_from != "test":
            raise UserError("--cuts and --cut-seed cut the test set and need --val-from test")


@dataclass(frozen=True)
class Evaluated:
    """What the report is made of."""

    trained: Trained
    splits: Splits
    goal: Goal
    times: SegmentTimes | None
    val: Outcome
    test: Outcome


def evaluate(
    run_dir: Path | str,
    task: Task,
    goal: Goal,
    *,
    overrides: dict | None = None,
    name: str | None = None,
    out: Path | str | None = None,
    **options: Any,
) -> tuple[Report, Path]:
    """Evaluates a run and writes `run_dir/eval/NAME/`; returns the report and that directory.

    out: a directory to write into instead of the run, which is then only read.

    overrides: settings of the run that are changed, nested as in a preset; precision, device and
    threads that they do not name are as `early_exit.trained.EVALUATION` says. name: of the
    evaluation; default: made from the goal. options: the fields of `Options`.
    """
    if torchrun.world_size() > 1:
        raise UserError("an evaluation runs in one process; start it without torchrun")
    chosen = Options(**options)
    output = prepare_output(Path(run_dir), None if out is None else Path(out))
    directory = output / "eval" / (name or default_name(goal))
    if not is_writable(directory):
        raise UserError(f"{directory} cannot be written, or is too long a name; change --name")
    trained = load_run(output, task, overrides or {}, chosen.val_from)
    check_given(goal, len(trained.classes), trained.network.exit_names)  # before inference
    evaluated = choose_and_apply(trained, goal, chosen)
    cuts = over_cuts(evaluated, chosen) if chosen.cuts > 1 else None

    known = task.static_networks(trained.config, len(evaluated.splits.data.classes))
    static = rows.static_networks(known, trained.network, trained.cost)
    networks = {row.name: network for row, network in static}
    measured = take_exits(evaluated, chosen, networks) if chosen.live else Measurements()
    report = make_report(
        evaluated, task, measured, cuts, static_rows=tuple(row for row, _ in static)
    )
    write(report, evaluated, directory, chosen.draw)
    return report, directory


def choose_and_apply(trained: Trained, goal: Goal, options: Options) -> Evaluated:
    """Chooses a policy on val and applies it to val and test."""
    splits, times = get_splits(trained, options.val_from, options.cut_seed), None
    if batch_size := timed_batch(goal):
        most = FEW_EXITS if trained.runtime.runtime.slow_to_build else MANY_EXITS
        candidates = exits_to_time(splits.val, goal, trained.cost, most)
        times = time_for_choice(trained, splits.data, goal.criterion, batch_size, candidates)
    policy = choose(splits.val, goal, trained.cost, times)
    _log_policy(policy, goal)
    val, test = (apply_policy(policy, part, trained.cost) for part in (splits.val, splits.test))
    return Evaluated(trained, splits, goal, times, val, test)


def take_exits(
    evaluated: Evaluated, options: Options, static_networks: dict[str, nn.Module]
) -> Measurements:
    """Runs test with exits taken, and times it beside the plain and the static networks."""
    splits, times = evaluated.splits, evaluated.times
    return measure(
        evaluated.trained,
        splits.data,
        evaluated.test,
        splits.test,
        sorted({*options.batch_sizes, *((times.batch_size,) if times else ())}),
        options.timing_images,
        static_networks,
    )


def make_report(
    evaluated: Evaluated,
    task: Task,
    measured: Measurements,
    cuts: Cuts | None,
    static_rows: tuple,
) -> Report:
    """The report of an evaluation."""
    trained, splits, goal = evaluated.trained, evaluated.splits, evaluated.goal
    val, test, cost = evaluated.val, evaluated.test, evaluated.trained.cost
    curve = rows.curve_points(val, test)
    energies: tuple[EnergyEstimate, ...] = ()
    with optional("the estimate of energy"):
        energies = rows.energies(energy.estimate(trained.network, cost), test)
    return Report(
        run=RunInfo(
            name=source_run(trained.run_dir).name,
            task=task.name,
            dataset=splits.data.name,
            arch=trained.config.model.arch,
            regime=trained.config.run.regime,
            weights=trained.weights,
            settings=configs.without_paths(configs.to_dict(trained.config)),
            unfinished=unfinished_of(trained.weights),
        ),
        choice=Choice(
            goal=str(goal),
            criterion=goal.criterion,
            calibrated=goal.calibrate,
            thresholds_given=isinstance(
                goal, FixedThresholds | FixedPolicy | ConditionalDeepLearning
            ),
            policy_given=isinstance(goal, FixedPolicy),
            val_from=splits.origin,
            val_images=len(splits.val),
            test_images=len(splits.test),
            left_out=splits.left_out,
        ),
        environment=Environment(
            device=describe_device(trained.device),
            precision=PRECISIONS[trained.runtime.runtime.precision],
            runtime=trained.runtime.runtime.name,
            versions=provenance.versions(),
            command=shlex.join(["python", *sys.argv]),
        ),
        plain_macs=cost.plain_macs,
        val=val.point,
        test=test.point,
        random_accuracy=test.random_exit_accuracy,
        final_accuracy=test.final_accuracy,
        top5=rows.top5_accuracy(test.scored.in_top5, test.exit_index),
        exits=rows.exit_rows(splits, test),
        classes=rows.class_rows(test, splits.data.classes),
        energy=energies,
        overthinking=overthinking.analyse(splits.test, splits.correct_test, splits.confusion),
        curve=curve,
        cdl=_candidates(splits.val, goal, val),
        guarantee=rows.guarantee_result(evaluated.val, test, splits, goal),
        latency=rows.latency_result(evaluated.times, goal, val, test),
        cuts=cuts,
        live=measured.live,
        timing=tuple(found.timing for found in measured.timed),
        static_networks=static_rows,
        curve_seconds=tuple(
            rows.curve_seconds(found.segments, found.timing, curve, val, test)
            for found in measured.timed
            if found.segments
        ),
    )


def _candidates(val: ExitRecord, goal: Goal, outcome: Outcome) -> tuple[cdl.Candidate, ...] | None:
    if not isinstance(goal, ConditionalDeepLearning):
        return None
    scored = score_record(val, outcome.policy.with_all_enabled())
    return cdl.admit(scored, outcome.cost, goal.delta, goal.epsilon)


def over_cuts(evaluated: Evaluated, options: Options) -> Cuts:
    """The same choice over cut seeds `cut_seed` .. `cut_seed + cuts - 1`."""
    trained, times, outcomes = evaluated.trained, evaluated.times, []
    whole = get_record(trained, "test")
    for seed in range(options.cut_seed, options.cut_seed + options.cuts):
        val, test = cut_record(whole, trained.data, seed)
        policy = choose(val, evaluated.goal, trained.cost, times)
        outcomes.append(apply_policy(policy, test, trained.cost))
    points = [outcome.point for outcome in outcomes]
    return Cuts(
        options.cuts,
        MeanStd(*mean_std([point.accuracy for point in points])),
        MeanStd(*mean_std([point.macs_share for point in points])),
        MeanStd(*mean_std([outcome.final_accuracy for outcome in outcomes])),
        None if times is None else MeanStd(*mean_std(speedups(outcomes, times))),
    )


def speedups(outcomes: Sequence[Outcome], times: SegmentTimes) -> list[float]:
    """How many times as fast as the plain network each outcome is expected to be."""
    return [
        times.plain / float(times.of(outcome.policy.enabled, np.array([outcome.exit_shares]))[0])
        for outcome in outcomes
    ]


def _log_policy(policy: Policy, goal: Goal) -> None:
    if policy.num_exits > 1:
        log.info("%s: thresholds %s", goal, " ".join(f"{t:.4f}" for t in policy.thresholds))
    match goal:
        case FixedPolicy():
            reason = "the given policy disables it"
        case ConditionalDeepLearning():
            reason = "its gain on val does not exceed epsilon"
        case Risk() if not any(policy.enabled):
            reason = "no threshold was certified"
        case _:
            reason = "on val it costs more than it saves"
    for name, enabled in zip(policy.exit_names, policy.enabled, strict=False):
        if not enabled:
            log.info("exit %s is disabled: %s", name, reason)


def default_name(goal: Goal) -> str:
    """The name of an evaluation that was given none."""
    words = f"{goal} {goal.criterion}"
    words = words.replace(",", "")
    if not goal.calibrate:
        words += " uncalibrated"
    for old, new in ((" % of MACs", ""), (" %", ""), (" points", ""), (" ", "-")):
        words = words.replace(old, new)
    return words


def write(report: Report, evaluated: Evaluated, directory: Path, draw: bool) -> None:
    """Writes the directory of an evaluation, replacing an earlier one of its name.

    The policy and the numbers are written first, whole or not at all. What is made of them follows,
    each file alone: one that fails is left out with one line.
    """
    records = directory.parent.parent / "records"  # the lock that a run's evaluations share
    with locked(records, wait=True):
        with atomic_directory(directory) as partial:
            evaluated.test.policy.save(partial / "policy.yaml")
            write_text(partial / "report.json", to_json(report))
        pictures = decorate(report, evaluated, directory) if draw else {}
        with optional(str(directory / "report.md")):
            write_text(directory / "report.md", to_markdown(report, pictures))


def decorate(report: Report, evaluated: Evaluated, directory: Path) -> dict[str, str]:
    """Draws the pictures and writes the page; returns the captions of the pictures by file name."""
    test, splits = evaluated.test, evaluated.splits
    galleries: dict[str, list[rows.Row]] = {}
    with optional(str(directory / "gallery.png")):
        galleries = rows.galleries(test, splits)
    pictures = plots.draw_all(report, splits, galleries, directory)
    with optional(str(directory / "report.html")):
        page.write(report, galleries, directory / "report.html")
    return pictures
