"""A trained run read from its directory: its network, data, records and evaluations."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit import config as configs
from early_exit.choosing.overthinking import confusion, correct_answers
from early_exit.choosing.record import ExitRecord, RecordInfo, record
from early_exit.config import Config
from early_exit.data import file_lists
from early_exit.data.base import Data, FileData
from early_exit.data.splits import Shard
from early_exit.errors import UserError
from early_exit.inference.runtimes.base import Runtime
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.quantise import RULES
from early_exit.inference.runtimes.table import (
    DEPLOYABLE,
    NEEDED_TO_BUILD,
    find_runtime,
    packages_of,
    torch_name,
)
from early_exit.manifest import refuse_deployed
from early_exit.model.cost import Cost, network_cost
from early_exit.model.network import MultiExitNetwork
from early_exit.output import source_run
from early_exit.system import provenance
from early_exit.system.device import (
    autocast_context,
    choose_device,
    choose_precision,
    describe_device,
    set_up,
)
from early_exit.system.directories import restore, restore_all
from early_exit.system.disk_errors import read_error, status
from early_exit.system.locks import locked
from early_exit.system.names import is_hidden
from early_exit.system.text import first_few
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.phases import unfinished

log = logging.getLogger(__name__)

# The machine settings of evaluations, unless overridden; those of training are ignored.
EVALUATION = {"device": "auto", "amp": "off", "threads": None, "compile": False}
CALIBRATION = 256  # images of train, by which the ranges of 8-bit integers are found
HELD_OUT = "held out from train"  # where val came from, in words
CUT_BY = "half of the official test set, cut by seed "  # and the seed


@dataclass(frozen=True)
class Loaded:
    """A trained network, on its device, in eval mode."""

    run_dir: Path
    """The run, or the output of its evaluations (`early_exit.output`)."""
    config: Config
    network: MultiExitNetwork
    classes: tuple[str, ...]
    normalisation: dict[str, list[float]]
    """{"mean": [...], "std": [...]} of the images it was trained on."""
    device: torch.device
    precision: str
    weights: str
    """Hash of the weights, and which they are."""
    val_hash: str
    """Hash of the val images that training held out."""
    unseen_val: str | None
    """Hash of the val images if no weight has seen them."""
    rounded_to: str | None = field(default=None, kw_only=True)
    """What the weights were rounded to (`early_exit.training.rounding`)."""

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """The context that the network runs in."""
        return partial(autocast_context, self.precision, self.device)


@dataclass(frozen=True)
class Trained(Loaded):
    """A trained network with its data, on the device."""

    data: Data
    cost: Cost
    runtime: RuntimeNetwork
    """The network in the runtime in which it is evaluated."""
    gone: tuple[str, ...] = ()
    """Files of val that were removed after the training, and are left out."""


@dataclass(frozen=True)
class Splits:
    """The records of val and test, and the data they index."""

    val: ExitRecord
    test: ExitRecord
    data: Data
    origin: str
    """Where val came from, in words."""
    left_out: tuple[str, ...] = ()
    """Files of val and test that are unreadable or gone, and so neither in records nor in data."""

    @cached_property
    def correct_val(self) -> np.ndarray:
        """Whether each exit on its own is right about each val image, (images, exits) bool."""
        return correct_answers(self.val)

    @cached_property
    def correct_test(self) -> np.ndarray:
        """Whether each exit on its own is right about each test image, (images, exits) bool."""
        return correct_answers(self.test)

    @cached_property
    def confusion(self) -> np.ndarray:
        """The confusion score of each test image, (images,)."""
        return confusion(self.test, self.val)


def check_run_directory(run_dir: Path) -> None:
    """Raises UserError if there is no run directory."""
    refuse_deployed(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run directory at {run_dir}; training prints its path")


def evaluations(run_dir: Path, file: str) -> dict[str, Path]:
    """The paths of `file` in a run's evaluations that have it, by the name of the evaluation, in
    order. A name that begins with a dot was never finished.

    Raises UserError for evaluations that cannot be read.
    """
    directory = run_dir / "eval"
    restore_all(directory)
    try:
        names = sorted(name for name in os.listdir(directory) if not is_hidden(name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise read_error(str(directory), error) from None
    paths = {name: directory / name / file for name in names}
    return {name: path for name, path in paths.items() if status(path)}


def training_commands(run_dir: Path) -> list[list[str]]:
    """The script that trained a run and its flags, and those of resumptions that had others, in
    order and without `--resume`; empty if the run does not say."""
    found: list[list[str]] = []
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        versions = json.loads((run_dir / "versions.json").read_text("utf-8"))
        for part in (versions, *versions.get("resumed", [])):
            words = [str(word) for word in part["command"] if not str(word).startswith("--resume=")]
            if "--resume" in words:
                at = words.index("--resume")
                words[at : at + 2] = []
            if words not in found:
                found.append(words)
    return found


def load_network(
    run_dir: Path, task: Task, overrides: dict, rounded_to: str | None = None
) -> Loaded:
    """The network of a run's newest checkpoint, using the machine as `EVALUATION` says.

    run_dir: the run, which is only read, or the output of its evaluations. overrides: settings of
    the run that are changed, nested as in a preset. rounded_to: as for `checkpoint.reported`; the
    weights of an export may have been rounded before.
    """
    source = source_run(run_dir)
    check_run_directory(source)
    path, state = checkpoint.newest(source)
    if path is None or state is None:
        raise UserError(f"{source} holds no checkpoint; train it first")
    settings = configs.merge(state["config"], {"run": EVALUATION})
    config = configs.build(task.config, configs.merge(settings, overrides))
    device = choose_device(config.run.device)
    network = checkpoint.build_network(state, task, config, path, rounded_to)
    rounded_to = rounded_to or state.get("rounded_to")
    partial_training = unfinished(config, network.num_exits, state["position"])
    if partial_training:
        log.warning("%s is not finished: its weights are those of %s", run_dir, partial_training)
    average = ", running average" if state.get("averaged") else ""
    rounding = f", rounded to {rounded_to}" if rounded_to else ""
    weights = (
        f"weights {checkpoint.weights_hash(network.state_dict())} of"
        f" {partial_training or 'the last epoch'}{average}{rounding}"
    )
    network.to(device).to(memory_format=config.run.memory_format).eval()
    return Loaded(
        run_dir=run_dir,
        config=config,
        network=network,
        classes=tuple(state["classes"]),
        normalisation=state["normalisation"],
        device=device,
        precision=choose_precision(config.run.amp, device),
        weights=weights,
        val_hash=state["val_hash"],
        unseen_val=state["unseen_val"],
        rounded_to=rounded_to,
    )


def unfinished_of(weights: str) -> str | None:
    """How far a run was trained, from its report's description of the weights; None if it was
    finished."""
    found = re.search(r" of (epoch \d+ of \d+, phase \w+)", weights)
    return found and found[1]


def trained_since(run_dir: Path, weights: str, rounded_to: str | None = None) -> bool:
    """Whether a run has other weights now than those that its report is of; False if the run has no
    checkpoint or the report does not say. rounded_to: what the report's were rounded to."""
    found = re.match(r"weights ([0-9a-f]{16})\b", weights)
    try:
        state = checkpoint.newest(source_run(run_dir))[1] if found else None
        if not found or state is None:
            return False
        now = checkpoint.reported(state, rounded_to)
    except UserError:
        return False
    return checkpoint.weights_hash(now) != found[1]


