"""The choice of a policy for a goal, from the record of val alone."""

import dataclasses

import numpy as np
import torch

from early_exit.choosing import cdl, guarantees
from early_exit.choosing.calibration import fit_temperature
from early_exit.choosing.curve import Curve, for_budget, for_latency, for_max_drop, shared_curve
from early_exit.choosing.goals import (
    Budget,
    ConditionalDeepLearning,
    FixedPolicy,
    FixedThresholds,
    Goal,
    LatencyBudget,
    MaxDrop,
    Risk,
    check_given,
    one_each,
    timed_batch,
)
from early_exit.choosing.guarantees import Guarantee
from early_exit.choosing.record import ExitRecord, Scores, score_record
from early_exit.choosing.search import (
    Objective,
    Pricing,
    cheapest,
    exits_that_pay,
    most_accurate,
    shortlist,
    subset_that_pays,
)
from early_exit.inference.criteria import get_traits
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segment_times import SegmentTimes, all_spans
from early_exit.inference.segments import spans
from early_exit.model.cost import Cost

CURVE_POINTS = 200  # of all outcomes on val, how many a report keeps and a guarantee looks at
FIT_SHARE = 0.2  # of val, if a guarantee is wanted; the rest certifies


def spans_to_time(val: ExitRecord, goal: Goal, cost: Cost, most: int) -> list[tuple[int, int]]:
    """The segments that are worth measuring for a goal in seconds, each as the indices of its first
    and its last stage.

    They are those between at most `most` early exits, which serve the goal best if multiply-adds
    are its price. If the criterion keeps all exits enabled, they are the segments of that policy.
    """
    num_exits = len(val.info.exit_names)
    if keeps_all_exits(goal.criterion):
        return spans((True,) * (num_exits - 1))
    scored, _ = _scored(val, goal)
    match goal:
        case MaxDrop(drop=drop):
            objective = cheapest(scored.correct[:, -1].mean() - drop)
        case LatencyBudget(limit=limit, of_plain=True):
            objective = most_accurate(limit * cost.plain_macs)
        case _:  # no share of the plain network is known to be wanted
            objective = most_accurate(0.5 * cost.plain_macs)
    candidates = np.flatnonzero(shortlist(scored, cost.mean_macs, objective, most)).tolist()
    return all_spans(candidates, num_exits)


def keeps_all_exits(criterion: str) -> bool:
    """Whether no exit is disabled under a criterion: its scores or answers depend on the exits
    before, or it needs several exits."""
    traits = get_traits(criterion)
    return traits.keeps_state or traits.min_early_exits > 1


def choose(val: ExitRecord, goal: Goal, cost: Cost, times: SegmentTimes | None = None) -> Policy:
    """The policy that reaches the goal, from val alone.

    times: for a goal that counts seconds. Raises UserError if the goal cannot be reached, or if the
    criterion does not fit the exits.
    """
    check_given(goal, val.num_classes, val.info.exit_names)
    match goal:
        case Risk():
            return _certified(val, goal, cost)
        case FixedPolicy(policy=policy):
            return dataclasses.replace(policy, guarantee=None)
        case FixedThresholds(thresholds=given):
            policy = calibrated(val, goal)
            return dataclasses.replace(policy, thresholds=one_each(given, policy.num_exits))
        case ConditionalDeepLearning():
            policy = calibrated(val, goal)
            stages = cdl.admit(score_record(val, policy), cost, goal.delta, goal.epsilon)
            policy = dataclasses.replace(policy, enabled=cdl.enabled(stages))
            return policy.with_threshold(goal.delta)
        case MaxDrop(drop=drop):
            scored, policy = _scored(val, goal)
            objective = cheapest(scored.correct[:, -1].mean() - drop)
            enabled, curve, price = _select(scored, policy, cost, times, goal, objective)
            threshold = for_max_drop(curve, drop, price)
        case Budget():
            scored, policy = _scored(val, goal)
            limit = goal.share * cost.plain_macs
            enabled, curve, _ = _select(scored, policy, cost, times, goal, most_accurate(limit))
            threshold = for_budget(curve, limit)
        case LatencyBudget():
            scored, policy = _scored(val, goal)
            limit = goal.seconds(_needed(times))
            enabled, curve, price = _select(scored, policy, cost, times, goal, most_accurate(limit))
            threshold = for_latency(curve, price, limit)
        case _:
            raise TypeError(f"choose one of Goal's subclasses, got {type(goal).__name__}")
    return dataclasses.replace(policy, enabled=enabled).with_threshold(threshold)


def calibrated(val: ExitRecord, goal: Goal) -> Policy:
    """The goal's criterion with temperatures fitted on val; no row exits early yet."""
    names, targets = val.info.exit_names, torch.from_numpy(val.targets)
    temperatures = tuple(
        fit_temperature(val.exit_logits(index), targets) if goal.calibrate else 1.0
        for index in range(len(names))
    )
    return Policy(
        exit_names=names,
        thresholds=(NEVER,) * (len(names) - 1),
        criterion=goal.criterion,
        temperatures=temperatures,
    )


