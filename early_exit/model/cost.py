"""Counting what a network costs: multiply-adds (MACs) per image, and parameters."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from early_exit.errors import UserError
from early_exit.model.features import Features
from early_exit.model.macs import Cost
from early_exit.model.network import MultiExitNetwork, Stage

MAX_SHARE = 0.98  # of the plain network's MACs; an exit that costs as much saves nothing


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
