"""The report of an evaluation: plain values that become JSON (and `early_exit.wording` pages)."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from early_exit.cdl import Candidate
from early_exit.choosing import Point
from early_exit.latency import Timing
from early_exit.metrics import Bin
from early_exit.overthinking import Overthinking


@dataclass(frozen=True)
class ExitRow:
    """One exit, on test."""

    name: str
    on: bool
    threshold: float | None
    temperature: float
    macs: int
    macs_share: float
    """Of the plain network's MACs, everything that ran up to here."""
    head_share: float
    accuracy_val: float
    """If all of val left here."""
    accuracy: float
    """If all of test left here."""
    reliability_before: tuple[Bin, ...]
    """Confidence, accuracy and share of test by bins of confidence, without the temperature."""
    reliability: tuple[Bin, ...]
    """With the temperature."""
    ece_before: float
    """Calibration error on test without the temperature."""
    ece_after: float
    """With the temperature, which was fitted on val."""
    gain_auroc: float | None
    """How well the score ranks whom going on would help: how often a test image that is wrong here
    and right at the end has a lower score than another one. Nothing for the final exit."""
    top5: float | None
    """How often the target is among the best five, if all of test left here; where there are more
    than ten classes."""
    taken: float
    """Share of test that leaves here under the policy."""
    taken_accuracy: float | None
    """How often those are answered rightly; nothing where nobody leaves."""


@dataclass(frozen=True)
class CurvePoint:
    """One shared threshold: chosen on val, shown on test."""

    threshold: float | None
    """None: nobody leaves early."""
    val: Point
    test: Point
    random: float
    """Test accuracy if as many images left at each exit, drawn by lot."""
    val_shares: tuple[float, ...]
    """Of val that leave at each exit."""
    test_shares: tuple[float, ...]


@dataclass(frozen=True)
class Static:
    """A network without exits of the same family, as others trained it: what one could use
    instead."""

    name: str
    accuracy: float
    """On the official test set, as its source states it."""
    macs_share: float
    """Of the plain network's."""
    source: str


@dataclass(frozen=True)
class Pace:
    """What the points of the curve take at one batch size, as shares of the plain network's time:
    the sum of the stages' times at the numbers of rows that reach them on average
    (`early_exit.latency.StageTimes`)."""

    batch_size: int
    plain: float
    """Seconds of a batch by the plain network, in the measurement that took exits."""
    val: tuple[float, ...]
    """One for each point of the curve."""
    test: tuple[float, ...]
    alone: tuple[float, ...]
    """If all left at one exit."""
    chosen_val: float
    chosen_test: float
    statics: dict[str, float]
    """Of the static networks, timed in between."""


@dataclass(frozen=True)
class MeanStd:
    """A number over several cuts or seeds."""

    mean: float
    std: float


@dataclass(frozen=True)
class Kept:
    """A guarantee, and what became of it on test."""

    words: str
    lost: float
    """Share of test with a loss, which the guarantee bounds."""
    plain: Point
    """Test, if the thresholds are chosen for as many points given up on val, without guarantee."""
    plain_lost: float


@dataclass(frozen=True)
class Latency:
    """A budget of seconds for a batch: what was allowed, what the choice expects, the plain network
    in the same measurement."""

    batch_size: int
    budget: float
    plain: float
    val: float
    test: float


@dataclass(frozen=True)
class Cuts:
    """The same choice repeated over several cuts of the test set into val and test."""

    count: int
    accuracy: MeanStd
    macs_share: MeanStd
    final_accuracy: MeanStd


@dataclass(frozen=True)
class Live:
    """Inference with exits taken, on all of test."""

    images: int
    accuracy: float
    top5: float | None
    differing: int
    """Images that took another exit or got another answer than on the record."""
    differing_beyond_rounding: int
    """Those of them whose score on the record is further than 1e-5 from a threshold it met."""
    batch_size: int


@dataclass(frozen=True)
class ClassRow:
    """One class of test under the policy."""

    name: str
    images: int
    accuracy: float
    macs_share: float
    taken: tuple[float, ...]
    """Share of its images that leaves at each exit."""


@dataclass(frozen=True)
class EnergyEstimate:
    """Picojoules an image, estimated (`early_exit.energy`)."""

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
    """What is written beside it: what was answered."""
    right: bool
    words: str
    """All that is known of it, in words."""


@dataclass(frozen=True)
class Report:
    """Everything an evaluation found."""

    run: str
    dataset: str
    arch: str
    regime: str
    chosen_by: str
    thresholds_given: bool
    """Whether the user gave the thresholds, so that they were not chosen on val."""
    policy_given: bool
    """Whether the user gave all of the policy, so that nothing was fitted on val."""
    criterion: str
    calibrated: bool
    val_from: str
    val_images: int
    test_images: int
    weights: str
    precision: str
    device: str
    plain_macs: int
    val: Point
    test: Point
    random_accuracy: float
    final_accuracy: float
    top5: float | None
    """How often the target is among the best five of the answer; where there are many classes."""
    exits: tuple[ExitRow, ...]
    classes: tuple[ClassRow, ...]
    energy: tuple[EnergyEstimate, ...]
    overthinking: Overthinking
    curve: tuple[CurvePoint, ...]
    cdl: tuple[Candidate, ...] | None
    """The stages that Conditional Deep Learning asked about, where it chose."""
    guarantee: Kept | None
    latency: Latency | None
    cuts: Cuts | None
    live: Live | None
    timing: tuple[Timing, ...]
    statics: tuple[Static, ...]
    pace: tuple[Pace, ...]
    door: str
    """The front door of the run's data (`early_exit.experiment.FrontDoor.name`)."""
    settings: dict[str, Any]
    """The run's configuration, as it was evaluated."""
    versions: dict[str, str]
    command: str


def to_json(report: Report) -> str:
    """The report as JSON, with what follows from the timings spelt out."""
    values: dict[str, Any] = dataclasses.asdict(report)
    for timing, measured in zip(values["timing"], report.timing, strict=True):
        timing |= {
            "speedup": measured.speedup,
            "kept": measured.kept,
            "trunk_speedup": measured.trunk_speedup,
            "overhead": measured.overhead,
            "stage_shares": measured.stage_shares,
        }
    for row, stage in zip(values["cdl"] or (), report.cdl or (), strict=True):
        row["gain"] = stage.gain
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """JSON has no infinity: a threshold nobody reaches is null."""
    return value if math.isfinite(value) else None
