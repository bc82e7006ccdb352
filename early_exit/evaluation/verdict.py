"""The verdict: whether exits pay in the runtime in which they were timed, and what does if not."""

from collections.abc import Sequence

from early_exit.evaluation.report import Environment, Report, StaticRow
from early_exit.evaluation.report_seconds import Verdict
from early_exit.inference.latency import Timing
from early_exit.system.device import PRECISIONS

SHORT = {
    "exits": "deploy with exits",
    "plain": "deploy the plain network",
    "disabled": "the policy is the plain network",
}


def verdicts(report: Report) -> tuple[Verdict, ...]:
    """One verdict for each timed batch size; none for a network without early exits."""
    if not report.early_exits:
        return ()
    cuts = report.cuts
    return tuple(
        judge(
            timing,
            report.environment,
            accuracy=report.test.accuracy,
            final_accuracy=report.exits[-1].accuracy,
            any_enabled=any(row.enabled for row in report.early_exits),
            given=report.choice.policy_given,
            static_networks=report.static_networks,
            cuts=cuts.count if cuts else 1,
        )
        for timing in report.timing
    )


def judge(
    timing: Timing,
    environment: Environment,
    *,
    accuracy: float,
    final_accuracy: float,
    any_enabled: bool = True,
    given: bool = False,
    static_networks: Sequence[StaticRow] = (),
    cuts: int = 1,
) -> Verdict:
    """The verdict on a policy at one batch size.

    Exits pay if they are faster than the plain network in every repeat. A static network is better
    if it is not less accurate than the policy and its mean time is below that of the plain network
    and below that with exits. In 8-bit integers none is, because its accuracy in them is not known.

    accuracy: of the policy on test; final_accuracy: of the final exit's own logits, which are the
    plain network's; any_enabled: whether it enables an early exit; given: whether
    it was given, not chosen; cuts: over which the choice was repeated, the first of which is timed.
    """
    where = f"In {environment.ran_in} at batch {timing.batch_size}"
    precision = environment.precision
    if precision == PRECISIONS["int8"]:
        static_networks = ()
    static = faster_static(timing, static_networks, accuracy, any_enabled)
    low, high = speedup_range(timing)
    kind, name = "disabled", None
    if static is not None:
        kind, name = "static", static.name
        words = _static_words(timing, static, precision, accuracy, any_enabled, cuts)
    elif not any_enabled:
        who = "the given policy is" if given else "the policy chose"
        words = f"{who} the plain network (no exit is enabled): {_plain_ms(timing)}"
    elif low > 1:
        kind = "exits"
        words = (
            f"exits are {timing.speedup:.2f} times as fast as the plain network ({low:.2f} to"
            f" {high:.2f} over {timing.repeats} repeats) {_lost(final_accuracy - accuracy, cuts)}"
        )
    else:
        kind = "plain"
        pay = "do not pay" if timing.speedup <= 1 else "do not pay in every repeat"
        words = (
            f"exits {pay}: they take {1 / timing.speedup:.2f} times the plain network's time"
            f" ({1 / high:.2f} to {1 / low:.2f} over {timing.repeats} repeats); deploy the plain"
            " network"
        )
    return Verdict(kind, timing.batch_size, f"{where}, {words}.", name)


def speedup_range(timing: Timing) -> tuple[float, float]:
    """The lowest and the highest speed-up over repeats. `Timing.speedup`, of medians over repeats,
    counts as one more: where a few repeats were disturbed, it may be outside the others."""
    low, high = timing.speedup_range
    return min(low, timing.speedup), max(high, timing.speedup)


def faster_static(
    timing: Timing, static_networks: Sequence[StaticRow], accuracy: float, any_enabled: bool
) -> StaticRow | None:
    """The fastest static network that is better, if there is one.

    A network of exactly the plain network's multiply-adds is the plain network, trained by others;
    its time differs by noise alone, so it is never better.
    """
    others = [timing.plain.total, *([timing.live.total] if any_enabled else [])]
    better = [
        row
        for row in static_networks
        if row.name in timing.networks
        and row.macs_share != 1
        and row.accuracy >= accuracy
        and timing.networks[row.name].total < min(others)
    ]
    return min(better, key=lambda row: timing.networks[row.name].total, default=None)


def short(verdict: Verdict) -> str:
    """What to deploy, for a table."""
    return f"deploy {verdict.network}" if verdict.network else SHORT[verdict.kind]


def _static_words(
    timing: Timing,
    static: StaticRow,
    precision: str,
    accuracy: float,
    any_enabled: bool,
    cuts: int,
) -> str:
    whose, total = "with exits", timing.live.total
    if not any_enabled:
        whose, total = "of the plain network, which is the policy", timing.plain.total
    stated = "" if precision == PRECISIONS["f32"] else " (as its source states, in float32)"
    return (
        f"the static {static.name} is faster at no lower accuracy:"
        f" {_ms(timing, timing.networks[static.name].total)} ms at"
        f" {100 * static.accuracy:.2f} %{stated}"
        f" against {_ms(timing, total)} ms at {100 * accuracy:.2f} % {whose}{_first_of(cuts)};"
        " deploy it"
    )


def _plain_ms(timing: Timing) -> str:
    return f"{_ms(timing, timing.plain.total)} ms per batch"


def _ms(timing: Timing, total: float) -> str:
    """The mean milliseconds per batch."""
    return f"{1000 * total / timing.batches:.2f}"


def is_loss(lost: float) -> bool:
    """Whether a loss of accuracy, a fraction, is at least 0.01 points when it is printed."""
    return 100 * lost >= 0.005


def _lost(lost: float, cuts: int) -> str:
    words = f"at {100 * lost:.2f} points lost" if is_loss(lost) else "at no loss of accuracy"
    return words + _first_of(cuts)


def _first_of(cuts: int) -> str:
    return "" if cuts == 1 else f", on the first of {cuts} cuts"
