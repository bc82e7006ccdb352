"""What the runtimes of torch share."""

from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Float32 means float32: convolutions on a GPU are not in TF32. Afterwards as before."""
        cudnn = torch.backends.cudnn
        if self.precision != "f32" or self.device.type == "cpu":
            yield
            return
        before, cudnn.allow_tf32 = cudnn.allow_tf32, False
        try:
            yield
        finally:
            cudnn.allow_tf32 = before
