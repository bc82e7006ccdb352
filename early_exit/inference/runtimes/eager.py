"""Eager torch: the segments as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from early_exit.inference.infer import RunSegment
from early_exit.inference.runtimes.base import Example, RunNetwork
from early_exit.inference.runtimes.torch_runtime import TorchRuntime
from early_exit.inference.segments import Segment
from early_exit.system.device import autocast_context


@dataclass(frozen=True)
class EagerRuntime(TorchRuntime):
    """Eager torch on a device. Implements `early_exit.inference.runtimes.base.Runtime`."""

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
