"""Eager torch: the segments as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from early_exit.inference.infer import RunSegment
from early_exit.inference.runtimes.base import Example, RunNetwork
from early_exit.inference.segments import Segment
from early_exit.system.device import autocast_context, synchronize


@dataclass(frozen=True)
class EagerRuntime:
    """Eager torch on a device. Implements `early_exit.inference.runtimes.base.Runtime`."""

    name: str
    precision: str
    """f32, bf16 or fp16."""
    device: torch.device
    slow_to_build: bool = False

    def array(self, images: Tensor) -> Tensor:
        """The images on the device."""
        return images.to(self.device)

    def segment(self, segment: Segment, _example: Example) -> RunSegment:
        """The segment itself."""
        return segment

    def network(self, network: nn.Module, _example: Tensor) -> RunNetwork:
        """The network itself."""
        return network

    @contextmanager
    def context(self) -> Iterator[None]:
        """Inference mode, and autocast."""
        amp = "off" if self.precision == "f32" else self.precision
        with torch.inference_mode(), autocast_context(amp, self.device):
            yield

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self.device)
