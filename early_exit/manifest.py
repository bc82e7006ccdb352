"""The manifest of a deployed model, `model.json`: what its segments are and how they are used.

Needs no torch. The thresholds are not in it: they are in `policy.yaml` beside it and can be
changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from early_exit.data.pixels import as_bytes, centre_crop, fitted
from early_exit.errors import UserError
from early_exit.inference.criteria import Traits
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.table import split_name
from early_exit.inference.segments import spans
from early_exit.model.macs import Cost
from early_exit.system.text import shortened

NAME = "model.json"
FORMAT = 1
INPUTS = {"uint8": np.uint8, "float32": np.float32}
"""The types of images that a first segment can take."""


@dataclass(frozen=True)
class CentreCrop:
    """`early_exit.data.pixels.centre_crop` and its arguments, in pixels."""

    resize: int
    crop: int


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The images that the first segment takes, and how they are made of an image file."""

    type: str
    """A key of `INPUTS`. uint8: the segment normalises them; float32: they are normalised before.
    """
    shape: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    """Of every channel, for pixels in [0, 1]; `std` too."""
    std: tuple[float, ...]
    crop: CentreCrop | None
    """How an image is resized; None: by `early_exit.data.pixels.fitted`."""

    def __post_init__(self) -> None:
        _require(self.type in INPUTS, "its input has a known type")
        _require(len(self.shape) == 3 and min(self.shape) > 0, "its input has a shape (C, H, W)")
        _require(len(self.mean) == len(self.std) == self.shape[0], "mean and std fit the channels")

    def read(self, image: Image.Image) -> np.ndarray:
        """An RGB image as bytes of the network's size, (C, H, W) uint8."""
        if self.crop is None:
            image = fitted(image, self.shape)
        else:
            image = centre_crop(image, self.crop.resize, self.crop.crop)
        return as_bytes(image, self.shape[0])

    def array(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) uint8 as the first segment takes them: as they are, or normalised in
        the steps of `early_exit.data.pixels.normalise`."""
        if self.type == "uint8":
            return images
        mean, std = (
            np.array(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std)
        )
        return (images.astype(np.float32) - 255 * mean) * (1 / (255 * std))


@dataclass(frozen=True)
class SegmentFile:
    """The ONNX model of one segment, in the directory of the manifest."""

    file: str
    sha256: str
    first: int
    """Its first stage."""
    last: int
    """Its last stage, and the index of the exit that it ends at."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a deployed model is."""

    classes: tuple[str, ...]
    input: ImageInput
    cost: Cost
    """Of every stage and exit, also of those that are disabled."""
    criterion: str
    """The criterion that is part of the segments."""
    traits: Traits
    """Its properties, as numbers for this model's classes and exits."""
    runtime: str
    """The runtime that it was made for, as `--runtime` takes it. In 8-bit integers, the only one
    that may run it."""
    precision: str
    """That the runtime computes in: f32, bf16 or int8."""
    opset: int
    segments: tuple[SegmentFile, ...]
    check: dict[str, Any]
    """What the files were compared with when they were written, on which images, and what was found
    (`early_exit.inference.runtimes.onnx_check.Agreement`)."""
    network: dict[str, Any]
    """Its architecture, data set and weights."""
    chosen_in: dict[str, Any]
    """The runtime and precision in which the thresholds were chosen."""
    test: dict[str, Any]
    """Accuracy and cost on test, measured in `chosen_in`."""
    val: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The chosen thresholds of the early exits and temperatures, with accuracy, cost and the share
    of images that exit at each exit, on val, and the number of its images. No threshold: no image
    exits there. Empty in models that were exported before there was one."""
    val_curve: list[dict[str, Any]]
    """Shared thresholds of the early exits, with accuracy, cost and the share of images that exit
    at each exit, on val. No threshold: no exit is taken."""
    versions: dict[str, str]
    """Of the packages that wrote it."""

    def __post_init__(self) -> None:
        num_exits = len(self.exit_names)
        ends = [0, *(segment.last + 1 for segment in self.segments)]
        firsts = [segment.first for segment in self.segments]
        _require(bool(self.classes), "it has classes")
        for name in (self.criterion, self.runtime, self.precision):
            _require(isinstance(name, str), "criterion, runtime and precision are names")
        _require(self.precision == split_name(self.runtime)[1], "its precision is the runtime's")
        _require(
            len(self.cost.stage_macs) == len(self.cost.head_macs) == num_exits,
            "there is a cost of every exit",
        )
        _require(firsts == ends[:-1] and ends[-1] == num_exits, "its segments follow each other")
        for segment in self.segments:
            # a manifest of somebody else names no file outside its directory
            _require(
                segment.file not in (".", "..") and Path(segment.file).name == segment.file,
                "a segment is a file beside it",
            )

    @property
    def exit_names(self) -> tuple[str, ...]:
        """The names of all exits, the final one last."""
        return self.cost.exit_names

    def check_policy(self, policy: Policy, path: Path) -> None:
        """Raises UserError for a policy that is not for these segments. path: its file."""
        policy.check_exits(self.exit_names, "the deployed model")
        if policy.criterion != self.criterion:
            raise UserError(
                f"{path} has the criterion {policy.criterion}, the model's files compute"
                f" {self.criterion}; export the run again for another one"
            )
        files = [(segment.first, segment.last) for segment in self.segments]
        if spans(policy.enabled) != files:
            exported = [self.exit_names[last] for _, last in files[:-1]]
            enabled = [self.exit_names[last] for _, last in spans(policy.enabled)[:-1]]
            raise UserError(
                f"{path} enables {' and '.join(enabled) or 'no early exit'}, the model's files end"
                f" at {' and '.join(exported) or 'none'}; export the run again for other exits"
                " (thresholds can be changed without)"
            )
        policy.check_thresholds(len(self.classes))

    def to_json(self) -> str:
        """The file's text."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        for name, value in values["traits"].items():  # JSON has no infinity
            if isinstance(value, float) and math.isinf(value):
                values["traits"][name] = None
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a deployed model. Raises UserError if it is missing, damaged or of a
        newer format."""
        path = directory / NAME
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{path} is incomplete or not JSON; export the run again") from None
        try:
            number = values.pop("format")
            if number > FORMAT:
                raise UserError(
                    f"{path} has format {number}, this program reads formats up to {FORMAT}; update"
                    " early-exit"
                )
            return _from_json(values)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not the manifest of a deployed model ({shortened(error, 80)}); export"
                " the run again with --format onnx"
            ) from None


def _from_json(values: dict[str, Any]) -> Manifest:
    """The manifest from the values of its file. Raises the usual errors where it has others."""
    image, cost = dict(values.pop("input")), dict(values.pop("cost"))
    crop = image.pop("crop")
    traits: dict[str, Any] = {
        name: (-math.inf if name == "lowest" else math.inf) if value is None else value
        for name, value in values.pop("traits").items()
    }
    return Manifest(
        classes=tuple(map(str, values.pop("classes"))),
        input=ImageInput(
            type=image.pop("type"),
            crop=None if crop is None else CentreCrop(int(crop["resize"]), int(crop["crop"])),
            shape=_three(image.pop("shape")),
            **{name: tuple(map(float, numbers)) for name, numbers in image.items()},
        ),
        cost=Cost(
            exit_names=tuple(map(str, cost.pop("exit_names"))),
            backbone_params=int(cost.pop("backbone_params")),
            **{name: tuple(map(int, numbers)) for name, numbers in cost.items()},
        ),
        traits=Traits(**traits),
        segments=tuple(SegmentFile(**segment) for segment in values.pop("segments")),
        **values,
    )


def _three(values: list[int]) -> tuple[int, int, int]:
    first, second, third = map(int, values)
    return first, second, third


def _require(condition: bool, what: str) -> None:
    """Raises ValueError unless the manifest is as expected."""
    if not condition:
        raise ValueError(f"expected that {what}")


def is_deployed(directory: Path) -> bool:
    """Whether a directory is a deployed model."""
    return (directory / NAME).is_file()


def refuse_deployed(directory: Path) -> None:
    """Raises UserError if a directory that should be a run is a deployed model."""
    if is_deployed(directory):
        raise UserError(
            f"{directory} is a deployed model, which can only predict; name the run that it was"
            " exported from"
        )
