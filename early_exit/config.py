"""The settings of a run: frozen dataclasses, checked when built.

Flags win over the preset, which wins over the defaults. A preset is YAML with the same nesting; its
values are converted to the fields' types, because YAML reads `1e-4` as a string. An unknown key is
an error that names the nearest known one.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from early_exit.errors import UserError
from early_exit.model.heads import HEADS
from early_exit.system.yaml_files import read_yaml

Schedule = Literal["step", "cosine", "triangular"]
Flip = Literal["random", "alternating"]
PadMode = Literal["constant", "reflect"]
Regime = Literal["joint", "mixed", "frozen", "cdl"]
Amp = Literal["auto", "bf16", "fp16", "off"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images."""

    dataset: str = ""
    """Name of the data set, as the task knows it."""
    root: str | None = None
    """Directory of the data set. Default: data/ under the repository root."""
    split_seed: int = 0
    """Seed of the split of train into train and val, independent of the run's seed."""
    flip: Flip = "random"
    """How train images are flipped, if their data set is. random: each with probability 1/2;
    alternating: each in every second epoch, half of them in the first (arXiv:2404.00498, section
    3.6); refused for a data set that is never flipped."""
    pad: int | None = None
    """Pixels of padding on each side of a train image before a random crop. Default: the data
    set's own."""
    pad_mode: PadMode = "constant"
    """What the padding is. constant: black; reflect: the image, mirrored at its border."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.split_seed < 2**63,
            f"data.split_seed must be in 0 to 2**63 - 1, got {self.split_seed}",
        )
        _require(self.pad is None or self.pad >= 0, f"data.pad must be at least 0, got {self.pad}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its exits."""

    arch: str = "resnet32"
    """Name of the backbone."""
    exits: tuple[str, ...] | None = None
    """Blocks followed by an exit. Empty, or `none`: the plain network. Default: the arch's own
    choice."""
    head: tuple[str, ...] = ("conv",)
    """Kind of head (`early_exit.model.heads.HEADS`), one for all early exits or one each."""
    backbone: str | None = None
    """Checkpoint with the backbone's weights."""

    def __post_init__(self) -> None:
        _require(self.backbone != "", "model.backbone is empty; name a file, or leave it out")
        if isinstance(self.head, str):
            object.__setattr__(self, "head", (self.head,))
        for kind in self.head:
            _require(kind in HEADS, f"model.head is {kind!r}; choose one of {', '.join(HEADS)}")
        if self.exits and "none" in self.exits:
            _require(
                self.exits == ("none",),
                f"model.exits is {' '.join(self.exits)}; none cannot be combined with places;"
                " pass only none for the plain network, or remove it",
            )
            object.__setattr__(self, "exits", ())


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One phase of training."""

    epochs: int = 200
    """Epochs of the phase."""
    batch_size: int = 128
    """Images per step, over all processes."""
    accumulate: int = 1
    """Micro-batches in which a process computes its images of a step; more need less memory."""
    lr: float = 0.1
    """Peak learning rate, for the batch size above."""
    bias_lr_scale: float = 1.0
    """Factor on the rate of BatchNorm's biases; their weight decay per step stays the same."""
    head_lr_scale: float = 1.0
    """Factor on the rate of the early exits' heads."""
    stem_epochs: int = 0
    """Epochs of the phase after which the backbone's first block is no longer trained, which saves
    its backward pass, but not with CUDA graphs; 0: it is trained in all."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's."""
    weight_decay: float = 1e-4
    """L2 penalty."""
    decay_norm: bool = True
    """Whether weight decay also applies to BatchNorm's parameters and to biases."""
    schedule: Schedule = "step"
    """step: the rate is divided by 10 at each milestone; cosine: it falls to 0 along a cosine;
    triangular: it rises linearly to its peak, then falls linearly, without another warm-up."""
    start_factor: float = 0.2
    """Factor on the rate at the start of the schedule `triangular`."""
    peak: float = 0.23
    """Fraction of the phase at which the schedule `triangular` reaches its peak."""
    end_factor: float = 0.07
    """Factor on the rate at the end of the schedule `triangular`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the phase at which the schedule `step` divides the rate by 10."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up, at most a tenth of the phase; it helps ResNet-110. The schedule
    `triangular` has none."""
    label_smoothing: float = 0.0
    """Probability moved from the target class to all classes, in [0, 1)."""
    ema: float = 0.0
    """Decay per step of the moving average of the weights, which is then what is reported; 0: no
    average. The decay is smaller in the first steps of a phase."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"optim.epochs must be at least 1, got {self.epochs}")
        _require(
            self.batch_size >= 2, f"optim.batch_size must be at least 2, got {self.batch_size}"
        )
        _require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        for name in ("bias_lr_scale", "head_lr_scale"):
            scale = getattr(self, name)
            _require(0 < scale < math.inf, f"optim.{name} must be positive, got {scale}")
        _require(
            self.stem_epochs >= 0, f"optim.stem_epochs must be at least 0, got {self.stem_epochs}"
        )
        _require(0 <= self.momentum < 1, f"optim.momentum must be in [0, 1), got {self.momentum}")
        _require(
            self.momentum > 0 or not self.nesterov,
            f"optim.nesterov needs a positive optim.momentum, got {self.momentum}",
        )
        _require(
            self.weight_decay >= 0,
            f"optim.weight_decay must be at least 0, got {self.weight_decay}",
        )
        _require(
            list(self.milestones) == sorted(self.milestones)
            and all(0 < milestone < 1 for milestone in self.milestones),
            "optim.milestones must be rising fractions of the phase, such as 0.5 0.75; got "
            + " ".join(f"{milestone:g}" for milestone in self.milestones),
        )
        _require(
            self.warmup_epochs >= 0,
            f"optim.warmup_epochs must be at least 0, got {self.warmup_epochs}",
        )
        for name in ("start_factor", "end_factor"):
            factor = getattr(self, name)
            _require(0 <= factor <= 1, f"optim.{name} must be in [0, 1], got {factor}")
        _require(0 < self.peak < 1, f"optim.peak must be in (0, 1), got {self.peak}")
        _require(
            0 <= self.label_smoothing < 1,
            f"optim.label_smoothing must be in [0, 1), got {self.label_smoothing}",
        )
        _require(
            self.accumulate >= 1, f"optim.accumulate must be at least 1, got {self.accumulate}"
        )
        _require(0 <= self.ema < 1, f"optim.ema must be in [0, 1), got {self.ema}")


@dataclass(frozen=True, kw_only=True)
class BackbonePhaseConfig:
    """What differs in the backbone phase, which comes first in every regime but `joint`."""

    epochs: int | None = None
    """Epochs of the phase. Default: optim.epochs."""
    lr: float | None = None
    """Its peak learning rate. Default: optim.lr."""

    def __post_init__(self) -> None:
        _require(
            self.epochs is None or self.epochs >= 1,
            f"backbone_phase.epochs must be at least 1, got {self.epochs}; to skip the phase, pass"
            " --backbone FILE",
        )
        _require(
            self.lr is None or self.lr > 0, f"backbone_phase.lr must be positive, got {self.lr}"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The joint loss."""

    weights: tuple[float, ...] | None = None
    """One per exit, or one per early exit, and the final exit gets 1 minus their sum. Default: 1
    each."""
    start: float | None = None
    """Weight of the early exits in the first epoch of a phase; it rises towards their own by an
    equal step after each epoch. Default: their own from the start."""
    distill: float = 0.0
    """Weight of the distillation from the final exit to the early exits; 0: none."""
    distill_temperature: float = 3.0
    """Temperature of both softmaxes in the distillation."""
    teacher: str | None = None
    """Checkpoint of a trained run whose final exit teaches all exits, as the distillation does."""
    teacher_weight: float = 1.0
    """Weight of the distillation from the teacher."""

    def __post_init__(self) -> None:
        _require(self.teacher != "", "loss.teacher is empty; name a run, or leave it out")
        _require(
            self.start is None or self.start > 0,
            f"loss.start must be positive, got {self.start}",
        )
        _require(self.distill >= 0, f"loss.distill must be at least 0, got {self.distill}")
        _require(
            self.distill_temperature > 0,
            f"loss.distill_temperature must be positive, got {self.distill_temperature}",
        )
        _require(
            self.teacher_weight > 0,
            f"loss.teacher_weight must be positive, got {self.teacher_weight}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the run trains, and how it uses the machine."""

    regime: Regime = "joint"
    """joint: backbone and heads from scratch; mixed: the backbone first, then both; frozen: the
    backbone first, then only the heads; cdl: as frozen, with linear heads, after every block unless
    `model.exits` names some."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto: the GPU if there is one, else the CPU."""
    threads: int | None = None
    """CPU threads. Default: torch's choice, within a container's limit."""
    amp: Amp = "auto"
    """Mixed precision; auto: bfloat16 if the processor supports it natively, else off."""
    channels_last: bool = True
    """Whether images and weights are in the memory format channels_last."""
    compile: bool = False
    """Whether torch.compile is used."""
    cuda_graphs: bool = False
    """Whether the forward and backward passes of training are CUDA graphs; needs one GPU."""
    sync_bn: bool = False
    """Whether BatchNorm's statistics are computed over all processes; needs GPUs."""
    deterministic: bool = False
    """Whether only deterministic algorithms are allowed."""
    save_every: int = 1
    """Epochs from one checkpoint to the next."""
    print_freq: int | None = None
    """Steps from one report of loss and accuracy to the next. Default: 20 on a terminal, and no
    reports elsewhere."""
    tensorboard: bool = False
    """Whether TensorBoard files are written."""

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, f"run.seed must be in 0 to 2**63 - 1, got {self.seed}")
        _require(self.save_every >= 1, f"run.save_every must be at least 1, got {self.save_every}")
        _require(
            self.print_freq is None or self.print_freq >= 1,
            f"run.print_freq must be at least 1, got {self.print_freq}",
        )
        _require(
            self.threads is None or self.threads >= 1,
            f"run.threads must be at least 1, got {self.threads}",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    backbone_phase: BackbonePhaseConfig = field(default_factory=BackbonePhaseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load_preset(path: Path) -> dict[str, Any]:
    """The nested values of a YAML preset, not converted. Raises UserError if it cannot be read."""
    if not path.exists():
        raise UserError(f"there is no preset at {path}; check --config")
    return read_yaml(path, "a preset")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which the nested values of `over` replace its own."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def build(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass of type `cls` from nested values, converted to its fields' types.

    What a section does not give keeps its default in `cls`. where: the dotted name of the section,
    for messages. Raises UserError for an unknown key and for a value that cannot be converted.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'the configuration'} must be a mapping, got {values!r}")
    hints, defaults = typing.get_type_hints(cls), _default_sections(cls)
    converted = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"there is no setting {name!r}; {_nearest(str(key), where, hints)}")
        if key in defaults and isinstance(value, Mapping):
            value = merge(defaults[key], value)
        converted[key] = _convert(value, hints[key], name)
    return cls(**converted)


