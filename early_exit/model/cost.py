"""The cost of each exit: multiply-adds (MACs) per image, and parameters."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from early_exit.errors import UserError
from early_exit.model.features import Features
from early_exit.model.network import MultiExitNetwork, Stage

MAX_SHARE = 0.98  # of the plain network's MACs; an exit that costs as much saves nothing


@dataclass(frozen=True)
class Cost:
    """MACs per image: multiply-adds of convolutions, linear layers and other matrix products.

    Normalisation, activations, pooling, additions, softmax and the exit decision are not counted.
    """

    exit_names: tuple[str, ...]
    stage_macs: tuple[int, ...]
    """N, of each stage without its early head; the last includes the backbone's classifier."""
    head_macs: tuple[int, ...]
    """N, of each early head; 0 for the final exit."""
    backbone_params: int
    head_params: tuple[int, ...]
    """N; 0 for the final exit."""

    @property
    def plain_macs(self) -> int:
        """MACs of the plain network; every share is relative to them."""
        return sum(self.stage_macs)

    def cumulative(self, enabled: Sequence[bool] = ()) -> tuple[int, ...]:
        """MACs (N,) of an image that exits at each exit: of its stages and enabled heads.

        enabled: N - 1 flags. Default: all enabled.
        """
        costs = cumulative_cost(self.stage_macs, self.head_macs, enabled)
        return tuple(int(macs) for macs in costs)

    def shares(self, enabled: Sequence[bool] = ()) -> tuple[float, ...]:
        """`cumulative` as shares of the plain network's MACs; the last is over 1 if a head is
        enabled."""
        return tuple(macs / self.plain_macs for macs in self.cumulative(enabled))

    def mean_macs(self, enabled: Sequence[bool], shares: np.ndarray) -> np.ndarray:
        """Mean MACs per image (P,) of P policies.

        shares: (P, N), the share of images that take each exit.
        """
        return shares @ np.asarray(self.cumulative(enabled), np.float64)


def cumulative_cost(
    stages: Sequence[float], heads: Sequence[float], enabled: Sequence[bool]
) -> tuple[float, ...]:
    """The cost (N,) of an image that exits at each exit.

    stages, heads: N costs each, in any unit. enabled: N - 1 flags; empty: all enabled.
    """
    enabled = [*(enabled or [True] * (len(stages) - 1)), True]
    total: float = 0
    totals = []
    for stage, head, is_enabled in zip(stages, heads, enabled, strict=True):
        total += stage + (head if is_enabled else 0)
        totals.append(total)
    return tuple(totals)


def count_macs(module: nn.Module, *inputs: Features) -> int:
    """Multiply-adds of one call, by torch's own counter. With meta tensors nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2  # one multiply-add is two flops


def network_cost(network: MultiExitNetwork) -> Cost:
    """The cost of each stage and head of `network`, for one image.

    Raises UserError for an early exit that costs 98 % of the plain network's MACs or more.
    """
    cost = _count_cost(network)
    for name, share in list(zip(network.exit_names, cost.shares(), strict=True))[:-1]:
        if share >= MAX_SHARE:
            raise UserError(
                f"an exit after {name} costs {share:.1%} of the plain network and saves nothing;"
                f" choose a place below {MAX_SHARE:.0%}"
            )
    return cost


def with_every_exit(
    build: Callable[[Sequence[str]], MultiExitNetwork], places: Sequence[str]
) -> MultiExitNetwork:
    """The network with an exit at each of the `places` where it saves MACs, all heads before it
    counted. build: makes the network from the places of its exits."""
    with torch.random.fork_rng(devices=[]):  # building twice does not change the weights
        with_all = build(places)
    shares = zip(with_all.exit_names[:-1], _count_cost(with_all).shares(), strict=False)
    return build([name for name, share in shares if share < MAX_SHARE])


def meta_copy(module: nn.Module) -> Any:
    """A copy of a module on the meta device, in eval mode. No weight is copied."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def stages_on_meta(network: MultiExitNetwork) -> Iterator[tuple[Stage, Features, Features]]:
    """Every stage of a meta copy of `network`, with the features of one image before its body and
    after it."""
    after: Features = torch.empty(1, *network.image_shape, device="meta")
    for stage in meta_copy(network).stages:
        before = after
        with torch.no_grad():
            after = stage.body(before)
        yield stage, before, after


def _count_cost(network: MultiExitNetwork) -> Cost:
    stage_macs, head_macs, head_params = [], [], []
    for stage, before, after in stages_on_meta(network):
        stage_macs.append(count_macs(stage.body, before))
        head_macs.append(count_macs(stage.head, after) if stage.head else 0)
        head_params.append(count_params(stage.head) if stage.head else 0)
    return Cost(
        exit_names=network.exit_names,
        stage_macs=tuple(stage_macs),
        head_macs=tuple(head_macs),
        backbone_params=count_params(network.backbone),
        head_params=tuple(head_params),
    )


def place_shares(units: Mapping[str, nn.Module], image: torch.Tensor) -> dict[str, float]:
    """The places where an exit saves MACs, in order, and the share of the plain network's MACs
    before each.

    units: the network's blocks in order, by name; image: one (1, C, H, W). The last block of a
    stage gives its place the stage's name: `layer1` for `layer1.2`.
    """
    features, total, macs = image.to("meta"), 0, {}
    copies = meta_copy(nn.ModuleList(units.values()))
    for name, unit in zip(units, copies, strict=True):
        total += count_macs(unit, features)
        macs[name] = total
        with torch.no_grad():
            features = unit(features)
    last_blocks = {name.rpartition(".")[0]: name for name in units}
    stage_names = {
        name: stage for stage, name in last_blocks.items() if stage not in ("", "features")
    }
    names = [name for name in list(units)[:-1] if macs[name] < MAX_SHARE * total]
    return {stage_names.get(name, name): macs[name] / total for name in names}


def count_params(module: nn.Module) -> int:
    """The number of trainable values in a module."""
    return sum(parameter.numel() for parameter in module.parameters())
