"""What the runtimes of torch share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.system.device import synchronize


@dataclass(frozen=True)
class TorchRuntime:
    """A runtime of torch on a device. Implements `early_exit.inference.runtimes.base.Runtime`, but
    for `segment`, `network` and `context`."""

    name: str
    precision: str
    """f32, bf16 or fp16."""
    device: torch.device
    slow_to_build: bool = False

    def array(self, images: Tensor) -> Tensor:
        """The images on the device."""
        return images.to(self.device)

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self.device)