def load_run(
    run_dir: Path,
    task: Task,
    overrides: dict,
    val_from: str = "train",
    runtime: str | None = None,
    rounded_to: str | None = None,
) -> Trained:
    """The network of a run directory and its data, with seeds and threads set.

    rounded_to: as for `load_network`; val_from: as for `get_splits`; runtime: a name of
    `early_exit.inference.runtimes.table`; default: torch, compiled and in reduced precision if the
    settings say so. Raises DataError if the data have other classes, and if val is held out from
    train and the images that the run held out are not there.
    """
    loaded = load_network(run_dir, task, on_their_device(overrides, [runtime]), rounded_to)
    set_up(loaded.config.run)
    data, gone = load_data(loaded, task, val_from)
    file_lists.log_changed_test(data, source_run(run_dir))
    return Trained(
        **vars(loaded),
        data=data,
        cost=network_cost(loaded.network),
        runtime=in_runtime(loaded, data, runtime),
        gone=gone,
    )


def on_their_device(overrides: dict, runtimes: Sequence[str | None]) -> dict:
    """The overrides, with the CPU as the device if they leave it open and all of the runtimes have
    the CPU alone."""
    open_ = overrides.get("run", {}).get("device", EVALUATION["device"]) == "auto"
    if not open_ or not set(runtimes) <= set(DEPLOYABLE):
        return overrides
    return configs.merge(overrides, {"run": {"device": "cpu"}})


def load_data(loaded: Loaded, task: Task, val_from: str) -> tuple[Data, tuple[str, ...]]:
    """The data of a run, on its device, and the files of val that are gone.

    val_from and errors: as for `load_run`.
    """
    data: Data = task.load_data(loaded.config.data).normalised_by(loaded.normalisation)
    file_lists.check_same_classes(data, loaded.run_dir, loaded.classes)
    gone: tuple[str, ...] = ()
    if val_from == "train":
        alternative = ", or cut val from the official test set with --val-from test"
        run = source_run(loaded.run_dir)
        data, gone = file_lists.with_val_of(data, run, loaded.val_hash, alternative)
    return data.to(loaded.device, loaded.config.run.memory_format), gone


