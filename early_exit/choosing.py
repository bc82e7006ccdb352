"""Choosing who leaves: from a goal and the record of val to a policy.

Everything is fitted on the record that is given; `choose` is given val and nothing else.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from early_exit import cdl, guarantees, search, thresholds
from early_exit.calibration import fit_temperature
from early_exit.cost import Cost
from early_exit.criteria import get_criterion
from early_exit.errors import UserError
from early_exit.guarantees import Guarantee
from early_exit.latency import StageTimes
from early_exit.policy import NEVER, Policy, as_thresholds
from early_exit.records import ExitRecord, Scores, score_record

CURVE_POINTS = 200  # of all outcomes on val, how many a report keeps and a guarantee looks at
FIT_SHARE = 0.2  # of val, where a guarantee is asked for; the rest certifies


@dataclass(frozen=True)
class Point:
    """A policy's outcome on a sample."""

    accuracy: float
    macs_share: float


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the thresholds are chosen for; exactly one of `max_drop`, `budget`, `thresholds`,
    `policy`, `latency`, `delta` and `risk` is given."""

    max_drop: float | None = None
    """Fraction of accuracy given up against the final exit, on val: 0.005 is half a point."""
    budget: float | None = None
    """Share of the plain network's MACs, on val: 0.5 is half of them."""
    thresholds: tuple[float, ...] | None = None
    """One for all early exits, or one each."""
    policy: Policy | None = None
    """Given whole, with criterion and temperatures; a guarantee that it had is not taken over."""
    latency: tuple[float, str] | None = None
    """What a batch may take: seconds and "s", or a share of the plain network's and "share"."""
    delta: float | None = None
    """Conditional Deep Learning: the confidence at which an image stops (`early_exit.cdl`)."""
    epsilon: float = 0.0
    """Of `delta`: what a stage's gain must exceed, as a share of the plain network's MACs."""
    latency_batch: int = 1
    """Of `latency`: images in a batch."""
    risk: float | None = None
    """Guaranteed: the mean loss against the full network is at most this fraction."""
    confidence: float | None = 0.95
    """Of `risk`: the probability with which it holds; None: it holds on average."""
    loss: str = "wrong"
    """Of `risk`: which loss (`early_exit.guarantees.LOSSES`)."""
    per_exit: bool = False
    """A threshold for each exit, instead of one for all."""
    criterion: str = "max_prob"
    calibrate: bool = True

    def __post_init__(self) -> None:
        goals = [
            self.max_drop, self.budget, self.thresholds, self.policy, self.latency, self.risk,
            self.delta,
        ]
        if sum(value is not None for value in goals) != 1:
            raise UserError(
                "choose one of --max-drop, --budget, --latency-budget, --thresholds, --policy,"
                " --risk and --delta"
            )
        get_criterion(self.criterion)
        if self.policy is not None:
            object.__setattr__(self, "criterion", self.policy.criterion)
            object.__setattr__(self, "calibrate", any(t != 1 for t in self.policy.temperatures))
        given = self.policy.thresholds if self.policy else self.thresholds
        if -math.inf in (given or ()):
            raise UserError("a threshold is minus infinity; give a number below every score")
        if self.latency_batch < 1:
            raise UserError(f"--latency-batch must be at least 1, got {self.latency_batch}")
        if self.latency and self.latency[0] <= 0:
            raise UserError("--latency-budget must be positive")
        if self.per_exit and self.given:
            raise UserError(
                "--per-exit searches, and --thresholds, --policy and --delta give; drop one"
            )
        if self.delta is not None and self.criterion != "max_prob":
            raise UserError(f"--delta is a probability; drop --criterion {self.criterion}")
        if self.delta is not None and not 0.5 <= self.delta < 1:
            raise UserError(f"--delta lies in 0.5 to below 1, got {self.delta:g}")
        if not 0 <= self.epsilon < math.inf:
            raise UserError(f"--epsilon must be at least 0, got {100 * self.epsilon:g}")
        for flag, value in (("--risk", self.risk), ("--confidence", self.confidence)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"{flag} is {100 * value:g}; it lies between 0 and 100")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise UserError(f"--max-drop is {100 * self.max_drop:g} points; it lies in 0 to 100")
        if self.budget is not None and self.budget <= 0:
            raise UserError(f"--budget is {100 * self.budget:g} %; it must be positive")

    @property
    def given(self) -> bool:
        """Whether the thresholds are given and not chosen."""
        return any(value is not None for value in (self.thresholds, self.policy, self.delta))

    def __str__(self) -> str:
        each = " per exit" if self.per_exit else ""
        if self.max_drop is not None:
            return f"max drop {100 * self.max_drop:g} points{each}"
        if self.budget is not None:
            return f"budget {100 * self.budget:g} % of MACs{each}"
        if self.latency:
            value, unit = self.latency
            words = f"{1000 * value:g} ms" if unit == "s" else f"{100 * value:g} % of the seconds"
            return f"latency {words} at batch {self.latency_batch}{each}"
        if self.delta is not None:
            return f"delta {self.delta:g} epsilon {100 * self.epsilon:g} % of MACs"
        if self.risk is not None:
            how = "average" if self.confidence is None else f"{100 * self.confidence:g} %"
            return f"risk {100 * self.risk:g} points {self.loss} {how}{each}"
        if self.policy is not None:
            return "given policy"
        return "thresholds " + " ".join(f"{value:g}" for value in self.thresholds)


