"""A whole evaluation: from a run directory to a policy, a report, pages and plots.

Choose on val, apply to test, measure with exits taken, report. `choose` is given val and nothing
else.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from early_exit.choosing.choice import choose, spans_to_time
from early_exit.choosing.goals import (
    ConditionalDeepLearning,
    FixedPolicy,
    Goal,
    Risk,
    check_given,
    timed_batch,
)
from early_exit.choosing.outcome import Outcome, apply_policy
from early_exit.errors import UserError
from early_exit.evaluation import page, plots, rows
from early_exit.evaluation.assembly import Evaluated, make_report
from early_exit.evaluation.decoration import optional
from early_exit.evaluation.live import Measurements, measure, time_for_choice
from early_exit.evaluation.markdown import to_markdown
from early_exit.evaluation.report import Cuts, MeanStd, Report, StaticRow, to_json
from early_exit.evaluation.runtimes import (
    check_names,
    check_settings,
    default_name,
    evaluation_name,
    resolved,
    runtime_row,
    with_default,
)
from early_exit.inference.policy import Policy
from early_exit.inference.segment_times import SegmentTimes
from early_exit.metrics import mean_std
from early_exit.output import prepare_output
from early_exit.system import torchrun
from early_exit.system.directories import atomic_directory
from early_exit.system.disk_errors import is_writable
from early_exit.system.files import write_text
from early_exit.system.locks import locked
from early_exit.task import Task
from early_exit.trained import (
    Trained,
    cut_record,
    get_record,
    get_splits,
    in_runtime,
    load_run,
    on_their_device,
)
from early_exit.training.rounding import ROUNDINGS

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
    rounded_to: str | None = None
    """What all weights are rounded to before (`early_exit.training.rounding`); None: nothing."""

    def __post_init__(self) -> None:
        if self.val_from not in ("train", "test"):
            raise UserError(f"--val-from is train or test, got {self.val_from!r}")
        if (self.cuts > 1 or self.cut_seed) and self.val_from != "test":
            raise UserError("--cuts and --cut-seed cut the test set and need --val-from test")
        for name in ("cuts", "timing_images"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} must be at least 1, got {getattr(self, name)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            sizes = " ".join(map(str, self.batch_sizes)) or "none"
            raise UserError(f"--batch-sizes must be one or more sizes of at least 1, got {sizes}")
        if self.rounded_to not in (None, *ROUNDINGS):
            raise UserError(f"--weights is {' or '.join(ROUNDINGS)}, got {self.rounded_to!r}")


def evaluate(
    run_dir: Path | str,
    task: Task,
    goal: Goal,
    *,
    runtime: str | None = None,
    **options: Any,
) -> tuple[Report, Path]:
    """Evaluates a run and writes `run_dir/eval/NAME/`; returns the report and that directory.

    runtime, options: as for `evaluate_each`.
    """
    return evaluate_each(run_dir, task, goal, runtimes=(runtime,), **options)[0]


def evaluate_each(
    run_dir: Path | str,
    task: Task,
    goal: Goal,
    *,
    runtimes: Sequence[str | None] = (None,),
    overrides: dict | None = None,
    name: str | None = None,
    base: str | None = None,
    out: Path | str | None = None,
    **options: Any,
) -> list[tuple[Report, Path]]:
    """Evaluates a run in each of several runtimes: recorded, chosen, run and timed on its own.

    Writes `run_dir/eval/NAME/` for each as soon as it is done, and all of them again at the end
    with a table of all; returns the reports and the directories.

    runtimes: names of `early_exit.inference.runtimes.table`, or `fastest`, the one in which the
    plain network is fastest; None: torch, compiled and in reduced precision if the settings say so.
    overrides: settings of the run that are changed, nested as in a preset; precision, device and
    threads that they do not name are as `early_exit.trained.EVALUATION` says. name: of the
    evaluation; the name of the runtime is appended where there are several. base: without a name,
    what the rounding of weights and the runtime are appended to; default: made from the goal. out:
    a directory to write into instead of the run, which is then only read. options: the fields of
    `Options`.
    """
    if torchrun.world_size() > 1:
        raise UserError("an evaluation runs in one process; start it without torchrun")
    chosen, several = Options(**options), len(runtimes) > 1
    check_names(runtimes)
    check_settings(runtimes, overrides or {})
    output = prepare_output(Path(run_dir), None if out is None else Path(out))
    unnamed = base or default_name(goal)
    if chosen.rounded_to:
        unnamed += f"-weights-{chosen.rounded_to}"

    def directory_in(runtime: str | None) -> Path:
        return output / "eval" / evaluation_name(unnamed, name, runtime, several)

    runtimes = with_default(runtimes, overrides or {})
    for directory in map(directory_in, runtimes):
        if not is_writable(directory):
            raise UserError(f"{directory} cannot be written, or is too long a name; change --name")
    settings = on_their_device(overrides or {}, runtimes)
    trained = load_run(output, task, settings, chosen.val_from, rounded_to=chosen.rounded_to)
    check_given(goal, len(trained.classes), trained.network.exit_names)  # before inference
    timed = timed_batch(goal)
    if timed and timed > (size := _val_size(trained, chosen.val_from)):
        raise UserError(f"--latency-batch is {timed}, and val has only {size} images")
    names = resolved(trained, runtimes, timed or chosen.batch_sizes[0])
    directories = list(map(directory_in, names))
    parts = _in_runtimes(trained, names)
    known = task.static_networks(trained.config, len(trained.classes))
    static = rows.static_networks(known, trained.network, trained.cost)
    found: list[Evaluated] = []
    reports: list[Report] = []
    for part, directory in zip(parts, directories, strict=True):
        evaluated, report = _evaluate_one(part, task, goal, chosen, static)
        write(report, evaluated, directory, chosen.draw)
        found.append(evaluated)
        reports.append(report)
    if len(reports) > 1:
        table = tuple(map(runtime_row, reports, [directory.name for directory in directories]))
        reports = [replace(report, runtimes=table) for report in reports]
        for written in zip(reports, found, directories, strict=True):
            write(*written, chosen.draw)
    return list(zip(reports, directories, strict=True))


def _val_size(trained: Trained, val_from: str) -> int:
    """The images of val, at most."""
    if val_from == "train":
        return trained.data.size("val")
    return -(-trained.data.size("test") // 2)


def _in_runtimes(trained: Trained, names: Sequence[str | None]) -> list[Trained]:
    """The run in each runtime. None: as it was loaded.

    Each plain network is built at once, so that a missing package is found before hours of work.
    """
    parts = [
        trained
        if name is None
        else replace(trained, runtime=in_runtime(trained, trained.data, name))
        for name in names
    ]
    for part, name in zip(parts, names, strict=True):
        if name is not None:
            part.runtime.plain()
    return parts


def _evaluate_one(
    trained: Trained,
    task: Task,
    goal: Goal,
    options: Options,
    static: Sequence[tuple[StaticRow, nn.Module]],
) -> tuple[Evaluated, Report]:
    """The evaluation in one runtime. static: networks to compare with."""
    evaluated = choose_and_apply(trained, goal, options)
    cuts = over_cuts(evaluated, options) if options.cuts > 1 else None
    networks = {row.name: network for row, network in static}
    measured = take_exits(evaluated, options, networks) if options.live else Measurements()
    report = make_report(evaluated, task, measured, cuts, tuple(row for row, _ in static))
    return evaluated, report


def choose_and_apply(trained: Trained, goal: Goal, options: Options) -> Evaluated:
    """Chooses a policy on val and applies it to val and test.

    Raises UserError if the exits to time would be chosen on val of the first of several cuts, which
    has images of the others' tests.
    """
    splits, times = get_splits(trained, options.val_from, options.cut_seed), None
    if batch_size := timed_batch(goal):
        most = FEW_EXITS if trained.runtime.runtime.slow_to_build else MANY_EXITS
        to_time = spans_to_time(splits.val, goal, trained.cost, most)
        early = trained.network.num_exits - 1
        timed_exits = {last for _, last in to_time} - {early}
        if options.cuts > 1 and len(timed_exits) < early:
            raise UserError(
                f"a goal in seconds times {most} of the {early} early exits, chosen on one cut's"
                " val, which has test images of the other cuts; remove --cuts, or train a network"
                f" with at most {most} early exits"
            )
        times = time_for_choice(trained, splits.data, goal.criterion, batch_size, to_time)
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
        MeanStd(
            *mean_std([outcome.final_accuracy - outcome.point.accuracy for outcome in outcomes])
        ),
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
            reason = "on val it does not save more than it costs"
    for name, enabled in zip(policy.exit_names, policy.enabled, strict=False):
        if not enabled:
            log.info("exit %s is disabled: %s", name, reason)


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
