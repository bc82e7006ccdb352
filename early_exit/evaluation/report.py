"""The report of an evaluation: plain values, stored as JSON, from which every page is made.

`report.json` carries a format number; `early_exit.evaluation.upgrade` reads older files.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from early_exit.choosing.cdl import Candidate
from early_exit.choosing.outcome import Point
from early_exit.choosing.overthinking import Overthinking
from early_exit.evaluation.report_seconds import (
    CurveSeconds,
    LatencyResult,
    RuntimeRow,
    Verdict,
)
from early_exit.inference.latency import Timing
from early_exit.metrics import Bin

FORMAT = 2


@dataclass(frozen=True)
class RunInfo:
    """The run that was evaluated."""

    name: str
    task: str
    """Name of its task (`early_exit.task.Task.name`)."""
    dataset: str
    arch: str
    regime: str
    weights: str
    """Hash of the weights, and which they are."""
    settings: dict[str, Any]
    """The run's configuration, as it was evaluated."""
    unfinished: str | None = None
    """How far it was trained, such as `epoch 3 of 10, phase joint`; None if to its end."""
    rounded_to: str | None = None
    """What the weights were rounded to (`early_exit.training.rounding`)."""


@dataclass(frozen=True)
class Choice:
    """How the policy was chosen."""

    goal: str
    criterion: str
    calibrated: bool
    """Whether temperatures were fitted."""
    thresholds_given: bool
    """Whether the user gave the thresholds, so they were not chosen on val."""
    policy_given: bool
    """Whether the user gave the whole policy, so nothing was fitted on val."""
    val_from: str
    """Where val came from, in words."""
    val_images: int
    test_images: int
    left_out: tuple[str, ...] = ()
    """Files of val and test that could not be read or are gone, and are not among these images."""


@dataclass(frozen=True)
class Environment:
    """Where and with what the evaluation ran."""

    device: str
    precision: str
    versions: dict[str, str]
    command: str
    runtime: str = "torch"
    """What ran the network: a name of `early_exit.inference.runtimes.table`."""

    @property
    def ran_in(self) -> str:
        """Runtime and precision, which every number of seconds is shown with."""
        return f"{self.runtime} ({self.precision})"


@dataclass(frozen=True)
class ExitRow:
    """One exit, on test."""

    name: str
    enabled: bool
    threshold: float | None
    temperature: float
    macs: int
    macs_share: float
    """Of the plain network's MACs, everything that ran up to here."""
    head_share: float
    accuracy_val: float
    """If every val image exited here."""
    accuracy: float
    """If every test image exited here."""
    reliability_before: tuple[Bin, ...]
    """Confidence, accuracy and share of test by bins of confidence, without the temperature."""
    reliability: tuple[Bin, ...]
    """With the temperature."""
    ece_before: float
    """Expected calibration error on test without the temperature."""
    ece_after: float
    """With the temperature, which was fitted on val."""
    continuing_auroc: float | None
    """AUROC of the score for "continuing would help": how often a test image that is wrong here and
    right at the final exit has a lower score than another image. None for the final exit."""
    top5: float | None
    """Top-5 accuracy if every test image exited here; only with more than ten classes."""
    exited: float
    """Share of test that exits here under the policy."""
    exited_accuracy: float | None
    """Accuracy on those images; None if there are none."""


@dataclass(frozen=True)
class CurvePoint:
    """One shared threshold: chosen on val, shown on test."""

    threshold: float | None
    """None: no exit is taken."""
    val: Point
    test: Point
    random: float
    """Test accuracy if as many images exited at each exit, chosen at random."""
    val_shares: tuple[float, ...]
    """Of val that exit at each exit."""
    test_shares: tuple[float, ...]


@dataclass(frozen=True)
class StaticRow:
    """A network without exits, trained by others, that could be used instead."""

    name: str
    accuracy: float
    """On the official test set, as its source states it."""
    macs_share: float
    """Of the plain network's."""
    source: str


@dataclass(frozen=True)
class MeanStd:
    """A number over several cuts or seeds."""

    mean: float
    std: float


