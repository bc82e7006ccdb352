"""The report of an evaluation, assembled from what was chosen, applied and measured."""

import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from early_exit import config as configs
from early_exit.choosing import cdl, overthinking
from early_exit.choosing.goals import (
    ConditionalDeepLearning,
    FixedPolicy,
    FixedThresholds,
    Goal,
)
from early_exit.choosing.outcome import Outcome
from early_exit.choosing.record import ExitRecord, score_record
from early_exit.evaluation import rows
from early_exit.evaluation.decoration import optional
from early_exit.evaluation.live import Measurements
from early_exit.evaluation.report import (
    Choice,
    Cuts,
    EnergyEstimate,
    Environment,
    Report,
    RunInfo,
    StaticRow,
)
from early_exit.evaluation.verdict import verdicts
from early_exit.inference.runtimes.table import packages_of
from early_exit.inference.segment_times import SegmentTimes
from early_exit.model import energy
from early_exit.output import source_run
from early_exit.system import provenance
from early_exit.system.device import PRECISIONS, describe_device
from early_exit.task import Task
from early_exit.trained import Splits, Trained, unfinished_of


@dataclass(frozen=True)
class Evaluated:
    """What the report is made of."""

    trained: Trained
    splits: Splits
    goal: Goal
    times: SegmentTimes | None
    val: Outcome
    test: Outcome


def make_report(
    evaluated: Evaluated,
    task: Task,
    measured: Measurements,
    cuts: Cuts | None,
    static_rows: tuple[StaticRow, ...],
) -> Report:
    """The report of an evaluation."""
    trained, splits, goal = evaluated.trained, evaluated.splits, evaluated.goal
    val, test, cost = evaluated.val, evaluated.test, evaluated.trained.cost
    curve = rows.curve_points(val, test)
    energies: tuple[EnergyEstimate, ...] = ()
    with optional("the estimate of energy"):
        energies = rows.energies(energy.estimate(trained.network, cost), test)
    report = Report(
        run=RunInfo(
            name=Path(os.path.abspath(source_run(trained.run_dir))).name,
            task=task.name,
            dataset=splits.data.name,
            arch=trained.config.model.arch,
            regime=trained.config.run.regime,
            weights=trained.weights,
            settings=configs.without_paths(configs.to_dict(trained.config)),
            unfinished=unfinished_of(trained.weights),
            rounded_to=trained.rounded_to,
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
            versions=provenance.versions(*packages_of(trained.runtime.runtime.name)),
            command=shlex.join(["python", *sys.argv]),
        ),
        plain_macs=cost.plain_macs,
        val=val.point,
        val_shares=val.exit_shares,
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
    return dataclasses.replace(report, verdicts=verdicts(report))


def _candidates(val: ExitRecord, goal: Goal, outcome: Outcome) -> tuple[cdl.Candidate, ...] | None:
    if not isinstance(goal, ConditionalDeepLearning):
        return None
    scored = score_record(val, outcome.policy.with_all_enabled())
    return cdl.admit(scored, outcome.cost, goal.delta, goal.epsilon)
