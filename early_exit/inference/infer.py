"""Inference with exits taken: a row that exited is in no later segment.

`advance` and `run_segments` work on torch and numpy arrays alike and import no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.policy import Policy
from early_exit.inference.segments import segments_of
from early_exit.model.features import select_rows

if TYPE_CHECKING:
    from torch import Tensor

    from early_exit.model.network import MultiExitNetwork

Array = Any
"""A torch tensor or a numpy array."""
RunSegment = Callable[..., tuple[Any, Array, Array, Array, Array | None]]
"""`features, temperature, state -> features, logits, answer, score, state`; see
`early_exit.inference.segments.Segment`."""


@dataclass
class Rows:
    """The remaining images: their numbers in the batch, their features and the criterion's state.

    index: (R,); features: (R, C, H, W) or a tuple of such tensors; state: R rows, or None.
    """

    index: Array
    features: Any
    state: Array | None = None

    def select(self, rows: Array) -> Rows:
        """Some of the rows, by their indices or a slice."""
        state = None if self.state is None else self.state[rows]
        return Rows(self.index[rows], select_rows(self.features, rows), state)


def all_rows(images: Array, begin: int = 0) -> Rows:
    """The rows of a batch (B, C, H, W) before its first segment, numbered from `begin`."""
    array = namespace(images)
    placed = {} if array is np else {"device": images.device}
    return Rows(array.arange(begin, begin + len(images), **placed), images)


@dataclass(frozen=True)
class Answers:
    """The answers for a batch, in the order of its images.

    logits: (B, K) float32, the criterion's answer at the exit each image took, of most criteria the
    exit's logits divided by its temperature; exit_index: (B,) int64; score: (B,) float32.
    """

    logits: Array
    exit_index: Array
    score: Array

    @property
    def classes(self) -> Array:
        """The class answered, (B,)."""
        return self.logits.argmax(-1)

    def select(self, rows: Any) -> Answers:
        """Some of the answers: indices or a slice."""
        return Answers(self.logits[rows], self.exit_index[rows], self.score[rows])


@dataclass
class Exited:
    """Rows that exited together: their numbers in the batch (R,), answer (R, K), score (R,)."""

    index: Array
    answer: Array
    score: Array

    def answers(self, exit_index: int) -> Answers:
        """What they were answered at the exit `exit_index`."""
        array = namespace(self.index)
        return Answers(self.answer, array.full_like(self.index, exit_index), self.score)


def join(groups: Sequence[tuple[Array, Answers]]) -> tuple[Array, Answers]:
    """The rows of several groups, each group with their numbers (R,), one after the other."""
    if len(groups) == 1:
        return groups[0]
    join_arrays = namespace(groups[0][0]).concatenate
    return join_arrays([index for index, _ in groups]), Answers(
        join_arrays([answers.logits for _, answers in groups]),
        join_arrays([answers.exit_index for _, answers in groups]),
        join_arrays([answers.score for _, answers in groups]),
    )


def advance(
    segment: RunSegment, rows: Rows, policy: Policy, exit_index: int
) -> tuple[Rows | None, Exited | None]:
    """Runs one segment on the remaining rows; those that are sure enough exit.

    exit_index: the exit that the segment ends at. Returns the rows that remain and those that
    exited, each None if there are none.
    """
    temperature = policy.temperatures[exit_index]
    features, _, answer, score, state = segment(rows.features, temperature, rows.state)
    if exit_index == policy.num_exits - 1:
        return None, Exited(rows.index, answer, score)
    exits = policy.exits(exit_index, score)
    onward = Rows(rows.index, features, state)
    if len(exits) == 1:  # one row: its exit is known without indices
        return (None, Exited(rows.index, answer, score)) if exits else (onward, None)
    remaining = indices(~exits)  # waits for the device: the next shapes depend on it
    if len(remaining) == len(exits):
        return onward, None
    if len(remaining) == 0:
        return None, Exited(rows.index, answer, score)
    exited = indices(exits)  # once: a mask would be searched again, and waited for, by each array
    return onward.select(remaining), Exited(rows.index[exited], answer[exited], score[exited])


def run_segments(
    segments: Sequence[tuple[int, RunSegment]], images: Array, policy: Policy
) -> Answers:
    """Answers every image at the first exit that is sure enough.

    segments: each with the index of the exit it ends at, the last one the final exit; images:
    (B, C, H, W), B at least 1.
    """
    array = namespace(images)
    rows = all_rows(images)
    everything = rows.index
    groups: list[tuple[Array, Answers]] = []
    for exit_index, segment in segments:
        remaining, exited = advance(segment, rows, policy, exit_index)
        if exited is not None:
            groups.append((exited.index, exited.answers(exit_index)))
        if remaining is None:
            break
        rows = remaining
    index, answers = join(groups)
    if len(groups) == 1:  # all at one exit, and so in order
        return answers
    order = array.empty_like(index)
    order[index] = everything
    return answers.select(order)


def infer(
    network: MultiExitNetwork,
    images: Tensor,
    policy: Policy,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Answers:
    """Answers every image at the first exit that is sure enough; later stages never see it.

    images: (B, 3, H, W), normalised, B at least 1; the network is in eval mode. Equal to replaying
    the policy on the logits of all exits, but for rounding: kernels differ with the number of rows,
    so a score may fall on the other side of its threshold.
    """
    import torch

    check_network(network, policy)
    with torch.inference_mode(), autocast():
        return run_segments(segments_of(network, policy), images, policy)


def check_network(network: MultiExitNetwork, policy: Policy) -> None:
    """Raises UserError for a network in training mode and for a policy of other exits."""
    check_eval_mode(network)
    policy.check_exits(network.exit_names, "the network")


def check_eval_mode(network: MultiExitNetwork) -> None:
    """Raises UserError for a network in training mode."""
    if network.training:
        raise UserError("the network is in training mode; call network.eval() before inference")


def indices(mask: Array) -> Array:
    """The indices (R,) at which a mask (B,) is true."""
    found = mask.nonzero()
    return found[0] if isinstance(found, tuple) else found.squeeze(1)


def namespace(array: Array) -> ModuleType:
    """The module with the functions for an array: numpy, or torch for its tensors."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch
