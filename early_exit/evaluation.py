"""The whole walk of an evaluation: run directory in, policy, report and plots out.

Thresholds, temperatures and every other choice come from val; `choose` is given nothing else.
"""

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from early_exit import (
    cdl, distributed, energy, findings, overthinking, page, plots, runtime
)
from early_exit import config as configs
from early_exit.choosing import Goal, allowed, choose, outcome, random_exit_accuracy
from early_exit.disk import locked, made_whole, write_text
from early_exit.errors import UserError
from early_exit.experiment import Data, FrontDoor, layout
from early_exit.inference import infer
from early_exit.latency import StageTimes, Timing, measure, stage_times
from early_exit.metrics import MANY_CLASSES, among5, mean_std
from early_exit.policy import Policy
from early_exit.records import ExitRecord, Scores, disagreements, score_record
from early_exit.report import Cuts, Latency, Live, MeanStd, Report, to_json
from early_exit.trained import Trained, cut_record, get_record, load_run, val_and_test
from early_exit.wording import (
    candidate_table,
    guaranteed,
    headline,
    operations,
    table,
    timing_table,
    to_markdown,
    within_latency,
)

log = logging.getLogger(__name__)

CONFUSED = "Confusion of the exits where the final one is right, and wrong"
OVERTHOUGHT = "Right early and wrong at the end: the early answer, then the final one"
GALLERY = "The easiest and hardest images of each exit (wrong answers in bold)"


def evaluate(
    run_dir: Path | str,
    door: FrontDoor,
    goal: Goal,
    *,
    overrides: dict | None = None,
    val_from: str = "train",
    cut_seed: int = 0,
    cuts: int = 1,
    name: str | None = None,
    batch_sizes: tuple[int, ...] = (1, 256),
    timing_images: int = 2000,
    live: bool = True,
    draw: bool = True,
) -> tuple[Report, Path]:
    """Evaluates a run and writes `run_dir/eval/NAME/`; returns the report and that directory.

    overrides: settings of the run that are changed, nested, as in a preset; what they do not say of
    precision, device and threads is as `early_exit.trained.EVALUATION` says. val_from, cut_seed,
    cuts: as eval.py's flags. name: absent: made from the goal. batch_sizes: those that are timed,
    on at most `timing_images` of test. live: whether test is really run, exits taken, and timed.
    draw: whether pictures and the page are made.
    """
    if distributed.world_size() > 1:
        raise UserError("an evaluation runs in one process; start it without torchrun")
    if (cuts > 1 or cut_seed) and val_from != "test":
        raise UserError("--cuts and --cut-seed cut the test set and go with --val-from test")
    if draw:
        page.require()  # and not only after an hour
    run_dir = Path(run_dir)
    trained = load_run(run_dir, door, overrides or {})
    val, test, data, val_words = val_and_test(trained, val_from, cut_seed)
    cost, network = trained.cost, trained.network

    if trained.config.run.compile:
        network.compile_stages()
        network.backbone.compile(dynamic=True)
    times = None
    if goal.latency:
        times = _stage_times(trained, data, goal.criterion, goal.latency_batch)
    policy = choose(val, goal, cost, times)
    _log_choice(policy, goal)
    val_scored, test_scored = score_record(val, policy), score_record(test, policy)
    val_point, val_taken = outcome(val_scored, policy, cost)
    test_point, taken = outcome(test_scored, policy, cost)
    val_shares, test_shares = (findings.shares_of(exits, policy) for exits in (val_taken, taken))
    alone, confused = overthinking.right_answers(test), overthinking.confusion(test, val)
    curve = findings.curve_points(val_scored, test_scored, policy, cost)
    known = door.statics(trained.config, len(data.classes))
    statics = findings.static_networks(known, network, cost)

    several = None
    if cuts > 1:
        several = _over_cuts(trained, goal, cut_seed, cuts, times)
    live_result = _run_live(trained, data, test, policy) if live else None
    measured = []
    if live:
        sizes = {*batch_sizes, *([goal.latency_batch] if times else [])}
        nets = {static: net for static, (_, net) in statics.items()}
        measured = _clock(trained, data, policy, sorted(sizes), timing_images, nets)

    report = Report(
        run=run_dir.name,
        dataset=data.name,
        arch=trained.config.model.arch,
        regime=trained.config.run.regime,
        chosen_by=str(goal),
        thresholds_given=goal.given,
        policy_given=goal.policy is not None,
        criterion=goal.criterion,
        calibrated=goal.calibrate,
        val_from=val_words,
        val_images=len(val),
        test_images=len(test),
        weights=trained.weights,
        precision=runtime.PRECISIONS[trained.precision],
        device=runtime.describe_device(trained.device),
        plain_macs=cost.plain_macs,
        val=val_point,
        test=test_point,
        random_accuracy=random_exit_accuracy(test_scored, taken),
        final_accuracy=float(test_scored.right[:, -1].mean()),
        top5=findings.right_among5(test_scored.among5, taken),
        exits=findings.exit_rows(val, test, alone, test_scored, taken, policy, cost),
        classes=findings.class_rows(test_scored, taken, policy, cost, data.classes),
        energy=findings.energies(energy.estimate(network, cost), taken, policy),
        overthinking=overthinking.analyse(test, alone, confused),
        curve=curve,
        cdl=None if goal.delta is None else cdl.admit(
            score_record(val, policy.all_on()), cost, goal.delta, goal.epsilon
        ),
        guarantee=findings.kept(val, test_scored, policy, goal, cost, test)
        if policy.guarantee else None,
        latency=times and Latency(
            times.batch_size,
            allowed(goal, times),
            times.plain,
            *(
                float(times.of(policy.enabled, np.array([shares]))[0])
                for shares in (val_shares, test_shares)
            ),
        ),
        cuts=several,
        live=live_result,
        timing=tuple(timing for timing, _ in measured),
        statics=tuple(static for static, _ in statics.values()),
        pace=tuple(
            findings.pace(along, timing, policy, curve, val_shares, test_shares)
            for timing, along in measured if along
        ),
        door=door.name,
        settings=configs.without_paths(configs.to_dict(trained.config)),
        versions=runtime.versions(),
        command=shlex.join(["python", *sys.argv]),
    )
    directory = run_dir / "eval" / (name or _name_of(goal))
    return report, _write(
        report, policy, test_scored, taken, alone, confused, data, directory, draw
    )


