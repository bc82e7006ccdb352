"""The whole walk of a training: configuration in, run directory out."""

import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from early_exit import checkpoint, config as configs, runtime
from early_exit.config import Config, DataConfig, ModelConfig, OptimConfig
from early_exit.cost import Cost, network_cost
from early_exit.engine import (
    Tally,
    lr_at,
    make_optimizer,
    score_batches,
    set_training_mode,
    train_steps,
)
from early_exit.errors import UserError
from early_exit.losses import joint_loss, resolve_weights
from early_exit.network import MultiExitNetwork

log = logging.getLogger(__name__)

EVAL_BATCH = 500


class Diverged(RuntimeError):
    """The loss is not finite, so nothing more can be learned from here."""


class Data(Protocol):
    """What a front door's data set offers (`cifar10.data.Data`)."""

    name: str
    classes: tuple[str, ...]
    val_hash: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to(self, device: torch.device) -> "Data": ...
    def steps_per_epoch(self, batch_size: int) -> int: ...
    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]: ...
    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class FrontDoor:
    """What the scripts of a data set bring along."""

    build_network: Callable[[ModelConfig, int], MultiExitNetwork]
    """From the network's settings and the number of classes."""
    load_data: Callable[[DataConfig, dict | None], Data]
    """From the data's settings and a checkpoint's normalisation, if any."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training with an optimiser of its own."""

    name: str
    """plain, backbone, joint or heads."""
    optim: OptimConfig
    weights: tuple[float, ...]
    """Loss weight of each exit that is computed."""

    @property
    def backbone_only(self) -> bool:
        """Whether only the plain network is computed."""
        return self.name in ("plain", "backbone")


@dataclass
class Position:
    """How far a run is: the next step of the epoch of the phase."""

    phase: int = 0
    epoch: int = 0
    step: int = 0


def plan_phases(config: Config, num_exits: int) -> list[Phase]:
    """The phases of a regime: `joint` has one, `mixed` and `frozen` train the backbone first
    unless a checkpoint brings it."""
    weights = resolve_weights(config.loss.weights, num_exits)
    given, optim = config.model.backbone is not None, config.optim
    if num_exits == 1:
        return [Phase("plain", optim, (1.0,))]
    if config.run.regime == "joint":
        return [Phase("joint", optim, weights)]
    first = dataclasses.replace(
        optim,
        epochs=config.backbone_phase.epochs or optim.epochs,
        lr=config.backbone_phase.lr or optim.lr,
    )
    phases = [] if given else [Phase("backbone", first, (1.0,))]
    if config.run.regime == "mixed":
        return [*phases, Phase("joint", optim, weights)]
    if not any(weights[:-1]):
        raise UserError("the frozen regime trains the heads alone, and their loss weights are 0")
    return [*phases, Phase("heads", optim, (*weights[:-1], 0.0))]


def default_run_dir(runs: Path, config: Config, exit_names: tuple[str, ...]) -> Path:
    """runs/NAME, where the name says data set, network, exits, regime and seed."""
    parts = [config.data.dataset, config.model.arch]
    parts += [*exit_names[:-1], config.run.regime] if len(exit_names) > 1 else ["plain"]
    return runs / "-".join([*parts, f"seed{config.run.seed}"])


def load_backbone(network: MultiExitNetwork, path: Path) -> dict[str, Any]:
    """Puts a plain network's weights into the backbone; returns what the file says of itself."""
    weights, meta = checkpoint.load_backbone(path)
    checkpoint.load_into(network.backbone, weights, path)
    return meta


