"""Goals: what a policy is chosen for, and the choice, from the record of val alone."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from early_exit.choosing import cdl, guarantees
from early_exit.choosing.calibration import fit_temperature
from early_exit.choosing.curve import Curve, for_budget, for_latency, for_max_drop, shared_curve
from early_exit.choosing.guarantees import Guarantee
from early_exit.choosing.record import ExitRecord, Scores, score_record
from early_exit.choosing.search import (
    Objective,
    Pricing,
    cheapest,
    exits_that_pay,
    most_accurate,
    shortlist,
)
from early_exit.errors import UserError
from early_exit.inference.criteria import check_threshold, get_traits
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segment_times import SegmentTimes
from early_exit.model.cost import Cost

CURVE_POINTS = 200  # of all outcomes on val, how many a report keeps and a guarantee looks at
FIT_SHARE = 0.2  # of val, if a guarantee is wanted; the rest certifies


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a policy is chosen for; use one of the subclasses."""

    criterion: str = "max_prob"
    """Name of the exit criterion."""
    calibrate: bool = True
    """Whether a temperature per exit is fitted."""

    def __post_init__(self) -> None:
        get_traits(self.criterion)


@dataclass(frozen=True)
class MaxDrop(Goal):
    """The cheapest policy that loses at most `drop` accuracy against the final exit."""

    drop: float
    """A fraction: 0.005 is half a point."""
    minimise: str = "macs"
    """What is cheap: `macs` or `seconds`."""
    batch_size: int = 1
    """For seconds: images per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise UserError(f"--max-drop is {100 * self.drop:g} points; it must be in 0 to 100")
        if self.minimise not in ("macs", "seconds"):
            raise UserError(f"--minimise is macs or seconds, got {self.minimise!r}")
        _check_batch_size(self.batch_size)

    def __str__(self) -> str:
        words = f"max drop {100 * self.drop:g} points"
        return words if self.minimise == "macs" else f"{words}, seconds at batch {self.batch_size}"


@dataclass(frozen=True)
class Budget(Goal):
    """The most accurate policy within a budget of multiply-adds."""

    share: float
    """Of the plain network's MACs: 0.5 is half of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.share > 0:
            raise UserError(f"--budget is {100 * self.share:g} %; it must be positive")

    def __str__(self) -> str:
        return f"budget {100 * self.share:g} % of MACs"


@dataclass(frozen=True)
class LatencyBudget(Goal):
    """The most accurate policy within a budget of seconds per batch."""

    limit: float
    """Seconds, or with `of_plain` a share of the plain network's seconds."""
    of_plain: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit > 0:
            raise UserError(f"--latency-budget must be positive, got {self.limit:g}")
        _check_batch_size(self.batch_size)

    def seconds(self, times: SegmentTimes) -> float:
        """The seconds allowed per batch."""
        return self.limit * times.plain if self.of_plain else self.limit

    def __str__(self) -> str:
        limit = f"{1000 * self.limit:g} ms"
        if self.of_plain:
            limit = f"{100 * self.limit:g} % of the seconds"
        return f"latency {limit} at batch {self.batch_size}"


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"--latency-batch must be at least 1, got {batch_size}")


