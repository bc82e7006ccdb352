"""The inner loops: training steps and a pass over held-out images, with what they update."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from early_exit.metrics import MANY_CLASSES, in_top5, top1
from early_exit.model.network import MultiExitNetwork
from early_exit.system.distributed import Group

Forward = Callable[[Tensor], Sequence[Tensor]]
Loss = Callable[..., Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Score:
    """Mean loss per image, and accuracy by the name of the exit."""

    loss: float
    top1: dict[str, float]
    top5: dict[str, float] | None
    """None if there are too few classes."""


@dataclass
class Tally:
    """The loss and the correct answers of an epoch, summed on the device so that no step waits."""

    num_exits: int
    device: torch.device
    images: int = 0
    batches: int = 0
    """Micro-batches, if a step has several."""
    loss: Tensor = field(init=False)
    correct: Tensor = field(init=False)
    in_top5: Tensor = field(init=False)
    """Per exit, how many targets are among the five most likely classes, if `counts_top5`."""
    counts_top5: bool = False
    """Whether there are more than `MANY_CLASSES` classes; known after the first batch."""
    bad_batch: Tensor = field(init=False)
    """The first batch whose loss is not finite, or -1."""

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros(self.num_exits, dtype=torch.int64, device=self.device)
        self.in_top5 = torch.zeros_like(self.correct)
        self.bad_batch = torch.full((), -1, device=self.device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Sequence[Tensor], target: Tensor) -> None:
        """Adds one batch.

        loss: its mean loss, a scalar; logits: N tensors (B, K); target: (B,).
        """
        self.bad_batch = torch.where(
            (self.bad_batch < 0) & ~loss.isfinite(), self.batches, self.bad_batch
        )
        self.loss += loss.double() * len(target)
        self.correct += torch.stack([top1(exit_logits, target) for exit_logits in logits])
        self.counts_top5 = logits[0].shape[1] > MANY_CLASSES
        if self.counts_top5:
            counts = [in_top5(exit_logits, target).sum() for exit_logits in logits]
            self.in_top5 += torch.stack(counts)
        self.images += len(target)
        self.batches += 1

    def gathered(self, group: Group) -> "Tally":
        """The tally of all processes together."""
        if group.world == 1:
            return self
        total = Tally(self.num_exits, torch.device("cpu"), batches=self.batches)
        total.counts_top5 = self.counts_top5
        total.loss.copy_(group.sum(self.loss))
        counts = torch.cat([self.correct, self.in_top5, self.correct.new_tensor([self.images])])
        counts = group.sum(counts)
        total.correct.copy_(counts[: self.num_exits])
        total.in_top5.copy_(counts[self.num_exits : -1])
        total.images = int(counts[-1])
        total.bad_batch.copy_(group.max(self.bad_batch))
        return total

    def read(self) -> tuple[float, list[float]]:
        """The mean loss per image, and the accuracy of each exit."""
        images = max(1, self.images)
        return float(self.loss) / images, [count / images for count in self.correct.tolist()]

    def top5(self) -> list[float]:
        """Per exit, the fraction of targets among the five most likely classes; empty if it was not
        counted."""
        if not self.counts_top5:
            return []
        return [count / self.images for count in self.in_top5.tolist()]

    def score(self, exit_names: Sequence[str]) -> Score:
        """The loss and the accuracies, for exits of these names."""
        loss, top1 = self.read()
        top5 = self.top5()
        return Score(
            loss,
            dict(zip(exit_names, top1, strict=True)),
            dict(zip(exit_names, top5, strict=True)) if top5 else None,
        )

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint within an epoch stores; the keys are part of its format."""
        return {
            "images": self.images,
            "steps": self.batches,
            "loss": float(self.loss),
            "correct": self.correct.tolist(),
            "among5": self.in_top5.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.images, self.batches = state["images"], state["steps"]
        self.loss.fill_(state["loss"])
        self.correct.copy_(torch.tensor(state["correct"]))
        self.in_top5.copy_(torch.tensor(state["among5"]))


class Average:
    """The exponential moving average of a network's weights and BatchNorm statistics.

    The first update copies the network. After n updates the decay is
    min(decay, (1 + n) / (10 + n)), so that early weights are soon forgotten. Integer buffers are
    copied. (torch's AveragedModel waits for a GPU twice per step, and rounds integer buffers down.)
    """

    def __init__(self, network: MultiExitNetwork, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay, self.steps = decay, 0
        self._average = self.module.state_dict()  # views of its tensors
        self._averaged = [
            name for name, value in self._average.items() if value.is_floating_point()
        ]
        self._copied = [name for name in self._average if name not in set(self._averaged)]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Adds the weights after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        current = network.state_dict()
        torch._foreach_lerp_(
            [self._average[name] for name in self._averaged],
            [current[name] for name in self._averaged],
            1 - decay,
        )
        for name in self._copied:
            self._average[name].copy_(current[name])
        self.steps += 1


def as_list(network: nn.Module, backbone_only: bool) -> Forward:
    """The forward pass as a list of logits, also for a plain network, which returns one tensor."""
    return (lambda images: [network(images)]) if backbone_only else network


def train_steps(
    forward: Forward,
    batches: Batches,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Callable[[], AbstractContextManager],
    learning_rates: Iterable[float],
    tally: Tally,
    micro_batches: int = 1,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[bool]:
    """Trains: one optimiser step for every `micro_batches` of the `batches`.

    Yields after each batch whether it completed a step, so that the caller can act in between.
    forward: images (B, 3, H, W) -> N logits (B, K). learning_rates: one per step; training ends
    after the last. no_sync: the context of all but the last micro-batch of a step, in which
    gradients are not averaged over processes. teacher: images -> logits (B, K), which the loss then
    gets by this name.
    """
    rates, step_done = iter(learning_rates), True
    for number, (images, target) in enumerate(batches, 1):
        if step_done:
            lr = next(rates, None)
            if lr is None:
                return
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.zero_grad()
        step_done = number % micro_batches == 0
        images = images.to(tally.device, non_blocking=True)
        target = target.to(tally.device, non_blocking=True)
        with nullcontext() if step_done else no_sync():
            with autocast():
                logits = forward(images)
            taught = {"teacher": teacher(images)} if teacher else {}
            loss = loss_fn(logits, target, **taught)
            scaler.scale(loss / micro_batches).backward()
        if step_done:
            scaler.step(optimizer)
            scaler.update()
        tally.add(loss.detach(), logits, target)
        yield step_done


@torch.no_grad()
def score_batches(
    forward: Forward,
    batches: Batches,
    loss_fn: Loss,
    autocast: Callable[[], AbstractContextManager],
    tally: Tally,
) -> Iterator[None]:
    """Adds every batch to `tally` and yields after each; the caller has set eval mode."""
    for images, target in batches:
        images = images.to(tally.device, non_blocking=True)
        target = target.to(tally.device, non_blocking=True)
        with autocast():
            logits = forward(images)
        tally.add(loss_fn(logits, target), logits, target)
        yield


def set_training_mode(
    network: MultiExitNetwork, backbone_frozen: bool, stem_frozen: bool = False
) -> None:
    """Sets train mode, and which parameters of the backbone are trained: those that are not fixed
    for good (`MultiExitNetwork`), nor in a frozen first block. A frozen backbone has none, and
    stays in eval mode, so its BatchNorm statistics do not change."""
    network.train()
    if backbone_frozen:
        network.backbone.eval()
    first_block = next(iter(network.units.values()))
    frozen = set(first_block.parameters()) if stem_frozen else set()
    for name, parameter in network.backbone.named_parameters():
        fixed = backbone_frozen or name in network.fixed or parameter in frozen
        parameter.requires_grad_(not fixed)
