"""The whole walk of an evaluation: run directory in, policy, report and plots out.

Thresholds, temperatures and every other choice come from val; `choose` is given nothing else.
"""

import dataclasses
import hashlib
import logging
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from early_exit import (
    cdl, checkpoint, distributed, energy, guarantees, overthinking, plots, runtime, thresholds
)
from early_exit import config as configs
from early_exit.choosing import (
    Goal, Point, allowed, choose, outcome, random_exit_accuracy, thinned
)
from early_exit.config import Config
from early_exit.cost import Cost, network_cost
from early_exit.disk import locked, made_whole, write_text
from early_exit.errors import UserError
from early_exit.experiment import Data, FrontDoor, layout, plan_phases, setup
from early_exit.inference import infer
from early_exit.latency import StageTimes, Timing, measure, stage_times
from early_exit.metrics import (
    MANY_CLASSES,
    among5,
    auroc,
    expected_calibration_error,
    mean_std,
    reliability,
)
from early_exit.network import MultiExitNetwork
from early_exit.policy import Policy
from early_exit.records import ExitRecord, RecordInfo, Scores, disagreements, record, score_record
from early_exit.report import (
    ClassRow,
    CurvePoint,
    Cuts,
    EnergyEstimate,
    ExitRow,
    Kept,
    Latency,
    Live,
    MeanStd,
    Report,
    candidate_table,
    finite,
    guaranteed,
    headline,
    operations,
    table,
    timing_table,
    to_json,
    to_markdown,
    within_latency,
)

log = logging.getLogger(__name__)

GALLERY_COLUMNS = 10


@dataclass(frozen=True)
class Trained:
    """A run, loaded: the network in eval mode on the device, the data there too."""

    run_dir: Path
    config: Config
    network: MultiExitNetwork
    data: Data
    cost: Cost
    device: torch.device
    precision: str
    weights: str
    """Hash of the weights and which they are."""
    unseen_val: str | None
    """Hash of the val images if no weight has seen them."""

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """The context that the network runs in."""
        return partial(runtime.autocast, self.precision, self.device)


def load_run(run_dir: Path, door: FrontDoor, overrides: dict) -> Trained:
    """The newest checkpoint of a run directory, its settings changed by `overrides`."""
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory at {run_dir}; training prints the one it made")
    path, state = checkpoint.newest(run_dir)
    if state is None:
        raise UserError(f"{run_dir} holds no checkpoint; train it first")
    config = configs.build(door.config, configs.merge(state["config"], overrides))
    device, precision = setup(config)
    data = door.load_data(config.data).normalised_by(state["normalisation"])
    if data.val_hash != state["val_hash"]:
        raise UserError(
            f"{path} held out other val images ({state['val_hash']}) than this data set gives"
            f" ({data.val_hash}); check the data under --data"
        )
    network = door.build_network(config, len(state["classes"]))
    checkpoint.load_into(network, checkpoint.reported(state), path)
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    position, phases = state["position"], plan_phases(config, network.num_exits)
    where = "the last epoch"
    if position["phase"] < len(phases):
        phase = phases[position["phase"]]
        where = f"epoch {position['epoch']} of {phase.optim.epochs}, phase {phase.name}"
        log.warning("this run is not finished: its weights are those of %s", where)
    where += ", running average" if state.get("average") else ""
    network.to(device, memory_format=layout(config)).eval()
    return Trained(
        run_dir=run_dir,
        config=config,
        network=network,
        data=data.to(device, layout(config)),
        cost=network_cost(network),
        device=device,
        precision=precision,
        weights=f"weights {digest.hexdigest()[:16]} of {where}",
        unseen_val=state["unseen_val"],
    )


def get_record(trained: Trained, split: str) -> ExitRecord:
    """The record of a split of the run's own data, from the run directory where it is there."""
    data, network, cost = trained.data, trained.network, trained.cost
    info = RecordInfo(
        split=split,
        split_hash=data.val_hash if split == "val" else data.test_hash,
        exit_names=network.exit_names,
        stage_macs=cost.stage_macs,
        head_macs=cost.head_macs,
        precision=trained.precision,
        weights=trained.weights,
        device=runtime.describe_device(trained.device),
    )
    directory = trained.run_dir / "records" / f"{split}-{trained.precision}"
    with locked(directory.parent, wait=True):  # another evaluation may be making it
        if directory.exists():
            try:
                stored = ExitRecord.load(directory)
            except UserError as error:
                log.warning("%s; recording anew", error)
            else:
                if stored.info == info:
                    return stored
        log.info("recording every exit on %s", split)
        return record(
            network,
            data.eval_batches(split, data.eval_batch),
            data.size(split),
            info,
            trained.device,
            trained.autocast,
            directory,
        )


