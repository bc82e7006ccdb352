"""Inference with exits taken: a row that left is in no later stage."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.errors import UserError
from early_exit.network import MultiExitNetwork, Stage
from early_exit.policy import Policy


@dataclass
class Rows:
    """The images still under way: their numbers in the batch, features and criterion's state."""

    index: Tensor  # (R,)
    features: Tensor  # (R, C, H, W)
    state: Tensor | None = None  # one row per image, or none

    def select(self, keep: Tensor) -> "Rows":
        """The rows at `keep`, a tensor of row numbers."""
        # indexing keeps channels_last, index_select does not
        state = None if self.state is None else self.state[keep]
        return Rows(self.index[keep], self.features[keep], state)


@dataclass
class Left:
    """Rows that leave at one exit: their numbers in the batch, answer (R, K) and score (R,)."""

    index: Tensor
    answer: Tensor
    score: Tensor


@dataclass(frozen=True)
class Answers:
    """What the network answers, in the order of the images.

    logits: (B, K) float32, of the exit each image took, divided by its temperature;
    exit_index: (B,) int64; score: (B,) float32.
    """

    logits: Tensor
    exit_index: Tensor
    score: Tensor

    @property
    def classes(self) -> Tensor:
        """The class answered, (B,)."""
        return self.logits.argmax(dim=-1)


def advance(
    stage: Stage, rows: Rows, policy: Policy, exit_index: int
) -> tuple[Rows | None, Left | None]:
    """Runs one stage on the rows under way and lets those leave that are sure enough.

    Returns who goes on and who left, each None where there is nobody.
    """
    features, logits = stage(rows.features, policy.is_on(exit_index))
    if logits is None:  # this exit is off
        return Rows(rows.index, features, rows.state), None
    answer, score, state = policy.score(exit_index, logits, rows.state)
    if exit_index == policy.num_exits - 1:
        return None, Left(rows.index, answer, score)
    leaves = policy.leaves(exit_index, score)
    going_on = (~leaves).nonzero().squeeze(1)  # waits for the device: what comes next depends on it
    onward = Rows(rows.index, features, state)
    if len(going_on) == len(leaves):
        return onward, None
    if len(going_on) == 0:
        return None, Left(rows.index, answer, score)
    return onward.select(going_on), Left(rows.index[leaves], answer[leaves], score[leaves])


@torch.inference_mode()
def infer(
    network: MultiExitNetwork,
    images: Tensor,
    policy: Policy,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Answers:
    """Answers every image at the first exit that is sure enough; later stages never see it.

    images: (B, 3, H, W), normalised, B at least 1; the network is in eval mode.
    Equal to replaying the policy on the logits of all exits, but for rounding (kernels differ with
    the number of rows) within which a score may lie on the other side of its threshold.
    """
    if network.training:
        raise UserError("the network is in training mode; call network.eval() before inference")
    policy.refuse_other_exits(network.exit_names, "the network")
    count = len(images)
    rows: Rows | None = Rows(torch.arange(count, device=images.device), images)
    left: list[tuple[int, Left]] = []
    with autocast():
        for exit_index, stage in enumerate(network.stages):
            rows, leaving = advance(stage, rows, policy, exit_index)
            if leaving is not None:
                left.append((exit_index, leaving))
            if rows is None:
                break
    if len(left) == 1:  # all at one exit, and so in order
        ((exit_index, only),) = left
        return Answers(only.answer, torch.full_like(only.index, exit_index), only.score)
    index = torch.cat([leaving.index for _, leaving in left])
    answer = torch.cat([leaving.answer for _, leaving in left])
    score = torch.cat([leaving.score for _, leaving in left])
    taken = torch.cat([torch.full_like(leaving.index, number) for number, leaving in left])
    order = torch.empty_like(index)
    order[index] = torch.arange(count, device=index.device)
    return Answers(answer[order], taken[order], score[order])