def choose_runtime(loaded: Loaded, name: str | None = None) -> Runtime:
    """A runtime on the network's device; name, default: as for `load_run`."""
    settings = loaded.config.run
    if name is None:
        name = torch_name(settings.compile, loaded.precision)
    return find_runtime(name, str(loaded.device), settings.threads or torch.get_num_threads())


def in_runtime(loaded: Loaded, data: Data | None, name: str | None = None) -> RuntimeNetwork:
    """The network in a runtime.

    data: of the run, which 8-bit integers alone need; name, default: as for `load_run`.
    """
    runtime = choose_runtime(loaded, name)
    example = torch.zeros(2, *loaded.network.image_shape, device=loaded.device)
    if runtime.precision == "int8":
        assert data is not None
        example = some_of_train(data, CALIBRATION).to(loaded.device)
    return RuntimeNetwork(loaded.network, runtime, example)


def some_of_train(data: Data, count: int) -> Tensor:
    """Up to `count` images of train, drawn at random with seed 0, prepared as val and test are. In
    class folders the first images would be of one class. Unreadable files are left out."""
    size = data.size("train")
    drawn = np.random.default_rng(0).permutation(size)[:count]
    return torch.cat(list(one_by_one(data, "train", drawn)))


def one_by_one(data: Data, split: str, rows: np.ndarray) -> Iterator[Tensor]:
    """Some images of a split, (1, C, H, W) each, in the order of the rows, prepared as val and test
    are. Unreadable files are left out. Nothing is decoded ahead, so nothing disturbs a clock."""
    for row in rows.tolist():
        for images, _ in data.eval_batches(split, 1, Shard(row, data.size(split))):
            yield images