def setup(config: Config) -> tuple[torch.device, str]:
    """Device and precision, with seeds and threads set."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    runtime.seed_everything(config.run.seed, config.run.deterministic)
    device = runtime.choose_device(config.run.device)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.run.deterministic
    return device, runtime.choose_precision(config.run.amp, device)


def find_resumed(resume: str | None, run_dir: Path | None) -> tuple[Path | None, dict | None]:
    """The checkpoint to go on from: its path and content, or nothing for a fresh start.

    `auto` looks in the run directory and may find none; a path must exist.
    """
    if resume is None:
        return None, None
    if resume == "auto":
        path = checkpoint.newest(run_dir) if run_dir else None
    else:
        path = Path(resume)
        if not path.exists():
            raise UserError(f"there is no checkpoint at {path}; check --resume")
        if path.is_dir():
            path = checkpoint.newest(path)
            if path is None:
                raise UserError(f"{resume} holds no checkpoint; --resume auto starts where none is")
    return (path, checkpoint.load(path)) if path else (None, None)


def train(
    config: Config,
    door: FrontDoor,
    *,
    runs: Path,
    run_dir: Path | None = None,
    resume: str | None = None,
    start_epoch: int = 0,
) -> Path:
    """Trains what `config` says and returns the run directory.

    run_dir: where to; None: a name made from the configuration under `runs`. An existing one is
    refused without `resume`, which is `auto` or a checkpoint's path. start_epoch: begin a fresh
    run at this epoch of its schedule.

    Raises UserError for what the user can mend, Diverged where the loss is not finite, and
    runtime.Stopped once a signal came and everything is saved.
    """
    device, precision = setup(config)
    normalisation, unseen_elsewhere = None, None
    if config.model.backbone:
        _, meta = checkpoint.load_backbone(Path(config.model.backbone))
        normalisation, unseen_elsewhere = meta.get("normalisation"), meta.get("unseen_val")
    data = door.load_data(config.data, normalisation).to(device)
    network = door.build_network(config.model, len(data.classes))
    cost = network_cost(network)
    phases = plan_phases(config, network.num_exits)
    unseen_val: str | None = data.val_hash
    if config.model.backbone:
        if phases[0].name in ("plain", "joint") and config.run.regime == "joint":
            raise UserError(
                "--backbone was given, but joint training starts from scratch; "
                "add --regime mixed or --regime frozen (or -e to score it)"
            )
        load_backbone(network, Path(config.model.backbone))
        unseen_val = data.val_hash if unseen_elsewhere == data.val_hash else None
    network.to(device=device, memory_format=_layout(config))

    run_dir = run_dir or default_run_dir(runs, config, network.exit_names)
    fresh_dir = not run_dir.exists() or not any(run_dir.iterdir())
    with runtime.locked(run_dir):
        path, state = find_resumed(resume, run_dir)
        if resume is None and not fresh_dir:
            raise UserError(
                f"{run_dir} exists; pass --resume auto to go on with it, or another --save-dir"
            )
        if state and start_epoch:
            raise UserError(
                f"--start-epoch is for a fresh run; this one goes on where {path} stands"
            )
        run = _Run(config, data, network, cost, phases, run_dir, device, precision, unseen_val)
        position = _position_of_epoch(phases, start_epoch)
        if state:
            position = run.restore(path, state)
        else:
            log.info("run directory %s", run_dir)
        run.describe()
        run.walk(position, state)
    return run_dir


def _position_of_epoch(phases: list[Phase], epoch: int) -> Position:
    """The start of the epoch'th epoch, counted through all phases."""
    total = sum(phase.optim.epochs for phase in phases)
    if not 0 <= epoch < total:
        raise UserError(f"--start-epoch is {epoch}, the run has epochs 0 to {total - 1}")
    for index, phase in enumerate(phases):
        if epoch < phase.optim.epochs:
            return Position(index, epoch)
        epoch -= phase.optim.epochs
    raise AssertionError("unreachable")


# Settings that a resumed run cannot change without being another run.
FIXED = ("data.", "model.", "run.regime", "run.seed", "optim.batch_size")


