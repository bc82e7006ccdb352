"""An estimate of the energy per image, from counts and a table of picojoules.

It is an estimate for an imagined chip, not a measurement: 45 nm at 0.9 V, float32, one image at a
time. Each multiply-add is one multiplication and one addition. Each value that a convolution or a
linear layer reads or writes passes once through a small SRAM. The weights of every stage and head
that runs are read once per image: from DRAM, if they do not stay on the chip between images, or
from that SRAM, if the network fits on the chip. The two differ much, so both are reported.
Instructions, leakage, normalisation, additions without a multiplication and the exit decision are
not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from early_exit.model.cost import count_params, stages_on_meta
from early_exit.model.features import Features
from early_exit.model.macs import Cost, cumulative_cost
from early_exit.model.network import MultiExitNetwork

# Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.
PICOJOULES = {
    "float32 multiplication": 3.7,
    "float32 addition": 0.9,
    "byte of SRAM": 20 / 8,  # of 32 KB; 20 pJ for 64 bits
    "byte of DRAM": 1300 / 8,  # 1.3 to 2.6 nJ for 64 bits
}
MEMORIES = ("SRAM", "DRAM")
BYTES = 4  # of a float32


@dataclass(frozen=True)
class Energy:
    """Estimated picojoules per image."""

    stages: tuple[float, ...]
    """N, of each stage without its early head."""
    heads: tuple[float, ...]
    """N, of each early head; 0 for the final exit."""

    @property
    def plain(self) -> float:
        """Picojoules of the plain network."""
        return sum(self.stages)

    def cumulative(self, enabled: Sequence[bool] = ()) -> tuple[float, ...]:
        """Picojoules (N,) of an image that exits at each exit: of its stages and enabled heads.

        enabled: N - 1 flags. Default: all enabled.
        """
        return cumulative_cost(self.stages, self.heads, enabled)


@dataclass(frozen=True)
class _Work:
    """What a module does for one image."""

    macs: int = 0
    values: int = 0
    """Read and written by convolutions and linear layers, without weights."""
    weights: int = 0


def estimate(network: MultiExitNetwork, cost: Cost) -> dict[str, Energy]:
    """The energy of every stage and head of `network`, for each of `MEMORIES` that the weights may
    be read from. cost: of the same network."""
    bodies, heads = [], []
    stages = zip(stages_on_meta(network), cost.stage_macs, cost.head_macs, strict=True)
    for (stage, before, after), macs, head_macs in stages:
        bodies.append(_count_work(stage.body, before, macs))
        heads.append(_count_work(stage.head, after, head_macs) if stage.head else _Work())
    return {
        memory: Energy(
            stages=tuple(_picojoules(work, memory) for work in bodies),
            heads=tuple(_picojoules(work, memory) for work in heads),
        )
        for memory in MEMORIES
    }


def _count_work(module: nn.Module, features: Features, macs: int) -> _Work:
    """The work of one call. features: on the meta device."""
    values = 0

    def count(part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal values
        first = inputs[0] if inputs else next(iter(named.values()))
        if isinstance(part, nn.MultiheadAttention):  # the input projections and the output one
            values += 6 * first.numel()
        else:
            values += first.numel() + output.numel()

    hooks = [
        part.register_forward_hook(count, with_kwargs=True)
        for part in module.modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
    ]
    with torch.no_grad():
        module(features)
    for hook in hooks:
        hook.remove()
    return _Work(macs, values, count_params(module))


def _picojoules(work: _Work, memory: str) -> float:
    """memory: the one that the weights are read from."""
    table = PICOJOULES
    return (
        work.macs * (table["float32 multiplication"] + table["float32 addition"])
        + BYTES * work.values * table["byte of SRAM"]
        + BYTES * work.weights * table[f"byte of {memory}"]
    )
