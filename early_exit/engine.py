"""The loops: a step, an epoch, a pass over held-out images."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from early_exit.config import OptimConfig
from early_exit.distributed import Group
from early_exit.metrics import MANY_CLASSES, among5, top1

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
    among5: Tensor = field(init=False)
    """Targets among each exit's five likeliest, counted where there are `many` classes."""
    many: bool = False
    bad_step: Tensor = field(init=False)
    """The first step whose loss was not finite, or -1."""

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros(self.num_exits, dtype=torch.int64, device=self.device)
        self.among5 = torch.zeros_like(self.correct)
        self.bad_step = torch.full((), -1, device=self.device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Sequence[Tensor], target: Tensor) -> None:
        """Counts one batch: its mean loss, and per exit the right answers."""
        self.bad_step = torch.where(
            (self.bad_step < 0) & ~loss.isfinite(), self.steps, self.bad_step
        )
        self.loss += loss.double() * len(target)
        self.correct += torch.stack([top1(exit_logits, target) for exit_logits in logits])
        self.many = logits[0].shape[1] > MANY_CLASSES
        if self.many:
            self.among5 += torch.stack([among5(said, target).sum() for said in logits])
        self.images += len(target)
        self.steps += 1

    def gathered(self, group: Group) -> "Tally":
        """The sums of all processes."""
        if group.world == 1:
            return self
        whole = Tally(self.num_exits, torch.device("cpu"), steps=self.steps)
        whole.many = self.many
        whole.loss.copy_(group.total(self.loss))
        counts = torch.cat([self.correct, self.among5, self.correct.new_tensor([self.images])])
        *counts, whole.images = group.total(counts).tolist()
        whole.correct.copy_(torch.tensor(counts[: self.num_exits]))
        whole.among5.copy_(torch.tensor(counts[self.num_exits :]))
        whole.bad_step.copy_(group.most(self.bad_step))
        return whole

    def read(self) -> tuple[float, list[float]]:
        """Mean loss, and each exit's accuracy."""
        images = max(1, self.images)
        return float(self.loss) / images, [count / images for count in self.correct.tolist()]

    def top5(self) -> list[float]:
        """How often the target is among each exit's five likeliest; empty where that was not
        counted."""
        if not self.many:
            return []
        return [count / self.images for count in self.among5.tolist()]

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint in the middle of an epoch keeps."""
        return {
            "images": self.images,
            "steps": self.steps,
            "loss": float(self.loss),
            "correct": self.correct.tolist(),
            "among5": self.among5.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Puts back what `state_dict` gave."""
        self.images, self.steps = state["images"], state["steps"]
        self.loss.fill_(state["loss"])
        self.correct.copy_(torch.tensor(state["correct"]))
        self.among5.copy_(torch.tensor(state["among5"]))


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """SGD over the parameters of `module` that are trained."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if optim.decay_norm or p.ndim > 1]
    spared = [p for p in trained if not optim.decay_norm and p.ndim <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    if optim.momentum:
        # The fused kernel would make them in the first step, and leave them as the memory was where
        # a GradScaler skips that step.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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


class Average:
    """The running average of a network's weights and statistics, which begins at the weights.

    After n steps a step's weights count 1 - min(decay, (1 + n) / (10 + n)), so that the average
    does not hang on what the network was before it learned. What is counted rather than measured
    is taken as it is. (torch's AveragedModel waits for a GPU twice a step, and rounds counts down.)
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay, self.steps = decay, 0
        own = self.module.state_dict()  # views of its tensors
        self._float = [name for name, value in own.items() if value.is_floating_point()]
        self._other = [name for name in own if name not in set(self._float)]
        self._own = own

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes the weights after a step in."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        theirs = network.state_dict()
        torch._foreach_lerp_(
            [self._own[name] for name in self._float], [theirs[name] for name in self._float],
            1 - decay,
        )
        for name in self._other:
            self._own[name].copy_(theirs[name])
        self.steps += 1


def train_steps(
    forward: Forward,
    batches: Batches,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], AbstractContextManager],
    learning_rates: Iterable[float],
    tally: Tally,
    goes: int = 1,
    apart: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[bool]:
    """One optimiser step per `goes` batches, yielding after each batch whether that ended a step,
    so that the caller can look around.

    forward: images (B, 3, H, W) -> N logits (B, K); learning_rates: one per step; apart: a context
    in which gradients are not sent to other processes.
    """
    learning_rates, ended = iter(learning_rates), True
    for number, (images, target) in enumerate(batches, 1):
        if ended:
            lr = next(learning_rates, None)
            if lr is None:
                return
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
        ended = number % goes == 0
        images = images.to(tally.device, non_blocking=True)
        target = target.to(tally.device, non_blocking=True)
        with nullcontext() if ended else apart():
            with autocast():
                logits = forward(images)
            loss = loss_fn(logits, target)
            scaler.scale(loss / goes).backward()
        if ended:
            scaler.step(optimizer)
            scaler.update()
        tally.add(loss.detach(), logits, target)
        yield ended


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
