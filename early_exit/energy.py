"""An estimate of the energy that an image costs: a table of picojoules, and what is counted.

It is an estimate for an imagined chip, not a measurement: 45 nm at 0.9 V, float32, one image at a
time. Each multiply-add is one multiplication and one addition. What a convolution or a linear layer
reads and writes goes through a small SRAM, once each. The weights of every stage and head that runs
are read once for every image: from DRAM, where nothing is kept between two images, or from that
SRAM, where the network fits on the chip. Much hangs on which, so both are told. Instructions,
leakage, normalisation as an operation, a ViT's position embedding and the decision are not counted.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from early_exit.cost import Cost, accumulated
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


def estimate(network: MultiExitNetwork, cost: Cost, weights: str) -> Energy:
    """The energy of every stage and head of `network`, by the table above; weights: where they are
    read from, one of `MEMORIES`."""
    shadow = copy.deepcopy(network).to("meta").eval()
    features = torch.empty(1, *network.image_shape, device="meta")
    stages, heads = [], []
    for stage, macs, head_macs in zip(shadow.stages, cost.stage_macs, cost.head_macs, strict=True):
        after, moved = _run(stage.body, features)
        stages.append(_picojoules(stage.body, macs, moved, weights))
        moved = _run(stage.head, after)[1] if stage.head else 0
        heads.append(_picojoules(stage.head, head_macs, moved, weights) if stage.head else 0.0)
        features = after
    return Energy(tuple(stages), tuple(heads))


def _run(module: nn.Module, features: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the module makes of meta features, and how many numbers its convolutions and linear
    layers read and write."""
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
        after = module(features)
    for hook in hooks:
        hook.remove()
    return after, moved


def _picojoules(module: nn.Module, macs: int, moved: int, weights: str) -> float:
    count = sum(parameter.numel() for parameter in module.parameters())
    table = PICOJOULES
    return (
        macs * (table["float32 multiplication"] + table["float32 addition"])
        + BYTES * moved * table["byte of SRAM"]
        + BYTES * count * table[f"byte of {weights}"]
    )
