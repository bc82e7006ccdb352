"""The values of a report that are about seconds, beside `early_exit.inference.latency.Timing`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CurveSeconds:
    """The time of the curve's points at one batch size, as shares of the plain network's time: the
    sum of the segments' times at the mean numbers of rows that reach them
    (`early_exit.inference.segment_times`)."""

    batch_size: int
    plain: float
    """Seconds per batch of the plain network, measured beside inference with exits taken."""
    val: tuple[float, ...]
    """One for each point of the curve."""
    test: tuple[float, ...]
    at_exit: tuple[float, ...]
    """If every image exited at one exit."""
    chosen_val: float
    chosen_test: float
    static_networks: dict[str, float]
    """Measured in turns with the plain network."""


@dataclass(frozen=True)
class LatencyResult:
    """A goal in seconds per batch: the plain network's time and the time expected on val and test,
    in one measurement."""

    batch_size: int
    budget: float | None
    """None: the fewest seconds were wanted."""
    plain: float
    val: float
    test: float


@dataclass(frozen=True)
class Verdict:
    """What to deploy in a runtime at one batch size (`early_exit.evaluation.verdict`)."""

    kind: str
    """`exits`: they are faster than the plain network; `plain`: they are not; `disabled`: the
    policy enables no exit; `static`: a static network is faster and not less accurate."""
    batch_size: int
    words: str
    """One sentence."""
    network: str | None = None
    """Name of the static network."""


@dataclass(frozen=True)
class RuntimeSeconds:
    """Mean seconds per batch of the plain network and with exits taken, at one batch size."""

    batch_size: int
    plain: float
    live: float
    speedup: float
    speedup_range: tuple[float, float]
    """The lowest and the highest over repeats (`early_exit.evaluation.verdict.speedup_range`)."""


@dataclass(frozen=True)
class RuntimeRow:
    """The evaluation in one of several runtimes."""

    runtime: str
    precision: str
    evaluation: str
    """Name of its directory."""
    accuracy: float
    macs_share: float
    seconds: tuple[RuntimeSeconds, ...]
    verdicts: tuple[Verdict, ...]