def choose(
    val: ExitRecord, goal: Goal, cost: Cost, times: StageTimes | None = None
) -> Policy:
    """The policy that reaches the goal, from val alone; times: for a goal of latency.

    Raises UserError where the goal cannot be reached or the criterion does not fit the exits.
    """
    if goal.risk is not None:
        return _guaranteed(val, goal, cost)
    if goal.policy is not None:
        goal.policy.refuse_other_exits(val.info.exit_names, "the network")
        return dataclasses.replace(goal.policy, guarantee=None)
    names = val.info.exit_names
    if goal.criterion == "entropy" and goal.thresholds and max(goal.thresholds) > 0:
        raise UserError(
            "scores of entropy are minus nats, so a threshold is at most 0; BranchyNet's T of 0.3"
            " is --thresholds=-0.3"
        )
    policy = _calibrated(val, goal)
    if goal.thresholds is not None:
        values = as_thresholds(goal.thresholds, len(names))
        return dataclasses.replace(policy, thresholds=values)
    scored = score_record(val, policy)
    if goal.delta is not None:
        stages = cdl.admit(scored, cost, goal.delta, goal.epsilon)
        return dataclasses.replace(policy, enabled=cdl.enabled(stages)).shared(goal.delta)
    price = times.of if goal.latency else cost.mean_macs
    if goal.max_drop is not None:
        key = search.cheapest(scored.right[:, -1].mean() - goal.max_drop)
    else:
        limit = allowed(goal, times) if goal.latency else goal.budget * cost.plain_macs
        key = search.most_accurate(limit)
    enabled = _that_pay(scored, policy, price, key)
    curve = thresholds.shared_curve(scored, enabled, cost.cumulative(enabled))
    if goal.max_drop is not None:
        threshold = thresholds.for_max_drop(curve, goal.max_drop)
    elif goal.latency:
        threshold = thresholds.for_latency(curve, price(enabled, curve.shares), limit)
    else:
        threshold = thresholds.for_budget(curve, limit)
    if goal.per_exit:
        each, enabled = search.per_exit(
            scored, price, key, threshold, enabled, not scored.remembers
        )
        return dataclasses.replace(policy, thresholds=each, enabled=enabled)
    return dataclasses.replace(policy, enabled=enabled).shared(threshold)


def _that_pay(
    scored: Scores, policy: Policy, price: search.Price, key: search.Key
) -> tuple[bool, ...]:
    """Which exits to compute; all where the others would not say the same without one."""
    return policy.enabled if scored.remembers else search.that_pay(scored, price, key)


def allowed(goal: Goal, times: StageTimes) -> float:
    """Seconds that the goal allows a batch."""
    value, unit = goal.latency
    return value if unit == "s" else value * times.plain


def _calibrated(val: ExitRecord, goal: Goal) -> Policy:
    """The goal's criterion with temperatures fitted on val; nobody leaves early yet."""
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