def _default_sections(cls: type) -> dict[str, dict[str, Any]]:
    """The default values of a dataclass's sections."""
    defaults = {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in dataclasses.fields(cls)
    }
    return {
        name: to_dict(default)
        for name, default in defaults.items()
        if dataclasses.is_dataclass(default) and not isinstance(default, type)
    }


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, which `build` turns back into an equal dataclass."""
    values = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def plain(config: Any) -> Any:
    """The same settings without numbers and texts of numpy, which no file of a run can hold."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's nested settings without the paths of the machine it was trained on."""
    changes: dict[str, dict[str, Any]] = {"data": {"root": None}}
    for section, name in (("model", "backbone"), ("loss", "teacher")):
        if path := values[section].get(name):
            changes[section] = {name: Path(path).name or "."}
    return merge(values, changes)


def differences(old: Mapping, new: Mapping, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ between two nested mappings: dotted name, old and new value."""
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


def _nearest(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """A hint for an unknown key: the nearest known one, or all known ones."""
    prefix = f"{where}." if where else ""
    close = difflib.get_close_matches(key, hints, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    if not where:  # it may be a setting of a section, given without the section's name
        for section, hint in hints.items():
            known = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else ()
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            if close:
                return f"did you mean {section}.{close[0]}?"
    return f"choose one of {', '.join(prefix + name for name in hints)}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`. Raises UserError, naming the setting, if it cannot be."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not types.NoneType), name)
    if origin is Literal:
        # YAML reads a bare off as False
        value = "off" if value is False and "off" in arguments else value
        if value not in arguments:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, arguments[0], name) for item in items)
    try:
        if hint is bool:
            return _as_bool(value)
        if isinstance(value, bool) or value is None or isinstance(value, list | tuple | Mapping):
            raise ValueError
        number = hint(value)
        if hint is int and isinstance(value, float) and number != value:
            raise ValueError
        if hint is float and not math.isfinite(number):
            raise ValueError
        return number
    except (ValueError, TypeError, OverflowError):  # such as a date, or infinity as a whole number
        raise UserError(f"{name} must be {_kind(hint)}, got {value!r}") from None


def _as_bool(value: Any) -> bool:
    """`value` as a bool. Raises ValueError if it is not one."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError


def _kind(hint: type) -> str:
    """A type in words."""
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
