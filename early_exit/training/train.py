"""Training: a configuration in, a run directory out."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from early_exit import config as configs
from early_exit.config import Config
from early_exit.data import file_lists
from early_exit.data.base import Data, FileData
from early_exit.errors import UserError
from early_exit.model.checks import check_network
from early_exit.model.heads import POOLED
from early_exit.model.network import MultiExitNetwork, convert_sync_batchnorm
from early_exit.system import distributed, provenance
from early_exit.system.device import describe_device, set_up
from early_exit.system.disk_errors import is_writable
from early_exit.system.distributed import Group
from early_exit.system.files import write_bytes, write_text
from early_exit.system.locks import locked
from early_exit.system.names import is_system_name
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.cuda_graphs import check_can_replay
from early_exit.training.epochs import run_phases
from early_exit.training.journal import summary_writer
from early_exit.training.phases import warn_if_unfinished
from early_exit.training.state import (
    PhaseState,
    Position,
    Run,
    find_resumed,
    position_of_epoch,
    restore,
    save,
)
from early_exit.training.state_dicts import load_into
from early_exit.training.steps import Tally
from early_exit.training.teacher import load_teacher

log = logging.getLogger(__name__)

MAX_NAMED_EXITS = 8  # in a run directory's name: a file system takes 255 bytes


def train(
    config: Config,
    task: Task,
    *,
    runs: Path | str,
    run_dir: Path | str | None = None,
    resume: str | None = None,
    start_epoch: int = 0,
    check: bool = False,
) -> Path:
    """Trains as `config` says and returns the run directory.

    runs: where run directories are. run_dir: the run directory; default: a directory in `runs`,
    named after the configuration. If it exists, `resume` must be given: `auto` or the path of a
    checkpoint. start_epoch: the epoch of the schedule at which a fresh run starts. check: do
    everything but train and write, and log the data and the network.

    Under torchrun every process calls this, and the main one writes. Raises UserError for an error
    the user can fix, Diverged if the loss is not finite, and signals.Stopped after a signal, when
    everything is saved.
    """
    config = configs.plain(config)
    device, precision = set_up(config.run)
    with distributed.process_group(device) as group:
        with group.main_process_first():
            data = task.load_data(config.data)
        network = task.build_network(config, len(data.classes))
        check_network(network)
        check_data(network, data)
        directory = Path(run_dir or default_run_dir(Path(runs), config, network.exit_names))
        run = Run(
            config=config,
            task=task,
            data=data,
            network=network,
            directory=directory,
            device=device,
            precision=precision,
            group=group,
            unseen_val=data.val_hash,
        )
        check_settings(run)
        check_step_size(config, data.size("train"), group)
        check_not_overwritten(directory, resume)
        check_writable(directory)
        with locked(directory) if group.is_main and not check else nullcontext():
            group.barrier()  # no process reads the directory before it is locked
            position, saved = start_position(run, resume, start_epoch)
            check_step_size(config, run.data.size("train"), group)  # files may be gone since then
            trained, teacher = position.phase == len(run.phases), None
            if config.loss.teacher and not trained:  # a trained run no longer needs it
                teacher = load_teacher(run, Path(config.loss.teacher))
            if check:
                log_plan(run)
                check_files(run)
            elif trained:
                log.info("%s is already trained", directory)
            else:
                if saved is None:
                    check_files(run)
                    init_from_train(run)
                if group.is_main:
                    write_settings(run, fresh=saved is None)
                log_network(run)
                run_phases(run, position, saved, teacher)
    return directory


def start_position(
    run: Run, resume: str | None, start_epoch: int
) -> tuple[Position, dict[str, Any] | None]:
    """Moves network and data to the device, with the weights of the checkpoint to resume from, if
    there is one. Returns where training starts, and the checkpoint's content or None."""
    path, saved = find_resumed(resume, run.directory)
    if run.group.broadcast(str(path)) != str(path):
        raise UserError(
            f"process {run.group.rank} finds another checkpoint in {run.directory} than the main"
            " process; the run directory must be on storage that all machines share"
        )
    if saved and "optimizer" not in saved:
        raise UserError(
            f"{path} is of an export, which lacks what training needs; resume the run that it was"
            " made of, or train from its weights with --backbone and --regime mixed or frozen"
        )
    if saved and start_epoch:
        raise UserError(f"--start-epoch is for a fresh run; this one resumes from {path}")
    to_device(run, saved)
    if path and saved:
        return restore(run, path, saved), saved
    return position_of_epoch(run.phases, start_epoch), None