@dataclass(frozen=True)
class FixedThresholds(Goal):
    """Given thresholds."""

    thresholds: tuple[float, ...]
    """One for all early exits, or one each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for threshold in self.thresholds:
            check_threshold(self.criterion, threshold, "--thresholds")

    def __str__(self) -> str:
        return "thresholds " + " ".join(f"{value:g}" for value in self.thresholds)


@dataclass(frozen=True)
class FixedPolicy(Goal):
    """A given policy. A guarantee that it has is dropped: it may not hold for this network."""

    policy: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "criterion", self.policy.criterion)
        object.__setattr__(self, "calibrate", any(t != 1 for t in self.policy.temperatures))

    def __str__(self) -> str:
        return "given policy"


@dataclass(frozen=True)
class Risk(Goal):
    """The cheapest policy whose risk is guaranteed (`early_exit.choosing.guarantees`)."""

    risk: float
    """The mean loss against the full network is at most this fraction."""
    confidence: float | None = 0.95
    """The probability with which that holds; None: it holds on average."""
    loss: str = "wrong"
    """Name of the loss (`early_exit.choosing.guarantees.LOSSES`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--risk", self.risk), ("--confidence", self.confidence)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"{flag} is {100 * value:g}; it must be between 0 and 100")
        if self.confidence is not None and self.confidence <= 0.01:
            raise UserError(
                f"--confidence is in percent, got {100 * self.confidence:g}; try"
                f" {10000 * self.confidence:g}"
            )
        if self.loss not in guarantees.LOSSES:
            raise UserError(
                f"there is no loss {self.loss!r}; choose one of {', '.join(guarantees.LOSSES)}"
            )

    def __str__(self) -> str:
        how = "average" if self.confidence is None else f"{100 * self.confidence:g} %"
        return f"risk {100 * self.risk:g} points {self.loss} {how}"


@dataclass(frozen=True)
class ConditionalDeepLearning(Goal):
    """CDL's choice of stages (`early_exit.choosing.cdl`), on uncalibrated probabilities."""

    delta: float
    """The confidence at which an image exits."""
    epsilon: float = 0.0
    """What the gain of a stage must exceed, as a share of the plain network's MACs."""
    calibrate: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion != Goal.criterion:
            raise UserError(f"--delta is a probability; remove --criterion {self.criterion}")
        if not 0.5 <= self.delta < 1:
            percent = 0.5 <= self.delta / 100 < 1
            hint = f"; try --delta {self.delta / 100:g}" if percent else ""
            raise UserError(f"--delta must be in 0.5 to below 1, got {self.delta:g}{hint}")
        if not 0 <= self.epsilon < math.inf:
            raise UserError(f"--epsilon must be at least 0, got {100 * self.epsilon:g}")

    def __str__(self) -> str:
        return f"delta {self.delta:g} epsilon {100 * self.epsilon:g} % of MACs"


def check_given(goal: Goal, num_classes: int, exit_names: Sequence[str]) -> None:
    """Raises UserError if the thresholds or the policy that a goal gives do not fit the network, or
    if a threshold is one that no score, or every score, reaches."""
    early_exits = len(exit_names) - 1
    match goal:
        case FixedThresholds(thresholds=given):
            for threshold in one_each(given, len(exit_names)):
                check_threshold(goal.criterion, threshold, "--thresholds", num_classes, early_exits)
        case ConditionalDeepLearning(delta=delta):
            check_threshold(goal.criterion, delta, "--delta", num_classes, early_exits)
        case FixedPolicy(policy=policy):
            policy.check_exits(exit_names, "the network")
            policy.check_thresholds(num_classes)


def timed_batch(goal: Goal) -> int | None:
    """The batch size at which a goal counts seconds; None if it counts none."""
    match goal:
        case LatencyBudget(batch_size=batch_size):
            return batch_size
        case MaxDrop(minimise="seconds", batch_size=batch_size):
            return batch_size
    return None


def exits_to_time(val: ExitRecord, goal: Goal, cost: Cost, most: int) -> list[int]:
    """The early exits, at most `most`, whose segments are worth measuring for a goal in seconds:
    those that serve it best if multiply-adds are its price."""
    scored, _ = _scored(val, goal)
    match goal:
        case MaxDrop(drop=drop):
            objective = cheapest(scored.correct[:, -1].mean() - drop)
        case LatencyBudget(limit=limit, of_plain=True):
            objective = most_accurate(limit * cost.plain_macs)
        case _:  # no share of the plain network is known to be wanted
            objective = most_accurate(0.5 * cost.plain_macs)
    traits = get_traits(goal.criterion)
    if traits.keeps_state or traits.min_early_exits > 1:  # all of them are enabled
        return list(range(len(val.info.exit_names) - 1))
    return np.flatnonzero(shortlist(scored, cost.mean_macs, objective, most)).tolist()


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


def one_each(thresholds: tuple[float, ...], num_exits: int) -> tuple[float, ...]:
    """One threshold for all early exits, or one each, as `num_exits - 1` numbers."""
    if len(thresholds) == 1:
        thresholds = thresholds * (num_exits - 1)
    if len(thresholds) != num_exits - 1:
        raise UserError(
            f"got {len(thresholds)} thresholds for {num_exits - 1} early exits; give one, or one"
            " each"
        )
    return tuple(map(float, thresholds))


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
    """The exits that pay; all of them if a score depends on the exits before, or if the criterion
    needs several exits. times: only exits that it has measured can be enabled."""
    traits = get_traits(policy.criterion)
    if traits.keeps_state or traits.min_early_exits > 1:
        return policy.enabled
    candidates = (
        policy.enabled if times is None else tuple(map(times.allows, range(len(policy.enabled))))
    )
    return exits_that_pay(scored, pricing, objective, candidates)


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
    if last == 0 and get_traits(policy.criterion).min_early_exits <= 1:
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
