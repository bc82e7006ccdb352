"""The values of a report, computed from records and outcomes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from early_exit.choosing import guarantees
from early_exit.choosing.choice import choose, thinned
from early_exit.choosing.curve import shared_curve
from early_exit.choosing.goals import Goal, LatencyBudget, MaxDrop, Risk
from early_exit.choosing.outcome import Outcome, Point, apply_policy, outcome_of
from early_exit.choosing.record import ExitRecord
from early_exit.evaluation.report import (
    ClassRow,
    CurvePoint,
    EnergyEstimate,
    ExitRow,
    GuaranteeResult,
    Picture,
    StaticRow,
    finite,
)
from early_exit.evaluation.report_seconds import CurveSeconds, LatencyResult
from early_exit.inference.latency import Timing
from early_exit.inference.segment_times import SegmentTimes
from early_exit.metrics import auroc, expected_calibration_error, in_top5, reliability
from early_exit.model.cost import Cost, count_macs, meta_copy
from early_exit.model.energy import Energy
from early_exit.model.network import MultiExitNetwork
from early_exit.task import StaticNetwork
from early_exit.trained import Splits

# static networks that cost more than this many times the plain network are not shown, but for the
# smallest if all do
COMPARABLE = 1.25
MAX_PICTURES = 200  # of a gallery
COLUMNS = 10
Row = tuple[str, list[Picture]]
"""A caption and pictures."""


def top5_accuracy(correct: np.ndarray | None, exits: np.ndarray) -> float | None:
    """The top-5 accuracy at the exit that each image takes. correct: (images, exits) whether the
    target is among the five most probable classes."""
    if correct is None:
        return None
    return float(correct[np.arange(len(correct)), exits].mean())


def exit_rows(splits: Splits, outcome: Outcome) -> tuple[ExitRow, ...]:
    """One row per exit. outcome: of test."""
    return tuple(
        _exit_row(
            index,
            splits.test,
            outcome,
            float(splits.correct_val[:, index].mean()),
            float(splits.correct_test[:, index].mean()),
        )
        for index in range(outcome.policy.num_exits)
    )


def _exit_row(
    index: int, test: ExitRecord, outcome: Outcome, accuracy_val: float, accuracy: float
) -> ExitRow:
    policy, cost, scored = outcome.policy, outcome.cost, outcome.scored
    early, enabled = index < policy.num_exits - 1, policy.is_enabled(index)
    here, correct = outcome.exit_index == index, scored.correct
    logits, targets = test.exit_logits(index), torch.from_numpy(test.targets)
    before, after = (reliability(logits, targets, t) for t in (1.0, policy.temperatures[index]))
    continuing_helps = correct[:, -1] & ~correct[:, index]
    has_top5 = enabled and scored.in_top5 is not None
    return ExitRow(
        name=policy.exit_names[index],
        enabled=enabled,
        threshold=finite(policy.thresholds[index]) if early else None,
        temperature=policy.temperatures[index],
        macs=cost.cumulative(policy.enabled)[index],
        macs_share=cost.shares(policy.enabled)[index],
        head_share=cost.head_macs[index] / cost.plain_macs,
        accuracy_val=accuracy_val,
        accuracy=accuracy,
        reliability_before=before,
        reliability=after,
        ece_before=expected_calibration_error(before),
        ece_after=expected_calibration_error(after),
        continuing_auroc=(
            auroc(-scored.scores[:, index], continuing_helps) if early and enabled else None
        ),
        top5=float(in_top5(logits, targets).double().mean()) if has_top5 else None,
        exited=outcome.exit_shares[index],
        exited_accuracy=float(correct[here, index].mean()) if here.any() else None,
    )


def class_rows(outcome: Outcome, names: Sequence[str]) -> tuple[ClassRow, ...]:
    """Test by true class; classes without test images are omitted."""
    targets, exit_index = outcome.scored.targets, outcome.exit_index
    shares = np.asarray(outcome.cost.shares(outcome.policy.enabled))[exit_index]
    images, correct, macs = (
        np.bincount(targets, weights, len(names)) for weights in (None, outcome.correct, shares)
    )
    exits = np.zeros((len(names), outcome.policy.num_exits))
    np.add.at(exits, (targets, exit_index), 1)
    return tuple(
        ClassRow(
            name,
            int(images[index]),
            float(correct[index] / images[index]),
            float(macs[index] / images[index]),
            tuple((exits[index] / images[index]).tolist()),
        )
        for index, name in enumerate(names)
        if images[index]
    )


def energies(estimates: Mapping[str, Energy], outcome: Outcome) -> tuple[EnergyEstimate, ...]:
    """The mean energy per image. estimates: by where the weights are read from."""
    return tuple(
        EnergyEstimate(
            weights,
            plain=energy.plain,
            test=float(
                np.asarray(energy.cumulative(outcome.policy.enabled))[outcome.exit_index].mean()
            ),
        )
        for weights, energy in estimates.items()
    )


def curve_points(val: Outcome, test: Outcome) -> tuple[CurvePoint, ...]:
    """Outcomes of shared thresholds, thinned evenly in val's MACs, and the policy's own if the
    enabled exits share it."""
    policy, cost = val.policy, val.cost
    curve = shared_curve(val.scored, policy.enabled, cost.cumulative(policy.enabled))
    thresholds = set(curve.thresholds[thinned(curve)].tolist())
    if (own := policy.shared_threshold) is not None:
        thresholds.add(own)
    points = []
    for threshold in sorted(thresholds, reverse=True):
        # the last threshold of the curve that is not below this one has the same outcome
        index = int(np.sum(curve.thresholds >= threshold)) - 1
        on_test = outcome_of(test.scored, policy.with_threshold(threshold), cost)
        points.append(
            CurvePoint(
                threshold=finite(threshold),
                val=Point(float(curve.accuracy[index]), float(curve.macs[index] / cost.plain_macs)),
                test=on_test.point,
                random=on_test.random_exit_accuracy,
                val_shares=tuple(curve.shares[index].tolist()),
                test_shares=on_test.exit_shares,
            )
        )
    return tuple(points)


def guarantee_result(
    val: Outcome, test: Outcome, splits: Splits, goal: Goal
) -> GuaranteeResult | None:
    """What a guarantee gives on test, beside the choice for the same drop without one."""
    if not isinstance(goal, Risk) or not test.policy.guarantee:
        return None
    same_drop = MaxDrop(goal.risk, criterion=goal.criterion, calibrate=goal.calibrate)
    policy = choose(splits.val, same_drop, test.cost)
    without = apply_policy(policy, splits.test, test.cost)
    lost, without_lost = (
        float(guarantees.losses_of(outcome.scored, [outcome.policy], goal.loss).mean())
        for outcome in (test, without)
    )
    return GuaranteeResult(test.policy.guarantee["words"], lost, without.point, without_lost)


def latency_result(
    times: SegmentTimes | None, goal: Goal, val: Outcome, test: Outcome
) -> LatencyResult | None:
    """What a goal in seconds allowed, and the time expected on val and test."""
    if times is None:
        return None
    expected = times.of(val.policy.enabled, np.array([val.exit_shares, test.exit_shares]))
    budget = goal.seconds(times) if isinstance(goal, LatencyBudget) else None
    return LatencyResult(times.batch_size, budget, times.plain, *expected.tolist())


def static_networks(
    known: Iterable[StaticNetwork], network: MultiExitNetwork, cost: Cost
) -> list[tuple[StaticRow, nn.Module]]:
    """The `known` networks that cost at most `COMPARABLE` times the plain one, or the smallest if
    none does; each with the network, untrained."""
    image = torch.empty(1, *network.image_shape, device="meta")
    rows = []
    for static in known:
        built = static.build().eval()
        share = count_macs(meta_copy(built), image) / cost.plain_macs
        rows.append((StaticRow(static.name, static.accuracy, share, static.source), built))
    rows.sort(key=lambda pair: pair[0].macs_share)
    comparable = [pair for pair in rows if pair[0].macs_share <= COMPARABLE]
    return comparable or rows[:1]


def curve_seconds(
    segments: SegmentTimes,
    timing: Timing,
    curve: Sequence[CurvePoint],
    val: Outcome,
    test: Outcome,
) -> CurveSeconds:
    """The time of the curve's points. segments, timing: at one batch size; the former measures
    segments alone, the latter whole inference."""

    def relative(shares: Any) -> tuple[float, ...]:
        seconds = segments.of(val.policy.enabled, np.atleast_2d(shares))
        return tuple((seconds / segments.plain).tolist())

    return CurveSeconds(
        batch_size=segments.batch_size,
        plain=timing.plain.total / timing.batches,
        val=relative([point.val_shares for point in curve]),
        test=relative([point.test_shares for point in curve]),
        at_exit=relative(np.eye(val.policy.num_exits)),
        chosen_val=relative([val.exit_shares])[0],
        chosen_test=relative([test.exit_shares])[0],
        static_networks={
            name: took.total / timing.plain.total for name, took in timing.networks.items()
        },
    )


def galleries(outcome: Outcome, splits: Splits) -> dict[str, list[Row]]:
    """The galleries of a report by their id: `gallery` and `overthinking`."""
    return {
        "gallery": gallery(outcome, splits),
        "overthinking": overthought(outcome, splits),
    }


def gallery(outcome: Outcome, splits: Splits) -> list[Row]:
    """Per exit, the images that exited there with the highest and the lowest scores."""
    scored, exit_index = outcome.scored, outcome.exit_index
    columns = min(COLUMNS, max(3, MAX_PICTURES // (2 * len(np.unique(exit_index)))))
    rows = []
    for index, name in enumerate(outcome.policy.exit_names):
        here = np.flatnonzero(exit_index == index)
        order = here[np.argsort(-scored.scores[here, index], kind="stable")]
        half = len(order) // 2
        for word, chosen in (
            ("easiest", order[: min(columns, half)]),
            ("hardest", order[::-1][: min(columns, len(order) - half)]),
        ):
            row = [_exit_picture(image, index, outcome, splits) for image in chosen.tolist()]
            rows.append((f"{name}\n{word}", row))
    return [row for row in rows if row[1]]


def _exit_picture(image: int, index: int, outcome: Outcome, splits: Splits) -> Picture:
    scored, classes = outcome.scored, splits.data.classes
    answered, true = scored.answers[image, index], scored.targets[image]
    answer, target = classes[answered], classes[true]  # two classes may have one name
    name, score = outcome.policy.exit_names[index], scored.scores[image, index]
    words = f"{name}: answer {answer}, target {target}; score {score:.3f}"
    return Picture(splits.data.picture("test", image), answer, bool(answered == true), words)


def overthought(outcome: Outcome, splits: Splits) -> list[Row]:
    """Images that the final exit gets wrong, per the last early exit that is right, the most
    confused first."""
    correct, confused = splits.correct_test, splits.confusion
    num_early = correct.shape[1] - 1
    if not num_early:
        return []
    rows, own = [], splits.test.exit_logits(-1).argmax(dim=1)  # the final exit's answers
    last_correct = num_early - 1 - correct[:, :-1][:, ::-1].argmax(axis=1)
    for index, name in enumerate(outcome.policy.exit_names[:-1]):
        lost = np.flatnonzero(~correct[:, -1] & correct[:, index] & (last_correct == index))
        chosen = lost[np.argsort(-confused[lost], kind="stable")][:COLUMNS]
        row = [
            _overthought_picture(image, name, int(own[image]), outcome, splits)
            for image in chosen.tolist()
        ]
        rows.append((f"{name}\n{len(lost)} in all", row))
    return [row for row in rows if row[1]]


def _overthought_picture(
    image: int, name: str, answer: int, outcome: Outcome, splits: Splits
) -> Picture:
    classes = splits.data.classes
    target, final = classes[outcome.scored.targets[image]], classes[answer]
    words = f"{name}: {target}, which is right; final: {final}"
    return Picture(splits.data.picture("test", image), f"{target},\n{final}", False, words)
