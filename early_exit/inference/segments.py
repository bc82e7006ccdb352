"""Segments: consecutive stages whose exits are disabled in between, run as one.

A segment is the unit that is timed, compiled and exported. It ends at an enabled exit and includes
the criterion, so a disabled exit costs nothing.
"""

from __future__ import annotations

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

    def __call__(
        self, features: Features, temperature: float, state: Tensor | None = None
    ) -> tuple[Features, Tensor, Tensor, Tensor, Tensor | None]:
        for stage in self.stages[:-1]:
            features, _ = stage(features, with_logits=False)
        features, logits = self.stages[-1](features)
        answer, score, state = apply_criterion(self.criterion, logits, temperature, state)
        return features, logits, answer, score, state


def segments_of(network: MultiExitNetwork, policy: Policy) -> list[tuple[int, Segment]]:
    """The segments of a network under a policy's enabled exits, each with the index of the exit it
    ends at."""
    segments, stages = [], []
    for exit_index, stage in enumerate(network.stages):
        stages.append(stage)
        if policy.is_enabled(exit_index):
            segments.append((exit_index, Segment(tuple(stages), policy.criterion)))
            stages = []
    return segments
