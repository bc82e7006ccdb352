"""What a runtime does: it makes callables of a network's segments.

A segment (`early_exit.inference.segments`) includes the criterion, in float32 whatever the network
runs in, so that no runtime needs a second implementation of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from early_exit.inference.infer import Array, RunSegment

if TYPE_CHECKING:
    from torch import Tensor, nn

    from early_exit.inference.segments import Segment
    from early_exit.model.features import Features

RunNetwork = Callable[[Array], Array]
"""Images to the logits (B, K) of a network without exits."""


@dataclass(frozen=True)
class Example:
    """What a segment takes: to trace it with and, for integers, to find the ranges of values.

    features: (B, C, H, W) or a tuple of such tensors, of two rows or more; state: B rows, or None.
    """

    features: Features
    state: Tensor | None = None


class Runtime(Protocol):
    """Makes callables of segments and of networks without exits."""

    @property
    def name(self) -> str:
        """As `--runtime` takes it."""

    @property
    def precision(self) -> str:
        """f32, bf16, fp16 or int8."""

    @property
    def slow_to_build(self) -> bool:
        """Whether a segment takes a minute or so to build."""

    def array(self, images: Tensor) -> Array:
        """Images as the first segment takes them."""

    def segment(self, segment: Segment, example: Example) -> RunSegment:
        """A segment as a callable. Features are in the runtime's own memory and layout; they and
        all other results stay valid after later calls."""

    def network(self, network: nn.Module, example: Tensor) -> RunNetwork:
        """A network without exits as a callable. example: images, as in `Example`."""

    def context(self) -> AbstractContextManager:
        """What the callables run in."""

    def synchronize(self) -> None:
        """Waits until the device has finished all queued work."""