def _clock(
    trained: Trained, data: Data, policy: Policy, batch_sizes: list[int], most: int,
    others: Mapping[str, nn.Module],
) -> list[tuple[Timing, StageTimes | None]]:
    """The timing at each batch size that test fills, and, if val does too, the stages' times.
    others: networks that are timed in between."""
    for net in others.values():
        net.to(trained.device, memory_format=layout(trained.config))
        if trained.config.run.compile:
            net.compile(dynamic=True)
    measured = []
    for batch_size in batch_sizes:
        log.info("timing at batch %d", batch_size)
        timing = _time(trained, data, policy, batch_size, most)
        if timing is None:
            continue
        along = None
        if batch_size <= data.size("val"):
            along = _stage_times(trained, data, policy.criterion, batch_size, others)
        measured.append((timing, along))
    return measured


def _log_choice(policy: Policy, goal: Goal) -> None:
    if policy.num_exits > 1:
        log.info("%s: thresholds %s", goal, " ".join(f"{t:.4f}" for t in policy.thresholds))
    for index, on in enumerate(policy.enabled):
        if not on:
            why = "on val it costs more than it saves"
            if goal.policy is not None:
                why = "so says the policy that was given"
            if goal.delta is not None:
                why = "its gain on val does not exceed epsilon"
            log.info("%s is off: %s", policy.exit_names[index], why)


def _stage_times(
    trained: Trained,
    data: Data,
    criterion: str,
    batch_size: int,
    others: Mapping[str, nn.Module] | None = None,
) -> StageTimes:
    """Measured on the first images of val; others: networks that are timed in between."""
    images, _ = next(iter(data.eval_batches("val", batch_size)))
    if len(images) < batch_size:
        raise UserError(f"val has {len(images)} images, fewer than --latency-batch {batch_size}")
    return stage_times(
        trained.network, images, criterion, autocast=trained.autocast, others=others
    )


def _over_cuts(trained, goal, cut_seed, cuts, times) -> Cuts:
    """The same choice over cut seeds `cut_seed` .. `cut_seed + cuts - 1`."""
    whole, points, finals = get_record(trained, "test"), [], []
    for seed in range(cut_seed, cut_seed + cuts):
        val, test = cut_record(whole, trained.data, seed)
        policy = choose(val, goal, trained.cost, times)
        scored = score_record(test, policy)
        points.append(outcome(scored, policy, trained.cost)[0])
        finals.append(float(scored.right[:, -1].mean()))
    return Cuts(
        cuts,
        MeanStd(*mean_std([point.accuracy for point in points])),
        MeanStd(*mean_std([point.macs_share for point in points])),
        MeanStd(*mean_std(finals)),
    )