def _scored(val: ExitRecord, goal: Goal) -> tuple[Scores, Policy]:
    policy = calibrated(val, goal)
    return score_record(val, policy), policy


def _needed(times: SegmentTimes | None) -> SegmentTimes:
    if times is None:
        raise ValueError("a goal that counts seconds needs the times of the segments")
    return times


def _select(
    scored: Scores,
    policy: Policy,
    cost: Cost,
    times: SegmentTimes | None,
    goal: Goal,
    objective: Objective,
) -> tuple[tuple[bool, ...], Curve, np.ndarray]:
    """Which exits to enable, the curve of a shared threshold for them, and the price (P,) of its
    points: seconds if the goal counts them, MACs if not."""
    if timed_batch(goal) is None:
        enabled = _enabled(scored, policy, cost.mean_macs, objective)
    else:
        enabled = _enabled(scored, policy, _needed(times).of, objective, times)
    curve = shared_curve(scored, enabled, cost.cumulative(enabled))
    price = curve.macs if timed_batch(goal) is None else _needed(times).of(enabled, curve.shares)
    return enabled, curve, price


def _enabled(
    scored: Scores,
    policy: Policy,
    pricing: Pricing,
    objective: Objective,
    times: SegmentTimes | None = None,
) -> tuple[bool, ...]:
    """The exits that pay; all of them under a criterion that keeps all. times: only exits that it
    has measured can be enabled."""
    if keeps_all_exits(policy.criterion):
        return policy.enabled
    if times is None:
        return exits_that_pay(scored, pricing, objective)
    candidates = tuple(map(times.allows, range(len(policy.enabled))))
    return subset_that_pays(scored, pricing, objective, candidates)


def _certified(val: ExitRecord, goal: Risk, cost: Cost) -> Policy:
    """The cheapest policy whose risk is certified. The candidates are fitted on a random fifth of
    val; the rest certifies."""
    fit, certify = (val.subset(rows, "val", val.info.split_hash) for rows in fit_and_certify(val))
    policies = candidates(fit, goal, cost)
    scored = score_record(certify, policies[0])
    lost = guarantees.losses_of(scored, policies, goal.loss)
    if goal.confidence is None:
        last = guarantees.on_average(lost, goal.risk)
    else:
        last = guarantees.with_confidence(lost, goal.risk, goal.confidence)
    policy, losses = policies[last], int(lost[last].sum())
    if last == 0 and not keeps_all_exits(policy.criterion):
        # no image exits early: without the heads the same answers cost less
        policy = dataclasses.replace(policy, enabled=(False,) * len(policy.enabled))
    guarantee = Guarantee(
        risk=goal.risk,
        confidence=goal.confidence,
        loss=goal.loss,
        images=len(certify),
        losses=losses,
        data=f"drawn at random, seed 0, from val {val.info.split_hash}",
    )
    return dataclasses.replace(
        policy, guarantee={**dataclasses.asdict(guarantee), "words": str(guarantee)}
    )


def fit_and_certify(val: ExitRecord) -> tuple[np.ndarray, np.ndarray]:
    """The val images that the candidates of a guarantee are fitted on, and those that certify."""
    order = np.random.default_rng(0).permutation(len(val))
    cut = max(1, round(FIT_SHARE * len(val)))
    return np.sort(order[:cut]), np.sort(order[cut:])


def candidates(fit: ExitRecord, goal: Goal, cost: Cost) -> list[Policy]:
    """Policies with one threshold for all exits, from no exit taken to all taken, evenly in MACs.

    Temperatures, and for `Risk` the exits that pay at that loss, are fitted on `fit`.
    """
    scored, policy = _scored(fit, goal)
    if isinstance(goal, Risk):
        by_loss = guarantees.with_losses_as_errors(scored, goal.loss)  # the loss that is certified
        enabled = _enabled(by_loss, policy, cost.mean_macs, cheapest(1 - goal.risk))
        policy = dataclasses.replace(policy, enabled=enabled)
    curve = shared_curve(scored, policy.enabled, cost.cumulative(policy.enabled))
    return [policy.with_threshold(float(at)) for at in curve.thresholds[thinned(curve)]]


def thinned(curve: Curve) -> list[int]:
    """Indices of at most `CURVE_POINTS` points of a curve, evenly in its MACs."""
    wanted = np.linspace(curve.macs[0], curve.macs[-1], CURVE_POINTS)
    after = np.searchsorted(-curve.macs, -wanted).clip(max=len(curve.macs) - 1)
    before = (after - 1).clip(0)
    nearer = np.abs(curve.macs[before] - wanted) <= np.abs(curve.macs[after] - wanted)
    return list(dict.fromkeys(np.where(nearer, before, after).tolist()))
