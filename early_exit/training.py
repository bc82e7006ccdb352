"""The whole walk of a training: configuration in, run directory out."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from early_exit import checkpoint, distributed, runtime
from early_exit import config as configs
from early_exit.config import Config
from early_exit.cost import network_cost
from early_exit.disk import locked, write_text
from early_exit.distributed import Group
from early_exit.engine import Tally
from early_exit.epochs import walk
from early_exit.errors import UserError
from early_exit.experiment import (
    Data,
    FrontDoor,
    Phase,
    layout,
    load_backbone,
    plan_phases,
    setup,
)
from early_exit.heads import POOLED
from early_exit.network import MultiExitNetwork, synchronise_norms
from early_exit.resuming import (
    Position,
    Run,
    Trainee,
    find_resumed,
    nth_epoch,
    restore,
    save,
)

log = logging.getLogger(__name__)

MOST_NAMED = 8  # exits in a run directory's name


def train(
    config: Config,
    door: FrontDoor,
    *,
    runs: Path | str,
    run_dir: Path | str | None = None,
    resume: str | None = None,
    start_epoch: int = 0,
    check: bool = False,
) -> Path:
    """Trains what `config` says and returns the run directory.

    run_dir: where to; None: a name made from the configuration under `runs`. An existing one is
    refused without `resume`, which is `auto` or a checkpoint's path. start_epoch: begin a fresh
    run at this epoch of its schedule. check: do everything but train and write; log the resolved
    configuration.

    Under torchrun every process calls this, and the first one writes. Raises UserError for what
    the user can mend, Diverged where the loss is not finite, and runtime.Stopped once a signal came
    and everything is saved.
    """
    device, precision = setup(config)
    with distributed.joined(device) as group:
        with group.leader_first():
            data = door.load_data(config.data)
        network = door.build_network(config, len(data.classes))
        phases = plan_phases(config, network.num_exits)
        refuse_misfits(config, phases, data.size("train"), device, group)
        directory = Path(run_dir or default_run_dir(Path(runs), config, network.exit_names))
        refuse_existing(directory, resume)
        refuse_unwritable(directory)
        with locked(directory) if group.leads and not check else nullcontext():
            group.wait()  # nobody reads before the directory is ours
            path, state = find_resumed(resume, directory)
            if group.leaders(str(path)) != str(path):
                raise UserError(
                    f"{directory} looks otherwise from process {group.rank} than from the first;"
                    " the run directory must lie where all machines see it"
                )
            if state and start_epoch:
                raise UserError(
                    f"--start-epoch is for a fresh run; this one goes on where {path} stands"
                )
            run = Run(
                config, data, network, network_cost(network), phases, directory, device, precision,
                group, data.val_hash, door.loss,
            )
            place(run, state)
            position = restore(run, path, state) if state else nth_epoch(phases, start_epoch)
            if check:
                show_plan(run)
            elif position.phase == len(phases):
                log.info("%s is trained already", directory)
            else:
                if group.leads:
                    write_settings(run)
                describe(run)
                walk(run, position, state)
    return directory


def adopt(
    network: MultiExitNetwork,
    door: FrontDoor,
    config: Config,
    data: Data,
    run_dir: Path | str,
    *,
    val_unseen: bool = True,
) -> Path:
    """Makes a run directory of a network that was trained elsewhere, so that everything that takes
    one takes it: evaluation, predict, export, compare. Returns it.

    network: what `door` builds from `config`, trained on the train images of `data` and normalised
    as they are. run_dir: where to; it must not exist. val_unseen: whether no weight has seen the
    val images; if not, an evaluation asks for --val-from test.

    Raises UserError where the door builds another network, and for a directory that exists.
    """
    run_dir = Path(run_dir)
    if run_dir.exists():
        raise UserError(f"{run_dir} exists; name another directory")
    refuse_unwritable(run_dir)
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        twin = door.build_network(config, len(data.classes))
    checkpoint.load_into(twin, network.state_dict(), Path("the network"))
    device = next(network.parameters()).device
    phases = plan_phases(config, network.num_exits)
    run = Run(
        config, data, network, network_cost(network), phases, run_dir, device, "off", Group(),
        data.val_hash if val_unseen else None, door.loss,
    )
    trainee = Trainee(
        Position(len(phases)), torch.optim.SGD(network.parameters()),  # nobody trains on
        torch.amp.GradScaler(device.type, enabled=False), Tally(network.num_exits, device), None,
    )
    with locked(run_dir):
        write_settings(run)
        save(run, trainee, trainee.position)
    return run_dir


def place(run: Run, state: dict[str, Any] | None) -> None:
    """Brings network and data to the run's device, in its layout and normalisation: those of the
    checkpoint's `state`, or of the trained backbone, which is put in where there is no state."""
    config, meta = run.config, state or {}
    if not state and config.model.backbone:
        meta = load_backbone(run.network, Path(config.model.backbone))
        if meta.get("unseen_val") != run.data.val_hash:
            run.unseen_val = None
    normalised = run.data.normalised_by(meta.get("normalisation"))
    run.data = normalised.to(run.device, layout(config))
    run.network.to(device=run.device, memory_format=layout(config))
    if config.run.sync_bn:
        synchronise_norms(run.network)