class _Run:
    """The state of one training and the walk through its phases."""

    def __init__(
        self,
        config: Config,
        data: Data,
        network: MultiExitNetwork,
        cost: Cost,
        phases: list[Phase],
        run_dir: Path,
        device: torch.device,
        precision: str,
        unseen_val: str | None,
    ) -> None:
        self.config, self.data, self.network, self.cost = config, data, network, cost
        self.phases, self.run_dir, self.device, self.precision = phases, run_dir, device, precision
        self.unseen_val = unseen_val
        self.autocast = partial(runtime.autocast, precision, device)
        self.last_good = "none was saved"
        self.stop = runtime.StopSignals()

    # --- what the run directory holds -------------------------------------------------------

    def describe(self) -> None:
        """Writes config.yaml and versions.json, and logs the network's exits and their price."""
        for stray in self.run_dir.glob(f".{checkpoint.NAME}*"):
            stray.unlink()  # half a file of a killed process
        written = yaml.safe_dump(configs.to_dict(self.config), sort_keys=False)
        checkpoint.write_text(self.run_dir / "config.yaml", written)
        versions = {
            **runtime.versions(),
            "device": runtime.describe_device(self.device),
            "precision": self.precision,
            "command": sys.argv,
        }
        checkpoint.write_text(self.run_dir / "versions.json", json.dumps(versions, indent=2) + "\n")
        log.info(
            "%s on %s: %.2f M MACs, %.3f M parameters; %s, %s",
            self.config.model.arch, self.data.name, self.cost.plain_macs / 1e6,
            self.cost.backbone_params / 1e6, runtime.describe_device(self.device), self.precision,
        )  # fmt: skip
        for name, share, head in zip(
            self.cost.exit_names, self.cost.shares(), self.cost.head_macs, strict=True
        ):
            log.info(
                "exit %-9s costs %5.1f %% of the plain network, its head %.1f %%",
                name, 100 * share, 100 * head / self.cost.plain_macs,
            )  # fmt: skip

    def save(self, position: Position, optimizer, scaler, tally: Tally | None) -> None:
        """Writes the newest checkpoint."""
        try:
            checkpoint.save(
                self.run_dir,
                {
                    "network": self.network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": runtime.rng_state(),
                    "position": dataclasses.asdict(position),
                    "tally": tally.state_dict() if tally else None,
                    "config": configs.to_dict(self.config),
                    "exit_names": list(self.network.exit_names),
                    "classes": list(self.data.classes),
                    "normalisation": {"mean": list(self.data.mean), "std": list(self.data.std)},
                    "val_hash": self.data.val_hash,
                    "unseen_val": self.unseen_val,
                    "versions": runtime.versions(),
                },
            )
        except OSError as error:
            raise UserError(
                f"no checkpoint could be written to {self.run_dir} ({error.strerror});"
                f" the last good one is whole: {self.last_good}"
            ) from None
        self.last_good = str(self.run_dir / checkpoint.NAME)

    def restore(self, path: Path, state: dict) -> Position:
        """Puts a checkpoint's weights in and returns where it stood."""
        saved, now = state["config"], configs.to_dict(self.config)
        changed = list(configs.differences(saved, now))
        for name, before, after in changed:
            if name.startswith(FIXED) and name not in ("data.root", "model.backbone"):
                raise UserError(
                    f"{path} was trained with {name} = {_shown(before)}, this run asks for"
                    f" {_shown(after)}; resume with the former, or start another --save-dir"
                )
        if state["val_hash"] != self.data.val_hash:
            raise UserError(
                f"{path} held out other val images ({state['val_hash']}) than this data set gives"
                f" ({self.data.val_hash}); check the data under --data"
            )
        checkpoint.load_into(self.network, state["network"], path)
        self.unseen_val = state["unseen_val"]
        self.last_good = str(path)
        position = Position(**state["position"])
        if position.phase < len(self.phases):
            done = position.epoch
            total = self.phases[position.phase].optim.epochs
            if done > total:
                raise UserError(f"{path} has done {done} epochs, --epochs asks for {total}")
        log.info(
            "going on from %s: phase %d, epoch %d, step %d%s",
            path, position.phase, position.epoch, position.step,
            "".join(f"; {n} was {_shown(a)}, now {_shown(b)}" for n, a, b in changed),
        )  # fmt: skip
        return position

    # --- the walk ---------------------------------------------------------------------------

    def walk(self, position: Position, state: dict | None) -> None:
        """Every phase from `position` on."""
        with self.stop:
            if state:
                runtime.set_rng_state(state["rng"])
            with Metrics(self.run_dir, position, self.config.run.tensorboard) as metrics:
                for index in range(position.phase, len(self.phases)):
                    if index != position.phase:
                        position, state = Position(index), None
                    self._walk_phase(index, position, state, metrics)

    def _walk_phase(self, index: int, position: Position, state: dict | None, metrics) -> None:
        phase, config = self.phases[index], self.config
        frozen = phase.name == "heads"
        network = self.network.backbone if phase.backbone_only else self.network
        forward = (lambda images: [network(images)]) if phase.backbone_only else network
        if config.run.compile:
            network.compile()
        set_training_mode(self.network, frozen)
        optimizer = make_optimizer(network, phase.optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        tally = None
        if state:
            _load_optimizer(optimizer, state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            tally = state["tally"]
        loss_fn = partial(
            joint_loss,
            weights=phase.weights,
            label_smoothing=phase.optim.label_smoothing,
            distill=config.loss.distill,
            distill_temperature=config.loss.distill_temperature,
        )
        exit_names = self.network.exit_names[-len(phase.weights) :]
        for epoch in range(position.epoch, phase.optim.epochs):
            here = Position(index, epoch, position.step if epoch == position.epoch else 0)
            sums = Tally(len(phase.weights), self.device)
            if tally and here.step:
                sums.load_state_dict(tally)
            save = partial(self.save, optimizer=optimizer, scaler=scaler)
            set_training_mode(self.network, frozen)
            trained = self._train_epoch(
                phase, here, sums, forward, loss_fn, optimizer, scaler, save, exit_names
            )
            self.network.eval()
            held_out = Tally(len(phase.weights), self.device)
            plain_loss = partial(joint_loss, weights=phase.weights)
            batches = self.data.eval_batches("val", EVAL_BATCH)
            for _ in score_batches(forward, batches, plain_loss, self.autocast, held_out):
                self._stop_if_asked(here, sums, save)
            val_loss, val_top1 = held_out.read()
            metrics.write(
                {
                    "phase": phase.name,
                    "phase_index": index,
                    "epoch": epoch,
                    **trained,
                    "val_loss": val_loss,
                    "val_top1": dict(zip(exit_names, val_top1, strict=True)),
                }
            )
            last = epoch + 1 == phase.optim.epochs
            if last or (epoch + 1) % config.run.save_every == 0:
                following = Position(index + 1) if last else Position(index, epoch + 1)
                save(following, tally=None)

    def _train_epoch(
        self, phase, here, sums, forward, loss_fn, optimizer, scaler, save, exit_names
    ) -> dict[str, Any]:
        """The steps of one epoch from `here` on; returns its line of metrics."""
        config, optim = self.config, phase.optim
        total = self.data.steps_per_epoch(optim.batch_size)
        order = 1000 * here.phase + here.epoch  # a seed of its own for every epoch of every phase
        batches = self.data.train_batches(optim.batch_size, config.run.seed, order, here.step)
        rates = (lr_at(optim, here.epoch + step / total) for step in range(here.step, total))
        steps = train_steps(
            forward, batches, loss_fn, optimizer, scaler, self.autocast, rates, sums
        )
        shown = config.run.print_freq or 20
        lines = config.run.print_freq and not sys.stderr.isatty()
        runtime.synchronize(self.device)
        began, first = time.perf_counter(), here.step
        bar = tqdm(
            total=total * optim.batch_size, initial=here.step * optim.batch_size, unit="img",
            desc=f"{phase.name} {here.epoch + 1}/{optim.epochs}", leave=False,
            disable=not sys.stderr.isatty(), dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            for _ in steps:
                here.step += 1
                bar.update(optim.batch_size)
                if here.step % shown == 0 and (lines or not bar.disable):
                    self._check_finite(here, sums)
                    text = _line(*sums.read(), exit_names)
                    bar.set_postfix_str(text, refresh=False)
                    if lines:
                        log.info("%s: step %d/%d, %s", bar.desc, here.step, total, text)
                self._stop_if_asked(here, sums, save)
        self._check_finite(here, sums)
        seconds = time.perf_counter() - began
        loss, accuracy = sums.read()
        return {
            "epochs": optim.epochs,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_top1": dict(zip(exit_names, accuracy, strict=True)),
            "seconds": seconds,
            "images_per_second": (here.step - first) * optim.batch_size / seconds,
        }

    def _check_finite(self, here: Position, sums: Tally) -> None:
        bad = int(sums.bad_step)
        if bad >= 0:
            raise Diverged(
                f"the loss is not finite since step {bad} of epoch {here.epoch} of phase"
                f" {self.phases[here.phase].name}; the last good checkpoint: {self.last_good};"
                " try a lower --lr or a longer warm-up"
            )

    def _stop_if_asked(self, here: Position, sums: Tally, save) -> None:
        if self.stop.signum is None:
            return
        self._check_finite(here, sums)
        save(here, tally=sums)
        raise runtime.Stopped(
            f"stopped by signal {self.stop.signum} and saved at epoch {here.epoch}, step"
            f" {here.step}; go on with --resume {self.run_dir}",
            self.stop.signum,
        )


class Metrics:
    """metrics.jsonl, a line on the screen, and TensorBoard where asked: one record an epoch."""

    def __init__(self, run_dir: Path, position: Position, tensorboard: bool) -> None:
        self.path, self.position = run_dir / "metrics.jsonl", position
        self.tensorboard = tensorboard
        self.writer = None

    def __enter__(self) -> "Metrics":
        """Drops records of epochs that a resumed run will do again."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # a torn last line
                    record = json.loads(line)
                    before = (record["phase_index"], record["epoch"])
                    if before < (self.position.phase, self.position.epoch):
                        kept.append(line + "\n")
        checkpoint.write_text(self.path, "".join(kept))
        self.count = len(kept)
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "--tensorboard needs the package; run: pip install -r requirements.txt"
                ) from None
            self.writer = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=self.count
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record everywhere it goes."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        log.info(
            "%s %d/%d: lr %.4f, loss %.4f, val %s, %.0f images/s",
            record["phase"], record["epoch"] + 1, record["epochs"], record["lr"],
            record["train_loss"], _percents(record["val_top1"]), record["images_per_second"],
        )  # fmt: skip
        if self.writer:
            for key, value in record.items():
                if isinstance(value, dict):
                    for name, number in value.items():
                        self.writer.add_scalar(f"{key}/{name}", number, self.count)
                elif isinstance(value, float):
                    self.writer.add_scalar(key, value, self.count)
            self.writer.flush()
        self.count += 1


@torch.no_grad()
def score(
    config: Config, door: FrontDoor, split: str, saved: dict | None
) -> tuple[tuple[str, ...], list[float]]:
    """Names and accuracies (N,) of every exit on a split, for a checkpoint's weights (`saved`) or
    those of `config.model.backbone`, whose early exits, if any, would be untrained."""
    device, precision = setup(config)
    if saved:
        data = door.load_data(config.data, saved["normalisation"]).to(device)
        network = door.build_network(config.model, len(data.classes))
        checkpoint.load_into(network, saved["network"], Path("the checkpoint"))
    else:
        path = Path(config.model.backbone)
        _, meta = checkpoint.load_backbone(path)
        data = door.load_data(config.data, meta.get("normalisation")).to(device)
        network = door.build_network(config.model, len(data.classes))
        if network.num_exits > 1:
            raise UserError("--backbone alone brings no heads to score; add --exits none")
        load_backbone(network, path)
    network.to(device, memory_format=_layout(config)).eval()
    tally = Tally(network.num_exits, device)
    loss_fn = partial(joint_loss, weights=(1.0,) * network.num_exits)
    autocast = partial(runtime.autocast, precision, device)
    for _ in score_batches(network, data.eval_batches(split, EVAL_BATCH), loss_fn, autocast, tally):
        pass
    return network.exit_names, tally.read()[1]


def _layout(config: Config) -> torch.memory_format:
    return torch.channels_last if config.run.channels_last else torch.contiguous_format


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Puts the momenta back; rates and decay are those of the configuration."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)


def _line(loss: float, accuracy: list[float], exit_names: tuple[str, ...]) -> str:
    return f"loss {loss:.4f}, {_percents(dict(zip(exit_names, accuracy, strict=True)))}"


def _percents(accuracy: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {100 * value:.2f} %" if math.isfinite(value) else f"{name} -"
        for name, value in accuracy.items()
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
