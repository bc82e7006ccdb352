"""What a report tells, worked out from the records of val and test and a policy."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from early_exit import guarantees, overthinking, thresholds
from early_exit.choosing import Goal, Point, choose, outcome, random_exit_accuracy, thinned
from early_exit.cost import Cost, count_macs
from early_exit.energy import Energy
from early_exit.experiment import Data, StaticNetwork
from early_exit.latency import StageTimes, Timing
from early_exit.metrics import auroc, expected_calibration_error, reliability
from early_exit.network import MultiExitNetwork
from early_exit.policy import Policy
from early_exit.records import ExitRecord, Scores, score_record
from early_exit.report import (
    ClassRow, CurvePoint, EnergyEstimate, ExitRow, Kept, Pace, Picture, Static, finite
)

COMPARABLE = 1.25  # static networks that cost more, in plain networks, are no alternative
PICTURES = 200  # of a gallery, at most
COLUMNS = 10
Row = tuple[str, list[Picture]]
"""A caption and pictures."""


def right_among5(among5: np.ndarray | None, exits: int | np.ndarray) -> float | None:
    """How often the target is among the best five, at one exit or at the one each image takes."""
    if among5 is None:
        return None
    return float(among5[np.arange(len(among5)), exits].mean())


def kept(val, scored: Scores, policy: Policy, goal: Goal, cost: Cost, test) -> Kept:
    """What the guarantee gives on test, and what the plain choice for as many points gives."""
    plain = choose(val, dataclasses.replace(goal, risk=None, max_drop=goal.risk), cost)
    plain_scored = score_record(test, plain)
    return Kept(
        words=policy.guarantee["words"],
        lost=float(guarantees.losses_of(scored, [policy], goal.loss).mean()),
        plain=outcome(plain_scored, plain, cost)[0],
        plain_lost=float(guarantees.losses_of(plain_scored, [plain], goal.loss).mean()),
    )


def exit_rows(
    val: ExitRecord, test: ExitRecord, alone, test_scored: Scores, taken, policy: Policy, cost: Cost
) -> tuple[ExitRow, ...]:
    """Every exit. alone: whether each exit on its own is right about each image of test."""
    alone_val = overthinking.right_answers(val)
    shares = shares_of(taken, policy)
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
                top5=right_among5(test_scored.among5, index) if policy.is_on(index) else None,
                taken=shares[index],
                taken_accuracy=float(test_scored.right[here, index].mean()) if here.any() else None,
            )
        )
    return tuple(rows)


def class_rows(scored: Scores, taken, policy: Policy, cost: Cost, names) -> tuple[ClassRow, ...]:
    """Test by true class."""
    right = scored.right[np.arange(len(taken)), taken]
    macs = np.asarray(cost.shares(policy.enabled))[taken]
    counts, rights, costs = (
        np.bincount(scored.targets, weights, len(names)) for weights in (None, right, macs)
    )
    left = np.zeros((len(names), policy.num_exits))
    np.add.at(left, (scored.targets, taken), 1)
    return tuple(
        ClassRow(
            name, int(count), float(good / count), float(price / count),
            tuple((exits / count).tolist()),
        )
        for name, count, good, price, exits in zip(names, counts, rights, costs, left, strict=True)
        if count
    )


def energies(
    estimated: Mapping[str, Energy], taken: np.ndarray, policy: Policy
) -> tuple[EnergyEstimate, ...]:
    """Of an image on average. estimated: by where the weights are."""
    return tuple(
        EnergyEstimate(
            weights,
            plain=found.plain,
            test=float(np.asarray(found.cumulative(policy.enabled))[taken].mean()),
        )
        for weights, found in estimated.items()
    )


def curve_points(
    val_scored: Scores, test_scored: Scores, policy: Policy, cost: Cost
) -> tuple[CurvePoint, ...]:
    """Outcomes of shared thresholds, thinned evenly in val's MACs, and the policy's own if the
    exits that are on share it."""
    curve = thresholds.shared_curve(val_scored, policy.enabled, cost.cumulative(policy.enabled))
    shown = set(curve.thresholds[thinned(curve)].tolist())
    if (own := shared_threshold(policy)) is not None:
        shown.add(own)
    points = []
    for threshold in sorted(shown, reverse=True):
        index = int(np.sum(curve.thresholds >= threshold)) - 1  # who leaves, leaves before this
        test_point, taken = outcome(test_scored, policy.shared(threshold), cost)
        points.append(
            CurvePoint(
                threshold=finite(threshold),
                val=Point(float(curve.accuracy[index]), float(curve.macs[index] / cost.plain_macs)),
                test=test_point,
                random=random_exit_accuracy(test_scored, taken),
                val_shares=tuple(curve.shares[index].tolist()),
                test_shares=shares_of(taken, policy),
            )
        )
    return tuple(points)


def shared_threshold(policy: Policy) -> float | None:
    """The threshold of all exits that are on; None where they differ or there are none."""
    found = {
        threshold for threshold, on in zip(policy.thresholds, policy.enabled, strict=True) if on
    }
    return found.pop() if len(found) == 1 else None


def shares_of(taken: np.ndarray, policy: Policy) -> tuple[float, ...]:
    """Share of the images that leaves at each exit."""
    return tuple((np.bincount(taken, minlength=policy.num_exits) / len(taken)).tolist())


def static_networks(
    known: Iterable[StaticNetwork], network: MultiExitNetwork, cost: Cost
) -> dict[str, tuple[Static, nn.Module]]:
    """What the report tells of the `known` networks that cost no more than 1.25 times the plain
    one, and the networks, untrained."""
    image = torch.empty(1, *network.image_shape, device="meta")
    found = {}
    for static in known:
        made = static.build().eval()
        share = count_macs(copy.deepcopy(made).to("meta"), image) / cost.plain_macs
        if share <= COMPARABLE:
            row = Static(static.name, static.accuracy, share, static.source)
            found[static.name] = row, made
    return found


def pace(
    times: StageTimes,
    timing: Timing,
    policy: Policy,
    curve: Sequence[CurvePoint],
    val_shares: tuple[float, ...],
    test_shares: tuple[float, ...],
) -> Pace:
    """What the curve's points take. times, timing: of one batch size, the former alone and the
    latter beside inference with exits; shares: of the policy."""

    def relative(shares) -> tuple[float, ...]:
        return tuple((times.of(policy.enabled, np.atleast_2d(shares)) / times.plain).tolist())

    return Pace(
        batch_size=times.batch_size,
        plain=timing.plain.total / timing.batches,
        val=relative([point.val_shares for point in curve]),
        test=relative([point.test_shares for point in curve]),
        alone=relative(np.eye(policy.num_exits)),
        chosen_val=relative(val_shares)[0],
        chosen_test=relative(test_shares)[0],
        statics={name: seconds / times.plain for name, seconds in times.others.items()},
    )


def gallery(scored: Scores, taken, policy: Policy, data: Data) -> list[Row]:
    """Per exit, the images that left there with the highest and the lowest scores."""
    rows = []
    columns = min(COLUMNS, max(3, PICTURES // (2 * len(np.unique(taken)))))
    for index, name in enumerate(policy.exit_names):
        here = np.flatnonzero(taken == index)
        order = here[np.argsort(-scored.scores[here, index], kind="stable")]
        half = len(order) // 2
        ends = (("easiest", order[: min(columns, half)]),)
        ends += (("hardest", order[::-1][: min(columns, len(order) - half)]),)
        for word, chosen in ends:
            row = []
            for image in chosen:
                answer, target = (
                    data.classes[number]
                    for number in (scored.answers[image, index], scored.targets[image])
                )
                words = f"{name}: {answer}, is {target}; score {scored.scores[image, index]:.3f}"
                pixels = data.picture("test", int(image))
                row.append(Picture(pixels, answer, answer == target, words))
            rows.append((f"{name}\n{word}", row))
    return [row for row in rows if row[1]]


def overthought(scored: Scores, right, confused, policy: Policy, data: Data) -> list[Row]:
    """Per early exit, images that it is the last one to answer rightly, the most confused first."""
    rows = []
    exits = right.shape[1] - 1
    if not exits:
        return []
    last = exits - 1 - right[:, :-1][:, ::-1].argmax(axis=1)
    for index, name in enumerate(policy.exit_names[:-1]):
        lost = np.flatnonzero(~right[:, -1] & right[:, index] & (last == index))
        chosen = lost[np.argsort(-confused[lost], kind="stable")][:COLUMNS]
        row = []
        for image in chosen:
            target, final = (
                data.classes[number]
                for number in (scored.targets[image], scored.answers[image, -1])
            )
            words = f"{name}: {target}, which is right; final: {final}"
            pixels = data.picture("test", int(image))
            row.append(Picture(pixels, f"{target},\n{final}", False, words))
        rows.append((f"{name}\n{len(lost)} in all", row))
    return [row for row in rows if row[1]]