def adopt(
    network: MultiExitNetwork,
    task: Task,
    config: Config,
    data: Data,
    run_dir: Path | str,
    *,
    val_unseen: bool = True,
) -> Path:
    """Makes a run directory of a network that was trained elsewhere, so that it can be evaluated,
    exported, compared and used to predict. Returns the directory.

    network: as `task` builds it from `config`, trained on the train images of `data`, normalised as
    they are. run_dir: the directory, which must not exist. val_unseen: whether no weight has seen
    the val images; otherwise an evaluation asks for --val-from test.

    Raises UserError if the task builds another network, and if the directory exists.
    """
    run_dir = Path(run_dir)
    if run_dir.exists():
        raise UserError(f"{run_dir} exists; name another directory")
    check_writable(run_dir)
    config = configs.plain(config)
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        built = task.build_network(config, len(data.classes))
    owner = "the network that the task builds from this configuration"
    load_into(built, network.state_dict(), Path("the trained network"), owner)
    check_network(network)
    check_data(network, data)
    run = Run(
        config=config,
        task=task,
        data=data,
        network=network,
        directory=run_dir,
        device=next(network.parameters()).device,
        precision="off",
        group=Group(),
        unseen_val=data.val_hash if val_unseen else None,
    )
    end = Position(len(run.phases))
    state = PhaseState(
        position=end,
        optimizer=torch.optim.SGD(network.parameters()),  # a checkpoint needs one; never used
        scaler=torch.amp.GradScaler(run.device.type, enabled=False),
        tally=Tally(network.num_exits, run.device),
        average=None,
    )
    with locked(run_dir):
        write_settings(run, fresh=True)
        save(run, state, end)
    return run_dir


def to_device(run: Run, saved: dict[str, Any] | None) -> None:
    """Moves network and data to the run's device, in its memory layout.

    The images are normalised as for the checkpoint `saved`. Without one, the weights of
    `model.backbone` are loaded, if it is set, and the images are normalised as for it.
    """
    config, meta = run.config, saved or {}
    if not saved and config.model.backbone:
        trains_backbone = not run.phases[-1].backbone_frozen
        path = Path(config.model.backbone)
        advice = "; --regime mixed trains a new one, the other regimes keep the file's"
        meta = checkpoint.load_backbone_into(run.network, path, trains_backbone, advice)
        if run.group.is_main:
            warn_if_unfinished(meta, type(config), path)
        if meta.get("unseen_val") != run.data.val_hash:
            run.unseen_val = None
    normalised = run.data.normalised_by(meta.get("normalisation"))
    run.data = normalised.to(run.device, config.run.memory_format)
    run.network.to(run.device).to(memory_format=config.run.memory_format)
    if config.run.sync_bn:
        convert_sync_batchnorm(run.network)


def init_from_train(run: Run) -> None:
    """Lets a backbone without trained weights set its first ones from train images, if it has a
    method `init_from_images`. Every process passes it the same images, in the order and with the
    augmentation of the first epoch."""
    init = getattr(run.network.backbone, "init_from_images", None)
    if init and not run.config.model.backbone:
        size, seed = run.config.optim.batch_size, run.config.run.seed
        init(images for images, _ in run.data.train_batches(size, seed, 0))


def default_run_dir(runs: Path, config: Config, exit_names: Sequence[str]) -> Path:
    """runs/NAME, where NAME gives data set, network, exits, regime and seed.

    exit_names: perhaps those of a network of other classes, whose default exits may be more; so
    these are not counted, but in the name of a directory that an older version made."""
    dataset, seed = config.data.dataset or "data", f"seed{config.run.seed}"

    def named(*words: str) -> Path:
        return runs / "-".join([dataset, config.model.arch, *words, seed])

    early, regime = exit_names[:-1], config.run.regime
    if not early:
        return named("plain")
    if len(early) <= MAX_NAMED_EXITS:
        return named(*early, regime)
    counted = named(f"{len(early)}exits", regime)
    if config.model.exits is not None or counted.exists():
        return counted
    return named("default-exits", regime)


def check_settings(run: Run) -> None:
    """Raises UserError for settings that the device does not support."""
    config, device = run.config, run.device
    pooled = set(config.model.head) & set(POOLED) and run.phases[-1].name == "joint"
    if config.run.deterministic and device.type == "cuda" and pooled:
        raise UserError(
            f"--deterministic on a GPU cannot train {' '.join(config.model.head)} heads with the"
            " backbone: pooling to a grid has no deterministic gradient there; use --head conv, or"
            " a regime that freezes the backbone"
        )
    check_can_replay(run)
    if config.run.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn needs a GPU: torch has no synchronised BatchNorm on a CPU")
    if config.run.sync_bn and run.group.world == 1:
        log.warning("--sync-bn has no effect in one process; torchrun starts several")
    if config.run.tensorboard:
        summary_writer()


def check_data(network: MultiExitNetwork, data: Data) -> None:
    """Raises UserError for classes that are not named in words, and if images in memory have
    another shape than the network's example, by which costs are counted, photos are resized and
    segments are exported."""
    for name in data.classes:
        if not isinstance(name, str):
            raise UserError(
                f"the classes of {data.name} must be text, got {name} ({type(name).__name__});"
                " give str(...) of each"
            )
    shape = getattr(data, "image_shape", network.image_shape)
    if shape != network.image_shape:
        raise UserError(
            f"the images of {data.name} are {shape}, and the network was built for"
            f" {network.image_shape}; give it an example of the images' shape (channels, height,"
            " width)"
        )