def val_and_test(
    trained: Trained, val_from: str, cut_seed: int
) -> tuple[ExitRecord, ExitRecord, Data, str]:
    """The records of val and test, the data they index, and where val came from, in words.

    Raises UserError where the weights may have seen the images of val.
    """
    if val_from == "train" and trained.unseen_val != trained.data.val_hash:
        raise UserError(
            f"the backbone of {trained.run_dir} was trained on another or an unknown split and may"
            " have seen the val images, so nothing can be fitted on them; pass --val-from test,"
            " which cuts the official test set into val and test"
        )
    test = get_record(trained, "test")
    if val_from == "train":
        return get_record(trained, "val"), test, trained.data, "held out from train"
    chosen, rest = trained.data.test_halves(cut_seed)
    name = f"{trained.data.name} test, cut {cut_seed}"
    return (
        test.subset(chosen, "val", f"{name}, val half"),
        test.subset(rest, "test", f"{name}, test half"),
        trained.data.cut_test(cut_seed),
        f"half of the official test set, cut by seed {cut_seed}",
    )


def evaluate(
    run_dir: Path,
    door: FrontDoor,
    goal: Goal,
    *,
    overrides: dict,
    val_from: str = "train",
    cut_seed: int = 0,
    cuts: int = 1,
    name: str | None = None,
    batch_sizes: tuple[int, ...] = (1, 256),
    timing_images: int = 2000,
    live: bool = True,
    draw: bool = True,
) -> tuple[Report, Path]:
    """Evaluates a run and writes `run_dir/eval/NAME/`; returns the report and that directory."""
    if distributed.world_size() > 1:
        raise UserError("an evaluation runs in one process; start it without torchrun")
    if cuts > 1 and val_from != "test":
        raise UserError("--cuts repeats the cut of the test set and goes with --val-from test")
    trained = load_run(run_dir, door, overrides)
    if trained.network.num_exits == 1:
        raise UserError(
            f"{run_dir} is a plain network without early exits, so there is nothing to choose; the"
            f" trainer scores it: -e --resume {run_dir} --split test"
        )
    val, test, data, val_words = val_and_test(trained, val_from, cut_seed)
    cost, network = trained.cost, trained.network

    if trained.config.run.compile:
        network.compile_stages()
        network.backbone.compile(dynamic=True)
    times = _stage_times(trained, data, goal) if goal.latency else None
    policy = choose(val, goal, cost, times)
    log.info("%s: thresholds %s", goal, " ".join(f"{t:.4f}" for t in policy.thresholds))
    for index, on in enumerate(policy.enabled):
        if not on:
            why = "on val it costs more than it saves"
            if goal.delta is not None:
                why = "its gain on val does not exceed epsilon"
            log.info("%s is off: %s", policy.exit_names[index], why)
    val_scored, test_scored = score_record(val, policy), score_record(test, policy)
    val_point, _ = outcome(val_scored, policy, cost)
    test_point, taken = outcome(test_scored, policy, cost)

    alone, confused = overthinking.right_answers(test), overthinking.confusion(test, val)

    several = None
    if cuts > 1:
        several = _over_cuts(trained, goal, cut_seed, cuts, times)
    live_result = _run_live(trained, data, test, policy) if live else None
    timings = []
    if live:
        for batch_size in sorted({*batch_sizes, *([goal.latency_batch] if times else [])}):
            log.info("timing at batch %d", batch_size)
            timing = _time(trained, data, policy, batch_size, timing_images)
            timings += [timing] if timing else []

    report = Report(
        run=run_dir.name,
        dataset=data.name,
        arch=trained.config.model.arch,
        regime=trained.config.run.regime,
        chosen_by=str(goal),
        thresholds_given=goal.thresholds is not None or goal.delta is not None,
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
        top5=_share(test_scored.among5, taken),
        exits=_exit_rows(val, test, alone, test_scored, taken, policy, cost),
        classes=_class_rows(test_scored, taken, policy, cost, data.classes),
        energy=_energy(network, taken, policy, cost),
        overthinking=overthinking.analyse(test, alone, confused),
        curve=_curve(val_scored, test_scored, policy, cost),
        cdl=None if goal.delta is None else cdl.admit(
            score_record(val, policy.all_on()), cost, goal.delta, goal.epsilon
        ),
        guarantee=_kept(val, test_scored, policy, goal, cost, test) if policy.guarantee else None,
        latency=times and Latency(
            times.batch_size,
            allowed(goal, times),
            times.plain,
            *(_expected(times, scored, policy) for scored in (val_scored, test_scored)),
        ),
        cuts=several,
        live=live_result,
        timing=tuple(timings),
        versions=runtime.versions(),
        command=shlex.join(["python", *sys.argv]),
    )
    directory = run_dir / "eval" / (name or _name_of(goal))
    return report, _write(
        report, policy, test_scored, taken, alone, confused, data, directory, draw
    )


