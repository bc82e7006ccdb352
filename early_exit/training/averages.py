"""Averages of a network's weights over the steps of a phase, which are then what is reported."""

import copy

import torch
from torch import nn

from early_exit.config import OptimConfig
from early_exit.model.network import MultiExitNetwork


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
        if self._copied:
            torch._foreach_copy_(
                [self._average[name] for name in self._copied],
                [current[name] for name in self._copied],
            )
        self.steps += 1


def make_average(network: MultiExitNetwork, optim: OptimConfig) -> Average | None:
    """The average that a phase reports, if it has one."""
    return Average(network, optim.ema) if optim.ema else None