@dataclass(frozen=True)
class GuaranteeResult:
    """A guarantee, and what was observed on test."""

    words: str
    lost: float
    """Share of test with a loss, which the guarantee bounds."""
    unguaranteed: Point
    """Test, if the thresholds are chosen for the same drop on val, without a guarantee."""
    unguaranteed_lost: float


@dataclass(frozen=True)
class Cuts:
    """The same choice repeated over several cuts of the test set into val and test."""

    count: int
    accuracy: MeanStd
    macs_share: MeanStd
    final_accuracy: MeanStd
    speedup: MeanStd | None = None
    """Over the plain network, expected from the segments' times, if the goal counts seconds."""
    lost: MeanStd | None = None
    """Accuracy of the final exit minus that of the policy, on the same images; older reports lack
    it."""


@dataclass(frozen=True)
class LiveResult:
    """Inference with exits taken, on all of test."""

    images: int
    accuracy: float
    top5: float | None
    differing: int
    """Images with another exit or answer than on the record."""
    differing_beyond_rounding: int
    """Those of them that rounding does not explain (`early_exit.choosing.outcome`)."""
    batch_size: int
    rounding: float
    """How far scores may differ from the record by rounding; it depends on the precision."""


@dataclass(frozen=True)
class ClassRow:
    """One class of test under the policy."""

    name: str
    images: int
    accuracy: float
    macs_share: float
    exited: tuple[float, ...]
    """Share of its images that exits at each exit."""


@dataclass(frozen=True)
class EnergyEstimate:
    """Picojoules per image, estimated (`early_exit.model.energy`)."""

    weights: str
    """Where the weights are read from: SRAM or DRAM."""
    plain: float
    test: float
    """Mean over test under the policy."""


@dataclass(frozen=True)
class Picture:
    """One image of a gallery."""

    pixels: np.ndarray
    """(H, W, 3) uint8."""
    label: str
    """What is written beside it: the answer."""
    correct: bool
    words: str
    """Everything that is known of it, in words."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything an evaluation found."""

    format: int = FORMAT
    run: RunInfo
    choice: Choice
    environment: Environment
    plain_macs: int
    val: Point
    test: Point
    random_accuracy: float
    """Test accuracy if as many images exited at each exit, chosen at random."""
    final_accuracy: float
    """Test accuracy if every image exited at the final exit. Of a criterion whose answer there is
    made of several exits, the final exit's own accuracy is in its row of `exits`."""
    top5: float | None
    """Top-5 accuracy of the answers; only with more than ten classes."""
    exits: tuple[ExitRow, ...]
    classes: tuple[ClassRow, ...]
    energy: tuple[EnergyEstimate, ...]
    overthinking: Overthinking
    curve: tuple[CurvePoint, ...]
    cdl: tuple[Candidate, ...] | None
    """The stages that Conditional Deep Learning considered, if it chose."""
    guarantee: GuaranteeResult | None
    latency: LatencyResult | None
    cuts: Cuts | None
    live: LiveResult | None
    timing: tuple[Timing, ...]
    static_networks: tuple[StaticRow, ...]
    curve_seconds: tuple[CurveSeconds, ...]
    verdicts: tuple[Verdict, ...] = ()
    """One for each timed batch size."""
    runtimes: tuple[RuntimeRow, ...] = ()
    """If it was evaluated in several runtimes: all of them, this one included."""
    val_shares: tuple[float, ...] = ()
    """Of val that exit at each exit under the policy."""

    @property
    def early_exits(self) -> tuple[ExitRow, ...]:
        """The exits before the final one."""
        return self.exits[:-1]


def to_json(report: Report) -> str:
    """The report as JSON, with what follows from the timings spelt out."""
    values: dict[str, Any] = dataclasses.asdict(report)
    for timing, measured in zip(values["timing"], report.timing, strict=True):
        timing |= {
            name: getattr(measured, name)
            for name in (
                "speedup",
                "fraction_of_ideal",
                "speedup_without_heads",
                "overhead",
                "segment_shares",
            )
        }
    for row, stage in zip(values["cdl"] or (), report.cdl or (), strict=True):
        row["gain"] = stage.gain
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """JSON has no infinity: a threshold that no score reaches is null."""
    return value if math.isfinite(value) else None