def _stage_times(trained: Trained, data: Data, goal: Goal) -> StageTimes:
    """Measured on the first images of val."""
    size = goal.latency_batch
    images, _ = next(iter(data.eval_batches("val", size)))
    if len(images) < size:
        raise UserError(f"val has {len(images)} images, fewer than --latency-batch {size}")
    return stage_times(trained.network, images, goal.criterion, autocast=trained.autocast)


def _expected(times: StageTimes, scored: Scores, policy: Policy) -> float:
    """Seconds of a batch, from the shares that leave at each exit."""
    taken = scored.exit_index(policy)
    shares = np.bincount(taken, minlength=policy.num_exits) / len(taken)
    return float(times.of(policy.enabled, shares[None])[0])


def _share(among5: np.ndarray | None, exits: int | np.ndarray) -> float | None:
    """How often the target is among the best five, at one exit or at the one each image takes."""
    if among5 is None:
        return None
    return float(among5[np.arange(len(among5)), exits].mean())


def _kept(val, scored: Scores, policy: Policy, goal: Goal, cost: Cost, test) -> Kept:
    """What the guarantee gives on test, and what the plain choice for as many points gives."""
    plain = choose(val, dataclasses.replace(goal, risk=None, max_drop=goal.risk), cost)
    plain_scored = score_record(test, plain)
    return Kept(
        words=policy.guarantee["words"],
        lost=float(guarantees.losses_of(scored, [policy], goal.loss).mean()),
        plain=outcome(plain_scored, plain, cost)[0],
        plain_lost=float(guarantees.losses_of(plain_scored, [plain], goal.loss).mean()),
    )


def _over_cuts(trained, goal, cut_seed, cuts, times) -> Cuts:
    """The same choice over cut seeds `cut_seed` .. `cut_seed + cuts - 1`."""
    points, finals = [], []
    for seed in range(cut_seed, cut_seed + cuts):
        val, test, _, _ = val_and_test(trained, "test", seed)
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


def _exit_rows(val, test, alone, test_scored, taken, policy: Policy, cost: Cost):
    alone_val = overthinking.right_answers(val)
    shares = np.bincount(taken, minlength=policy.num_exits) / len(taken)
    targets = torch.from_numpy(test.targets)
    right = test_scored.right
    rows = []
    for index, name in enumerate(policy.exit_names):
        early = index < policy.num_exits - 1
        here = taken == index
        logits, temperature = test.exit_logits(index), policy.temperatures[index]
        before, after = (reliability(logits, targets, t) for t in (1.0, temperature))
        helped = right[:, -1] & ~right[:, index]
        rows.append(
            ExitRow(
                name=name,
                on=policy.is_on(index),
                threshold=finite(policy.thresholds[index]) if early else None,
                temperature=temperature,
                macs=cost.cumulative(policy.enabled)[index],
                macs_share=cost.shares(policy.enabled)[index],
                head_share=cost.head_macs[index] / cost.plain_macs,
                accuracy_val=float(alone_val[:, index].mean()),
                accuracy=float(alone[:, index].mean()),
                reliability_before=before,
                reliability=after,
                ece_before=expected_calibration_error(before),
                ece_after=expected_calibration_error(after),
                gain_auroc=auroc(-test_scored.scores[:, index], helped)
                if early and policy.is_on(index) else None,
                top5=_share(test_scored.among5, index) if policy.is_on(index) else None,
                taken=float(shares[index]),
                taken_accuracy=float(test_scored.right[here, index].mean()) if here.any() else None,
            )
        )
    return tuple(rows)


def _class_rows(scored: Scores, taken, policy: Policy, cost: Cost, names) -> tuple[ClassRow, ...]:
    """Test by true class."""
    right = scored.right[np.arange(len(taken)), taken]
    macs = np.asarray(cost.shares(policy.enabled))[taken]
    counts, rights, costs = (
        np.bincount(scored.targets, weights, len(names)) for weights in (None, right, macs)
    )
    return tuple(
        ClassRow(name, int(count), float(good / count), float(price / count))
        for name, count, good, price in zip(names, counts, rights, costs, strict=True) if count
    )


