"""The loops: a step, an epoch, a pass over held-out images."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from early_exit.config import OptimConfig
from early_exit.metrics import top1

Forward = Callable[[Tensor], Sequence[Tensor]]
Loss = Callable[[Sequence[Tensor], Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class Tally:
    """Running sums over an epoch, kept on the device so that no step waits for them."""

    num_exits: int
    device: torch.device
    images: int = 0
    steps: int = 0
    loss: Tensor = field(init=False)
    correct: Tensor = field(init=False)
    bad_step: Tensor = field(init=False)
    """The first step whose loss was not finite, or -1."""

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros(self.num_exits, dtype=torch.int64, device=self.device)
        self.bad_step = torch.full((), -1, device=self.device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Sequence[Tensor], target: Tensor) -> None:
        """Counts one batch: its mean loss, and per exit the right answers."""
        self.bad_step = torch.where(
            (self.bad_step < 0) & ~loss.isfinite(), self.steps, self.bad_step
        )
        self.loss += loss.double() * len(target)
        self.correct += torch.stack([top1(exit_logits, target) for exit_logits in logits])
        self.images += len(target)
        self.steps += 1

    def read(self) -> tuple[float, list[float]]:
        """Mean loss, and each exit's accuracy."""
        images = max(1, self.images)
        return float(self.loss) / images, [count / images for count in self.correct.tolist()]

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint in the middle of an epoch keeps."""
        return {
            "images": self.images,
            "steps": self.steps,
            "loss": float(self.loss),
            "correct": self.correct.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Puts back what `state_dict` gave."""
        self.images, self.steps = state["images"], state["steps"]
        self.loss.fill_(state["loss"])
        self.correct.copy_(torch.tensor(state["correct"]))


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """SGD over the parameters of `module` that are trained."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if optim.decay_norm or p.ndim > 1]
    spared = [p for p in trained if not optim.decay_norm and p.ndim <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def lr_at(optim: OptimConfig, epoch: float) -> float:
    """The learning rate at `epoch` (with its fraction) of a phase: a function of the position
    alone, so there is no schedule to save."""
    warmup = min(optim.warmup_epochs, optim.epochs / 10)
    if epoch < warmup:
        # a tenth of the rate at the first step, then linearly up
        return optim.lr * (0.1 + 0.9 * epoch / warmup)
    if optim.schedule == "cosine":
        progress = (epoch - warmup) / (optim.epochs - warmup)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * 0.1 ** sum(epoch >= mark * optim.epochs for mark in optim.milestones)


def train_steps(
    forward: Forward,
    batches: Batches,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], AbstractContextManager],
    learning_rates: Iterable[float],
    tally: Tally,
) -> Iterator[None]:
    """One optimiser step per batch, yielding after each, so that the caller can look around.

    forward: images (B, 3, H, W) -> N logits (B, K); learning_rates: one per batch.
    """
    for (images, target), lr in zip(batches, learning_rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = images.to(tally.device, non_blocking=True)
        target = target.to(tally.device, non_blocking=True)
        with autocast():
            logits = forward(images)
        loss = loss_fn(logits, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        tally.add(loss.detach(), logits, target)
        yield


@torch.no_grad()
def score_batches(
    forward: Forward,
    batches: Batches,
    loss_fn: Loss,
    autocast: Callable[[], AbstractContextManager],
    tally: Tally,
) -> Iterator[None]:
    """Adds every batch to `tally`, yielding after each; the caller has set the eval mode."""
    for images, target in batches:
        images = images.to(tally.device, non_blocking=True)
        target = target.to(tally.device, non_blocking=True)
        with autocast():
            logits = forward(images)
        tally.add(loss_fn(logits, target), logits, target)
        yield


def set_training_mode(network: nn.Module, backbone_frozen: bool) -> None:
    """Train mode; a frozen backbone stays in eval mode, so its BatchNorm statistics stand still."""
    network.train()
    if backbone_frozen:
        network.backbone.eval()
    for parameter in network.backbone.parameters():
        parameter.requires_grad_(not backbone_frozen)
