"""An estimate of the energy that an image costs: a table of picojoules, and what is counted.

It is an estimate for an imagined chip, not a measurement: 45 nm at 0.9 V, float32, one image at a
time. Each multiply-add is one multiplication and one addition. What a convolution or a linear layer
reads and writes goes through a small SRAM, once each. The weights of every stage and head that runs
are read once for every image: from DRAM, where nothing is kept between two images, or from that
SRAM, where the network fits on the chip. Much hangs on which, so both are told. Instructions,
leakage, normalisation as an operation, a ViT's position embedding and the decision are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from early_exit.cost import Cost, accumulated, count_params, on_meta
from early_exit.network import MultiExitNetwork

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
    """Picojoules of an image, estimated."""

    stages: tuple[float, ...]
    """N, of each stage without its early head."""
    heads: tuple[float, ...]
    """N, of each early head; 0 for the final exit."""

    @property
    def plain(self) -> float:
        """Of the plain network."""
        return sum(self.stages)

    def cumulative(self, enabled: Sequence[bool] = ()) -> tuple[float, ...]:
        """Of an image (N,) that leaves at each exit: its stages, and the heads that are on."""
        return accumulated(self.stages, self.heads, enabled)


def estimate(network: MultiExitNetwork, cost: Cost) -> dict[str, Energy]:
    """The energy of every stage and head of `network`, by the table above, for each of `MEMORIES`
    that the weights may be read from."""
    bodies, heads = [], []
    walk = zip(on_meta(network), cost.stage_macs, cost.head_macs, strict=True)
    for (stage, before, after), macs, head_macs in walk:
        bodies.append((macs, _moved(stage.body, before), count_params(stage.body)))
        head = stage.head
        heads.append((head_macs, _moved(head, after), count_params(head)) if head else (0, 0, 0))
    return {
        memory: Energy(*(tuple(_picojoules(*part, memory) for part in parts)
                         for parts in (bodies, heads)))
        for memory in MEMORIES
    }


def _moved(module: nn.Module, features: torch.Tensor) -> int:
    """How many numbers the module's convolutions and linear layers read and write, given meta
    features."""
    moved = 0

    def count(part: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal moved
        if isinstance(part, nn.MultiheadAttention):  # projects in, to three, and out, by itself
            moved += 6 * inputs[0].numel()
        else:
            moved += inputs[0].numel() + output.numel()

    hooks = [
        part.register_forward_hook(count)
        for part in module.modules()
        if isinstance(part, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
    ]
    with torch.no_grad():
        module(features)
    for hook in hooks:
        hook.remove()
    return moved


def _picojoules(macs: int, moved: int, weights: int, memory: str) -> float:
    table = PICOJOULES
    return (
        macs * (table["float32 multiplication"] + table["float32 addition"])
        + BYTES * moved * table["byte of SRAM"]
        + BYTES * weights * table[f"byte of {memory}"]
    )