def _energy(network: MultiExitNetwork, taken, policy: Policy, cost: Cost):
    estimates = []
    for weights, found in energy.estimate(network, cost).items():
        mean = float(np.asarray(found.cumulative(policy.enabled))[taken].mean())
        estimates.append(EnergyEstimate(weights, plain=found.plain, test=mean))
    return tuple(estimates)


def _curve(val_scored, test_scored, policy: Policy, cost: Cost) -> tuple[CurvePoint, ...]:
    """Outcomes of shared thresholds, thinned evenly in val's MACs."""
    curve = thresholds.shared_curve(val_scored, policy.enabled, cost.cumulative(policy.enabled))
    points = []
    for index in thinned(curve):
        threshold = float(curve.thresholds[index])
        shared = policy.shared(threshold)
        test_point, taken = outcome(test_scored, shared, cost)
        points.append(
            CurvePoint(
                threshold=finite(threshold),
                val=Point(float(curve.accuracy[index]), float(curve.macs[index] / cost.plain_macs)),
                test=test_point,
                random=random_exit_accuracy(test_scored, taken),
            )
        )
    return tuple(points)


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


def _write(report, policy, scored, taken, alone, confused, data, directory, draw) -> Path:
    """Writes the evaluation's directory, whole, in place of an earlier one of its name."""
    images = {
        "accuracy_vs_macs.png": "Accuracy against multiply-adds",
        "share_per_exit.png": "Where images leave",
        "reliability.png": "Confidence and accuracy of each exit",
        "gallery.png": "The easiest and hardest images of each exit (wrong answers in bold)",
        "confusion.png": "Confusion of the exits where the final one is right, and wrong",
    }
    overthought = _overthought_rows(scored, alone, confused, policy, data) if draw else []
    if overthought:
        images["overthinking.png"] = (
            "Right early and wrong at the end: the early answer, then the final one"
        )
    with made_whole(directory) as partial:
        policy.save(partial / "policy.yaml")
        if draw:
            plots.accuracy_vs_macs(report, partial / "accuracy_vs_macs.png")
            plots.share_per_exit(report, partial / "share_per_exit.png")
            plots.reliability(report, partial / "reliability.png")
            rows = _gallery_rows(scored, taken, policy, data)
            plots.gallery(rows, partial / "gallery.png")
            plots.confusion(confused, alone[:, -1], partial / "confusion.png")
            if overthought:
                plots.gallery(overthought, partial / "overthinking.png")
        write_text(partial / "report.json", to_json(report))
        write_text(partial / "report.md", to_markdown(report, images if draw else {}))
    return directory


def _gallery_rows(scored: Scores, taken, policy: Policy, data: Data):
    """Per exit, the images that left there with the highest and the lowest scores."""
    rows = []
    for index, name in enumerate(policy.exit_names):
        here = np.flatnonzero(taken == index)
        order = here[np.argsort(-scored.scores[here, index], kind="stable")]
        half = len(order) // 2
        ends = (("easiest", order[: min(GALLERY_COLUMNS, half)]),)
        ends += (("hardest", order[::-1][: min(GALLERY_COLUMNS, len(order) - half)]),)
        for word, chosen in ends:
            row = []
            for image in chosen:
                answer, target = scored.answers[image, index], scored.targets[image]
                label = data.classes[answer]
                row.append((data.picture("test", int(image)), label, bool(answer == target)))
            rows.append((f"{name}\n{word}", row))
    return rows


def _overthought_rows(scored: Scores, right, confused, policy: Policy, data: Data):
    """Per early exit, images that it is the last one to answer rightly, the most confused first."""
    rows = []
    exits = right.shape[1] - 1
    last = exits - 1 - right[:, :-1][:, ::-1].argmax(axis=1)
    for index, name in enumerate(policy.exit_names[:-1]):
        lost = np.flatnonzero(~right[:, -1] & right[:, index] & (last == index))
        chosen = lost[np.argsort(-confused[lost], kind="stable")][:GALLERY_COLUMNS]
        row = []
        for image in chosen:
            target, final = scored.targets[image], scored.answers[image, -1]
            label = f"{data.classes[target]},\n{data.classes[final]}"
            row.append((data.picture("test", int(image)), label, False))
        rows.append((f"{name}\n{len(lost)} in all", row))
    return [row for row in rows if row[1]]


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
        + (f"\nplots:            {directory}/*.png" if list(directory.glob("*.png")) else "")
    )
    return "\n\n".join(parts)
