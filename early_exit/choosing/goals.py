"""Goals: what a policy is chosen for (`early_exit.choosing.choice` chooses it)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from early_exit.choosing import guarantees
from early_exit.errors import UserError
from early_exit.inference.criteria import check_threshold, get_traits
from early_exit.inference.policy import Policy
from early_exit.inference.segment_times import SegmentTimes


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
        if not 0 < self.limit < math.inf:
            raise UserError(f"--latency-budget must be positive and finite, got {self.limit:g}")
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
    """Raises UserError if the thresholds or the policy that a goal gives do not fit the network, if
    a threshold is one that no score, or every score, reaches, and if the criterion needs more early
    exits."""
    early_exits = len(exit_names) - 1
    needed = get_traits(goal.criterion).min_early_exits
    if early_exits < needed > 1:
        raise UserError(
            f"the criterion {goal.criterion} needs {needed} early exits, the network has"
            f" {early_exits}; choose another criterion"
        )
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