def first_batch(data: Data, split: str, batch_size: int) -> Tensor | None:
    """The images of the first batch of a split, and nothing decoded ahead; None if none of them can
    be read."""
    alone = Shard(0, -(-data.size(split) // batch_size))
    return next((images for images, _ in data.eval_batches(split, batch_size, alone)), None)


def calibration_of(data: Data) -> str:
    """What a record in 8-bit integers depends on beside its weights: the images that gave the
    ranges of values, and how models are quantised."""
    return f"{data.digest('train')}, rules {RULES}"


def _in_records(runtime: Runtime) -> tuple[str, str, str]:
    """How a record names its runtime: in the name of its directory, its precision, its name. Those
    of eager torch are as before there were other runtimes, float32 being `off`."""
    if not runtime.name.startswith("torch"):
        return runtime.name, runtime.precision, runtime.name
    precision = "off" if runtime.precision == "f32" else runtime.precision
    return precision, precision, "torch"


def record_name(split: str, runtime: str, rounded_to: str | None) -> str:
    """The name of a record's directory. Weights that were rounded have records of their own."""
    return f"{split}-{runtime}" + (f"-weights-{rounded_to}" if rounded_to else "")


def get_record(trained: Trained, split: str) -> ExitRecord:
    """The record of a split of the run's own data, from the output or the run if it is there."""
    data, network, cost = trained.data, trained.network, trained.cost
    runtime = trained.runtime.runtime
    suffix, precision, runtime_name = _in_records(runtime)
    info = RecordInfo(
        split=split,
        split_hash=data.digest(split),
        exit_names=network.exit_names,
        stage_macs=cost.stage_macs,
        head_macs=cost.head_macs,
        precision=precision,
        weights=trained.weights,
        device=describe_device(trained.device),
        runtime=runtime_name,
        calibration=calibration_of(data) if precision == "int8" else "",
        preparation=getattr(data, "preparation", ""),
        packages=_packages(runtime.name),
    )
    name = record_name(split, suffix, trained.rounded_to)
    directory = trained.run_dir / "records" / name
    with locked(directory.parent, wait=True):  # another evaluation may be making it
        restore(directory)
        for place in dict.fromkeys((directory, source_run(trained.run_dir) / "records" / name)):
            if place.exists():
                try:
                    stored = ExitRecord.load(place)
                except UserError as error:
                    log.warning("%s; recording it again", error)
                else:
                    if not (outdated := _outdated(stored, info, data, place)):
                        return stored
                    log.info("%s", outdated)
        log.info("recording every exit on %s in %s", split, runtime.name)
        stamps = data.file_stamps(split) if isinstance(data, FileData) else None
        made = record(
            trained.runtime,
            data.eval_batches(split, data.eval_batch),
            data.size(split),
            info,
            trained.device,
            nullcontext,
            directory,
            partial(data.unreadable, split) if isinstance(data, FileData) else dict,
        )
        file_lists.remember(directory, data, [split], stamps)
        return made


def _packages(runtime: str) -> tuple[str, ...]:
    """The packages that a record in a runtime depends on, with their versions."""
    more = ("pillow", *packages_of(runtime), *NEEDED_TO_BUILD.get(runtime, ()))
    found = provenance.versions(*more)
    return tuple(f"{name} {found[name]}" for name in ("torch", "torchvision", *more))


def _outdated(stored: ExitRecord, info: RecordInfo, data: Data, directory: Path) -> str:
    """Why a stored record is not one of the present network, settings and data, which `info` and
    `data` are; empty if it is."""
    split = info.split
    alike = replace(stored.info, split_hash=info.split_hash, packages=info.packages)
    if not alike.preparation:
        alike = replace(alike, preparation=info.preparation)
    if replace(alike, left_out=(), left_out_names=()) != info:
        return (
            f"the record of {split} is of other weights or settings, or calibrated on other images"
        )
    made_with, installed = stored.info.packages, info.packages
    if made_with and made_with != installed:
        other = ", ".join(name for name in made_with if name not in installed)
        present = ", ".join(name for name in installed if name not in made_with)
        return f"the record of {split} was made with {other}; {present} is installed now"
    if stored.info.split_hash != info.split_hash:
        names = file_lists.remembered(directory, split)
        now = data.file_names(split) if isinstance(data, FileData) else None
        if names is None or now is None:
            return f"the images of {split} have changed since they were recorded"
        if not np.array_equal(names, now):  # otherwise only other files of train have changed
            told = file_lists.changes(names, now) or "their order"
            return f"the files of {split} have changed since they were recorded: {told}"
    left_out = stored.info.left_out
    if isinstance(data, FileData) and len(left_out) > data.bad_files:
        return f"the record of {split} lacks {len(left_out)} images"
    for row, name in zip(left_out, stored.info.left_out_names, strict=True):
        try:
            data.picture(split, row)
        except UserError:
            continue
        return f"{name} can be read now, and is not in the record of {split}"
    return _written_since(data, split, directory) if isinstance(data, FileData) else ""


def _written_since(data: FileData, split: str, directory: Path) -> str:
    """Which files of a split have other content than when they were recorded, by their sizes and
    times; empty if none. One that can no longer be read was recorded while it could."""
    before = file_lists.remembered(directory, file_lists.STAMPS)  # None: of an older version
    now, names = data.file_stamps(split), data.file_names(split)
    if before is None or now is None or names is None or before.shape != now.shape:
        return ""
    written = np.flatnonzero((before != now).any(axis=1))
    for row in written.tolist():
        try:
            data.picture(split, row)
        except UserError:
            continue
        shown = first_few(names[written])
        return f"files of {split} were written since they were recorded: {shown}"
    return ""


def get_splits(trained: Trained, val_from: str, cut_seed: int) -> Splits:
    """The records of val and test.

    val_from: `train`, or `test` to cut the official test set in two by `cut_seed`. Raises UserError
    if the weights may have seen the images of val.
    """
    if val_from == "train" and trained.unseen_val != trained.data.val_hash:
        raise UserError(
            f"the backbone of {trained.run_dir}, or what taught it, was trained on another or an"
            " unknown split and may have seen the val images, so nothing can be fitted on them;"
            " pass --val-from test, which cuts the official test set into val and test"
        )
    test = get_record(trained, "test")
    left_out, data = test.info.left_out_names, recorded(trained.data, test)
    if val_from == "train":
        val = get_record(trained, "val")
        return Splits(
            val,
            test,
            recorded(data, val),
            HELD_OUT,
            (*trained.gone, *val.info.left_out_names, *left_out),
        )
    return Splits(
        *cut_record(test, trained.data, cut_seed),
        data.cut_test(cut_seed),
        f"{CUT_BY}{cut_seed}",
        left_out,
    )


def recorded(data: Data, stored: ExitRecord) -> Data:
    """The data without the images that a record of one of its splits left out."""
    info = stored.info
    return data.without(info.split, info.left_out) if isinstance(data, FileData) else data


def cut_record(test: ExitRecord, data: Data, seed: int) -> tuple[ExitRecord, ExitRecord]:
    """The record of the official test set, cut into val and test. data: what it is a record of."""
    val_half, test_half = recorded(data, test).test_halves(seed)
    name = f"{data.name} test, cut {seed}"
    return (
        test.subset(val_half, "val", f"{name}, val half"),
        test.subset(test_half, "test", f"{name}, test half"),
    )