def _run_live(trained: Trained, data: Data, test: ExitRecord, policy, batch_size=256) -> Live:
    """Inference with exits taken on all of test, compared with the record."""
    classes, exits, best5 = [], [], 0
    for images, target in data.eval_batches("test", batch_size):
        answers = infer(trained.network, images, policy, trained.autocast)
        classes.append(answers.classes.cpu().numpy())
        exits.append(answers.exit_index.cpu().numpy())
        if test.num_classes > MANY_CLASSES:
            best5 += int(among5(answers.logits, target).sum())
    classes, exits = np.concatenate(classes), np.concatenate(exits)
    differs, unexplained = disagreements(test, policy, classes, exits)
    return Live(
        images=len(classes),
        accuracy=float((classes == test.targets).mean()),
        top5=best5 / len(classes) if test.num_classes > MANY_CLASSES else None,
        differing=int(differs.sum()),
        differing_beyond_rounding=int(unexplained.sum()),
        batch_size=batch_size,
    )


def _time(trained: Trained, data: Data, policy, batch_size: int, most: int) -> Timing | None:
    """The timing at one batch size, on whole batches of at most `most` test images."""
    total = min(most, data.size("test"))
    if total < batch_size:
        log.info("test has %d images to time, fewer than a batch of %d", total, batch_size)
        return None
    batches = []
    for images, _ in data.eval_batches("test", batch_size):
        if (len(batches) + 1) * batch_size > total:
            break
        batches.append(images)
    return measure(trained.network, batches, policy, autocast=trained.autocast)


def _name_of(goal: Goal) -> str:
    words = f"{goal} {goal.criterion}" + ("" if goal.calibrate else " uncalibrated")
    for old, new in ((" % of MACs", ""), (" %", ""), (" points", ""), (" ", "-")):
        words = words.replace(old, new)
    return words


def _write(report, policy, scored: Scores, taken, alone, confused, data, directory, draw) -> Path:
    """Writes the evaluation's directory, whole, in place of an earlier one of its name."""
    records = directory.parent.parent / "records"  # the lock that a run's evaluations share
    with locked(records, wait=True), made_whole(directory) as partial:
        policy.save(partial / "policy.yaml")
        pictures = {}
        if draw:
            gallery = findings.gallery(scored, taken, policy, data)
            overthought = findings.overthought(scored, alone, confused, policy, data)
            drawn = [
                ("accuracy_vs_macs", "Accuracy against multiply-adds", plots.accuracy_vs_macs,
                 report),
                ("share_per_exit", "Where images leave", plots.share_per_exit, report),
                ("reliability", "Confidence and accuracy of each exit", plots.reliability, report),
                ("gallery", GALLERY, plots.gallery, gallery),
                ("confusion", CONFUSED, plots.confusion, confused, alone[:, -1]),
            ]
            if overthought:
                drawn.append(("overthinking", OVERTHOUGHT, plots.gallery, overthought))
            for name, caption, draw_it, *what in drawn:
                draw_it(*what, partial / f"{name}.png")
                pictures[f"{name}.png"] = caption
            galleries = {GALLERY: gallery, OVERTHOUGHT: overthought}
            page.write(report, galleries, partial / "report.html")
        write_text(partial / "report.json", to_json(report))
        write_text(partial / "report.md", to_markdown(report, pictures))
    return directory


def summary(report: Report, directory: Path) -> str:
    """What the screen shows at the end."""
    parts = [table(report), headline(report)]
    if report.cdl is not None:
        parts += [candidate_table(report), operations(report)]
    if report.guarantee:
        parts.append(guaranteed(report))
    if report.latency:
        parts.append(within_latency(report))
    if report.cuts:
        parts.append(
            f"over {report.cuts.count} cuts: {100 * report.cuts.accuracy.mean:.2f}"
            f" ± {100 * report.cuts.accuracy.std:.2f} % at"
            f" {100 * report.cuts.macs_share.mean:.2f} % of MACs"
        )
    if report.timing:
        parts.append(timing_table(report))
    if report.live:
        parts.append(
            f"live inference on {report.live.images:,} test images:"
            f" {100 * report.live.accuracy:.2f} % right, {report.live.differing} unlike the record"
        )
    parts.append(
        f"table and report: {directory / 'report.md'}\n"
        f"numbers:          {directory / 'report.json'}\n"
        f"policy:           {directory / 'policy.yaml'}"
        + (
            f"\nplots:            {directory}/*.png\nto show around:   {directory / 'report.html'}"
            if (directory / "report.html").exists() else ""
        )
    )
    return "\n\n".join(parts)