def _guaranteed(val: ExitRecord, goal: Goal, cost: Cost) -> Policy:
    """The cheapest policy whose risk is certified: what it is made of is fitted on a fifth of val,
    drawn by lot; the rest certifies."""
    fit, certify = (val.subset(rows, "val", val.info.split_hash) for rows in fit_and_certify(val))
    policies = ladder(fit, goal, cost)
    scored = score_record(certify, policies[0])
    lost = guarantees.losses_of(scored, policies, goal.loss)
    if goal.confidence is None:
        last = guarantees.on_average(lost, goal.risk)
    else:
        last = guarantees.with_confidence(lost, goal.risk, goal.confidence)
    promise = Guarantee(
        risk=goal.risk,
        confidence=goal.confidence,
        loss=goal.loss,
        images=len(certify),
        losses=int(lost[last].sum()),
        data=f"drawn by lot, seed 0, out of val {val.info.split_hash}",
    )
    return dataclasses.replace(
        policies[last], guarantee={**dataclasses.asdict(promise), "words": str(promise)}
    )


def fit_and_certify(val: ExitRecord) -> tuple[np.ndarray, np.ndarray]:
    """The images of val that a guarantee's policies are fitted on, and those that certify."""
    order = np.random.default_rng(0).permutation(len(val))
    cut = max(1, round(FIT_SHARE * len(val)))
    return np.sort(order[:cut]), np.sort(order[cut:])


def ladder(fit: ExitRecord, goal: Goal, cost: Cost) -> list[Policy]:
    """Policies of the goal's criterion from never leaving early to always, with temperatures and,
    for a goal of risk, without the exits that do not pay at that drop; evenly in MACs, or with a
    threshold for each exit, in the order of their losses. All of it from `fit`."""
    policy = _calibrated(fit, goal)
    scored = score_record(fit, policy)
    kept = guarantees.as_kept(scored, goal.loss)  # all is fitted to the loss that is guaranteed
    if goal.risk is not None:
        enabled = _that_pay(kept, policy, cost.mean_macs, search.cheapest(1 - goal.risk))
        policy = dataclasses.replace(policy, enabled=enabled)
    if goal.per_exit:
        path = search.path(kept, cost.mean_macs, policy.enabled)
        policies = [dataclasses.replace(policy, thresholds=each) for each in path]
        # the safest first, as in Pareto testing (Laufer-Goldshtein et al., arXiv:2210.07913)
        lost = guarantees.losses_of(scored, policies, goal.loss).sum(axis=1)
        return [policies[index] for index in np.argsort(lost, kind="stable")]
    curve = thresholds.shared_curve(scored, policy.enabled, cost.cumulative(policy.enabled))
    return [policy.shared(float(threshold)) for threshold in curve.thresholds[thinned(curve)]]


def thinned(curve: thresholds.Curve) -> list[int]:
    """Points of a curve, evenly in its MACs, from never leaving early on."""
    wanted = np.linspace(curve.macs[0], curve.macs[-1], CURVE_POINTS)
    after = np.searchsorted(-curve.macs, -wanted).clip(max=len(curve.macs) - 1)
    before = (after - 1).clip(0)
    nearer = np.abs(curve.macs[before] - wanted) <= np.abs(curve.macs[after] - wanted)
    return list(dict.fromkeys(np.where(nearer, before, after).tolist()))


def outcome(scored: Scores, policy: Policy, cost: Cost) -> tuple[Point, np.ndarray]:
    """Accuracy and mean share of MACs of a policy on a sample, and the exit each image takes."""
    taken = scored.exit_index(policy)
    right = scored.right[np.arange(len(taken)), taken]
    shares = np.asarray(cost.shares(policy.enabled))
    return Point(float(right.mean()), float(shares[taken].mean())), taken


def random_exit_accuracy(scored: Scores, taken: np.ndarray) -> float:
    """The random-exit baseline: accuracy if as many left at each exit, whichever they are."""
    shares = np.bincount(taken, minlength=scored.scores.shape[1]) / len(taken)
    return float(shares @ scored.right.mean(axis=0))