def check_step_size(config: Config, images: int, group: Group) -> None:
    """Raises UserError if a step cannot be split evenly, or needs more than the `images` of
    train."""
    size, micro_batches = config.optim.batch_size, config.optim.accumulate
    parts = group.world * micro_batches
    if size % parts or size < 2 * parts:
        raise UserError(
            f"a step of {size} images cannot be split into {parts} equal micro-batches of at least"
            f" 2 images ({group.world} processes with {micro_batches} each); change --batch-size or"
            " --accumulate"
        )
    if size > images:
        raise UserError(
            f"a step of {size} images is more than the {images} train images; lower --batch-size"
        )


def check_not_overwritten(directory: Path, resume: str | None) -> None:
    """Raises UserError if the run directory exists and `resume` does not refer to it."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --save-dir")
    # a directory with only a lock is of a run that ended before it began
    exists = directory.is_dir() and any(
        name != ".lock" and not is_system_name(name) for name in os.listdir(directory)
    )
    elsewhere = resume not in (None, "auto") and not (
        Path(resume).resolve().is_relative_to(directory.resolve())
    )
    if exists and (resume is None or elsewhere):
        raise UserError(
            f"{directory} exists; pass --resume auto to resume it, or choose another --save-dir"
        )


def check_writable(directory: Path) -> None:
    """Raises UserError if the run directory cannot be made or written, without trying to."""
    if not is_writable(directory):
        raise UserError(f"{directory} cannot be written; choose another --save-dir")


def check_files(run: Run) -> None:
    """Reads the headers of the held-out images in the main process, which can take minutes on a
    network disk; the others wait. Raises UserError if too many are unreadable."""
    if isinstance(run.data, FileData) and getattr(run.config.data, "check_files", True):
        with run.group.main_process_first():
            if run.group.is_main:
                run.data.check_headers()


def write_settings(run: Run, fresh: bool) -> None:
    """Writes config.yaml and versions.json, and the names of the data's files.

    fresh: whether nothing was trained yet; the names are those at the start of the training.
    """
    written = (checkpoint.NAME, "config.yaml", "versions.json", "metrics.jsonl", file_lists.NAME)
    for name in written:
        for incomplete in run.directory.glob(f".{name}.*"):
            with suppress(OSError):
                incomplete.unlink()  # of a process that was killed while it wrote
    config = yaml.safe_dump(configs.to_dict(run.config), sort_keys=False)
    write_text(run.directory / "config.yaml", config)
    versions = {
        **provenance.versions(),
        "device": describe_device(run.device),
        "processes": run.group.world,
        "precision": run.precision,
        "command": sys.argv,
    }
    path = run.directory / "versions.json"
    if not fresh:  # what began the run stays: its command is the one that makes the result
        _continue_in(run.directory, Path(run.last_good).parent)
        with suppress(OSError, ValueError, TypeError):
            began = json.loads(path.read_text("utf-8"))
            versions = {**began, "resumed": [*began.get("resumed", []), versions]}
    write_text(path, json.dumps(versions, indent=2) + "\n")
    if fresh or not (run.directory / file_lists.NAME).exists():
        file_lists.remember(run.directory, run.data)


def _continue_in(directory: Path, begun: Path) -> None:
    """Copies the journal, and what a run began with, if it is resumed in another directory."""
    for name in ("metrics.jsonl", "versions.json", file_lists.NAME):
        if not (directory / name).exists():
            with suppress(OSError):
                write_bytes(directory / name, (begun / name).read_bytes())


def log_plan(run: Run) -> None:
    """Logs the data and the network."""
    log.info(
        "train %d, val %d, test %d images of %d classes",
        *(run.data.size(split) for split in ("train", "val", "test")),
        len(run.data.classes),
    )
    log_network(run)


def log_network(run: Run) -> None:
    """Logs the run directory, the network's size and the cost of its exits."""
    log.info("run directory %s", run.directory)
    processes = f" x {run.group.world}" if run.group.world > 1 else ""
    log.info(
        "%s on %s: %.2f M MACs, %.3f M parameters; %s%s; amp %s",
        run.config.model.arch,
        run.data.name,
        run.cost.plain_macs / 1e6,
        run.cost.backbone_params / 1e6,
        describe_device(run.device),
        processes,
        run.precision,
    )
    for name, share, head in zip(
        run.cost.exit_names, run.cost.shares(), run.cost.head_macs, strict=True
    ):
        log.info(
            "exit %-9s costs %5.1f %% of the plain network, its head %.1f %%",
            name,
            100 * share,
            100 * head / run.cost.plain_macs,
        )
