"""Segments: consecutive stages whose exits are disabled in between, run as one.

A segment is the unit that is timed, compiled and exported. It ends at an enabled exit and includes
the criterion, so a disabled exit costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from early_exit.inference.criteria import apply_criterion

if TYPE_CHECKING:
    from torch import Tensor

    from early_exit.inference.policy import Policy
    from early_exit.model.features import Features
    from early_exit.model.network import MultiExitNetwork, Stage


@dataclass(frozen=True)
class Segment:
    """`segment(features, temperature, state) -> features, logits, answer, score, state`.

    features: (B, C, H, W) or a tuple of such tensors, of the first segment images; temperature: a
    number; state: one row per image, or None before the first enabled exit. Logits and answer are
    (B, K); the score (B,) is float32 whatever the network runs in.
    """

    stages: tuple[Stage, ...]
    """At least one; the last has the head that is computed, or is the final stage."""
    criterion: str
    """Name of the criterion."""
    is_first: bool = False
    """Whether it takes images."""

    @property
    def is_last(self) -> bool:
        """Whether it ends at the final exit, where the features are the logits."""
        return self.stages[-1].head is None

    def __call__(
        self, features: Features, temperature: float, state: Tensor | None = None
    ) -> tuple[Features, Tensor, Tensor, Tensor, Tensor | None]:
        for stage in self.stages[:-1]:
            features, _ = stage(features, with_logits=False)
        features, logits = self.stages[-1](features)
        answer, score, state = apply_criterion(self.criterion, logits, temperature, state)
        return features, logits, answer, score, state


def spans(enabled: Sequence[bool]) -> list[tuple[int, int]]:
    """The segments under these enabled early exits, each as the indices of its first and its last
    stage; the latter is the index of the exit it ends at."""
    ends = [index for index, flag in enumerate((*enabled, True)) if flag]
    return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))


def segment_of(network: MultiExitNetwork, first: int, last: int, criterion: str) -> Segment:
    """The segment from stage `first` to stage `last`."""
    return Segment(tuple(network.stages[first : last + 1]), criterion, is_first=first == 0)


def segments_of(network: MultiExitNetwork, policy: Policy) -> list[tuple[int, Segment]]:
    """The segments of a network under a policy's enabled exits, each with the index of the exit it
    ends at."""
    return [
        (last, segment_of(network, first, last, policy.criterion))
        for first, last in spans(policy.enabled)
    ]
