"""What training and evaluation share: the front door, the phases, the set-up of a run."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from early_exit import checkpoint, runtime
from early_exit.config import Config, OptimConfig
from early_exit.distributed import Group
from early_exit.engine import Tally, score_batches
from early_exit.errors import UserError
from early_exit.losses import joint_loss, resolve_weights
from early_exit.network import MultiExitNetwork
from early_exit.splits import WHOLE, Share

log = logging.getLogger(__name__)


class Data(Protocol):
    """What a front door's data set offers. `early_exit.tensors.Data` is one, for images in memory;
    of another kind is `imagenet.data.Data`."""

    name: str
    classes: tuple[str, ...]
    """What each class index is called."""
    val_hash: str
    """Says which images are val; a checkpoint carries it."""
    mean: tuple[float, ...]
    """Of each channel's pixels in [0, 1]; a checkpoint carries it."""
    std: tuple[float, ...]
    eval_batch: int
    """Held-out images that go through the network at a time."""

    def to(self, device: torch.device, layout: torch.memory_format) -> "Data":
        """The same data, giving batches on `device` and of that layout."""

    def normalised_by(self, normalisation: dict | None) -> "Data":
        """The same data with a checkpoint's {"mean": [...], "std": [...]}; None: its own."""

    def size(self, split: str) -> int:
        """How many images train, val or test has."""

    def digest(self, split: str) -> str:
        """Says what a split holds; a stored record of another digest is made anew."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in train, at least 1."""

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, first_step: int = 0, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `first_step` on, a pure function of seed, epoch and step:
        images (B, C, H, W), normalised, and targets (B,); of each step its parts in `share`."""

    def eval_batches(
        self, split: str, batch_size: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's batches in order, not augmented; those that are in `share`."""

    def test_halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of two stratified halves of test: the first to be val, the second test."""

    def cut_test(self, seed: int) -> "Data":
        """The same data whose val and test are the two halves of test."""

    def picture(self, split: str, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8."""


@dataclass(frozen=True)
class StaticNetwork:
    """A network without exits, and what is known of it."""

    name: str
    accuracy: float
    """On the official test set."""
    source: str
    """Who states that."""
    build: Callable[[], nn.Module]
    """Makes it, untrained: its time does not depend on its weights."""


@dataclass(frozen=True)
class FrontDoor:
    """What the scripts of a data set bring along."""

    build_network: Callable[[Config, int], MultiExitNetwork]
    """From the configuration and the number of classes."""
    load_data: Callable[[Any], Data]
    """From the data's settings."""
    config: type[Config] = Config
    """The configuration's class, with the data set's own settings."""
    name: str = ""
    """Where to find it again: `package.module:NAME`."""
    statics: Callable[[Config, int], Sequence[StaticNetwork]] = lambda config, num_classes: ()
    """Networks without exits that others trained on the same data and that one could use instead
    of the configuration's; nothing where none are known. From the configuration and the number of
    classes."""
    loss: Callable[..., Tensor] = joint_loss
    """What training minimises, called as `early_exit.losses.joint_loss` is; settings that the
    configuration's loss has beside the library's are passed by their names. On val it is called
    with the weights and those alone."""
    held_out: Callable[[Config, Image.Image], Image.Image] | None = None
    """What is done to an image file before the network sees it in an evaluation: RGB to RGB.
    Absent: its shorter side is brought to the network's, and the centre cut out."""


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

    @property
    def backbone_frozen(self) -> bool:
        """Whether no number of the backbone may move."""
        return self.name == "heads"


def plan_phases(config: Config, num_exits: int) -> list[Phase]:
    """The phases of a regime: `joint` has one, the others train the backbone first unless a
    checkpoint brings it. On a frozen backbone no head moves another, so all of CDL's stages are
    trained at once."""
    given, optim = config.model.backbone is not None, config.optim
    if given and (num_exits == 1 or config.run.regime == "joint"):
        raise UserError(
            "--backbone brings trained weights, but this run would train the backbone from"
            " scratch; add --regime mixed or --regime frozen and exits, or -e to score it"
        )
    if num_exits == 1:
        return [Phase("plain", optim, (1.0,))]
    weights = resolve_weights(config.loss.weights, num_exits)
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
    if config.run.regime == "cdl" and set(config.model.head) != {"linear"}:
        raise UserError(
            f"CDL's classifiers are linear, and the heads are {' '.join(config.model.head)}; leave"
            " out --head, or take --regime frozen"
        )
    if not any(weights[:-1]):
        raise UserError("this regime trains the heads alone, and their loss weights are 0")
    return [*phases, Phase("heads", optim, (*weights[:-1], 0.0))]


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
    if device.type == "cpu":
        runtime.keep_freed_memory()
    else:
        torch.cuda.set_device(device)  # or what asks for "the GPU" would get the first
    precision = runtime.choose_precision(config.run.amp, device)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.run.deterministic
    torch.backends.cudnn.allow_tf32 = precision != "off"  # float32 means float32
    return device, precision


@torch.no_grad()
def score(
    config: Config, door: FrontDoor, split: str, saved: dict | None, group: Group
) -> tuple[tuple[str, ...], Tally]:
    """Names of the exits and what was counted on a split, for a checkpoint's weights (`saved`) or
    those of `config.model.backbone`, whose early exits, if any, would be untrained."""
    device, precision = setup(config)
    with group.leader_first():
        data = door.load_data(config.data)
    network = door.build_network(config, len(data.classes))
    if saved:
        checkpoint.load_into(network, checkpoint.reported(saved), Path("the checkpoint"))
        meta = saved
    elif network.num_exits > 1:
        raise UserError("--backbone alone brings no heads to score; add --exits none")
    else:
        meta = load_backbone(network, Path(config.model.backbone))
    if split == "val" and meta.get("unseen_val") != data.val_hash and group.leads:
        log.warning("these weights may have been trained on images of val; --split test is fair")
    data = data.normalised_by(meta.get("normalisation")).to(device, layout(config))
    network.to(device, memory_format=layout(config)).eval()
    if config.run.compile:
        network.compile()
    tally = Tally(network.num_exits, device)
    loss_fn = partial(joint_loss, weights=(1.0,) * network.num_exits)
    autocast = partial(runtime.autocast, precision, device)
    batches = data.eval_batches(split, data.eval_batch, Share(group.rank, group.world))
    for _ in score_batches(network, batches, loss_fn, autocast, tally):
        pass
    return network.exit_names, tally.gathered(group)


def layout(config: Config) -> torch.memory_format:
    """Channels last or first, as the configuration says."""
    return torch.channels_last if config.run.channels_last else torch.contiguous_format