def show_plan(run: Run) -> None:
    """Logs the resolved configuration, the data and the network."""
    log.info("%s", yaml.safe_dump(configs.to_dict(run.config), sort_keys=False).rstrip())
    log.info(
        "train %d, val %d, test %d images of %d classes",
        *(run.data.size(split) for split in ("train", "val", "test")), len(run.data.classes),
    )
    describe(run)


def default_run_dir(runs: Path, config: Config, exit_names: Sequence[str]) -> Path:
    """runs/NAME, where the name says data set, network, exits, regime and seed."""
    parts, early = [config.data.dataset or "data", config.model.arch], list(exit_names[:-1])
    if len(early) > MOST_NAMED:  # a file system takes 255 letters
        early = [f"{len(early)}exits"]
    parts += [*early, config.run.regime] if early else ["plain"]
    return runs / "-".join([*parts, f"seed{config.run.seed}"])


def refuse_misfits(
    config: Config, phases: list[Phase], images: int, device: torch.device, group: Group
) -> None:
    """Raises UserError for settings that do not go with this machine or with each other."""
    pooled = set(config.model.head) & set(POOLED) and phases[-1].name == "joint"
    if config.run.deterministic and device.type == "cuda" and pooled:
        raise UserError(
            f"--deterministic on a GPU goes with {' '.join(config.model.head)} heads only on a"
            " frozen backbone: pooling to a grid has no deterministic gradient there; take --head"
            " conv"
        )
    if config.run.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn is for GPUs: torch has no synchronised BatchNorm on a CPU")
    size, goes = config.optim.batch_size, config.optim.accumulate
    parts = group.world * goes
    if size % parts or size < 2 * parts:
        raise UserError(
            f"a step of {size} images cannot be cut into {parts} equal parts of two or more"
            f" ({group.world} processes, {goes} goes each); change --batch-size or --accumulate"
        )
    if size > images:
        raise UserError(
            f"a step of {size} images is more than the {images} there are to train on; lower"
            " --batch-size"
        )


def refuse_existing(directory: Path, resume: str | None) -> None:
    """Raises UserError for a run directory that is not to be gone on with."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; choose another --save-dir")
    # a lock alone was left by a run that a mistake in its flags ended
    exists = directory.is_dir() and any(path.name != ".lock" for path in directory.iterdir())
    elsewhere = resume not in (None, "auto") and not (
        Path(resume).resolve().is_relative_to(directory.resolve())
    )
    if exists and (resume is None or elsewhere):
        raise UserError(
            f"{directory} exists; pass --resume auto to go on with it, or another --save-dir"
        )


def refuse_unwritable(directory: Path) -> None:
    """Raises UserError where the run directory could not be made or written, without trying it."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} cannot be written; choose another --save-dir")


def write_settings(run: Run) -> None:
    """Writes config.yaml and versions.json."""
    for stray in run.directory.glob(f".{checkpoint.NAME}*"):
        stray.unlink()  # half a file of a killed process
    written = yaml.safe_dump(configs.to_dict(run.config), sort_keys=False)
    write_text(run.directory / "config.yaml", written)
    versions = {
        **runtime.versions(),
        "device": runtime.describe_device(run.device),
        "processes": run.group.world,
        "precision": run.precision,
        "command": sys.argv,
    }
    write_text(run.directory / "versions.json", json.dumps(versions, indent=2) + "\n")


def describe(run: Run) -> None:
    """Logs where the run goes, the network's exits and their price."""
    log.info("run directory %s", run.directory)
    several = f" x {run.group.world}" if run.group.world > 1 else ""
    log.info(
        "%s on %s: %.2f M MACs, %.3f M parameters; %s%s; amp %s",
        run.config.model.arch, run.data.name, run.cost.plain_macs / 1e6,
        run.cost.backbone_params / 1e6, runtime.describe_device(run.device), several, run.precision,
    )
    for name, share, head in zip(
        run.cost.exit_names, run.cost.shares(), run.cost.head_macs, strict=True
    ):
        log.info(
            "exit %-9s costs %5.1f %% of the plain network, its head %.1f %%",
            name, 100 * share, 100 * head / run.cost.plain_macs,
        )
