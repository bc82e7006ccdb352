"""The price of an exit, in integer multiply-adds per image, and in parameters."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from early_exit.errors import UserError
from early_exit.network import MultiExitNetwork, Stage

FUTILE = 0.98  # an exit that costs this share of the plain network saves nothing


@dataclass(frozen=True)
class Cost:
    """MACs per image: multiply-adds of convolutions and linear layers (and other matrix products).

    Not counted: normalisation, activations, pooling, additions, softmax and the exit decision.
    """

    exit_names: tuple[str, ...]
    stage_macs: tuple[int, ...]
    """N, of each stage without its early head; the last holds the backbone's own classifier."""
    head_macs: tuple[int, ...]
    """N, of each early head; 0 for the final exit."""
    backbone_params: int
    head_params: tuple[int, ...]
    """N; 0 for the final exit."""

    @property
    def plain_macs(self) -> int:
        """MACs of the plain network, which every share refers to."""
        return sum(self.stage_macs)

    def cumulative(self, enabled: Sequence[bool] = ()) -> tuple[int, ...]:
        """MACs (N,) of an image that leaves at each exit: its stages, and the heads that are on."""
        return accumulated(self.stage_macs, self.head_macs, enabled)

    def shares(self, enabled: Sequence[bool] = ()) -> tuple[float, ...]:
        """`cumulative` as shares of the plain network's MACs; the last is over 1."""
        return tuple(macs / self.plain_macs for macs in self.cumulative(enabled))

    def mean_macs(self, enabled: Sequence[bool], shares: np.ndarray) -> np.ndarray:
        """MACs (P,) an image costs on average if the shares (P, N) of a sample leave at each
        exit."""
        return shares @ np.asarray(self.cumulative(enabled), np.float64)


def accumulated(
    stages: Sequence[float], heads: Sequence[float], enabled: Sequence[bool]
) -> tuple[float, ...]:
    """What an image costs (N,) that leaves at each exit, from what stages and heads cost; enabled:
    which of the N - 1 early heads are on, empty for all."""
    enabled = [*(enabled or [True] * (len(stages) - 1)), True]
    total, totals = 0, []
    for stage, head, on in zip(stages, heads, enabled, strict=True):
        total += stage + (head if on else 0)
        totals.append(total)
    return tuple(totals)


def count_macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds of one call, by torch's own counter. Give it meta tensors and nothing runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2  # one multiply-add is two flops


def network_cost(network: MultiExitNetwork) -> Cost:
    """What each stage and head of `network` costs for one image.

    Raises UserError for an early exit at 98 % of the plain network's MACs or more.
    """
    cost = _counted(network)
    for name, share in list(zip(network.exit_names, cost.shares(), strict=True))[:-1]:
        if share >= FUTILE:
            raise UserError(
                f"an exit after {name} costs {share:.1%} of the plain network and saves nothing;"
                f" choose a place below {FUTILE:.0%}"
            )
    return cost


def with_every_exit(
    build: Callable[[Sequence[str]], MultiExitNetwork], places: Sequence[str]
) -> MultiExitNetwork:
    """The network with an exit at each of the `places` that saves something, the heads before it
    counted. build: from places to the network."""
    with torch.random.fork_rng(devices=[]):  # the weights do not depend on the trial
        trial = build(places)
    shares = zip(trial.exit_names[:-1], _counted(trial).shares(), strict=False)
    return build([name for name, share in shares if share < FUTILE])


def on_meta(network: MultiExitNetwork) -> Iterator[tuple[Stage, torch.Tensor, torch.Tensor]]:
    """Every stage of a copy of `network` without numbers, in eval mode, with the features (1, C, H,
    W) that its body gets and gives."""
    shadow = copy.deepcopy(network).to("meta").eval()
    after = torch.empty(1, *network.image_shape, device="meta")
    for stage in shadow.stages:
        before = after
        with torch.no_grad():
            after = stage.body(before)
        yield stage, before, after


def _counted(network: MultiExitNetwork) -> Cost:
    stage_macs, head_macs, head_params = [], [], []
    for stage, before, after in on_meta(network):
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
    """Every place of an exit that saves something, in order, and the share of the plain network's
    MACs that lies before it. The last block of a stage is called by the stage: `layer1` for
    `layer1.2`.

    units: the network's blocks in order, by name; image: one (1, C, H, W).
    """
    features, before, macs = image.to("meta"), 0, {}
    shadows = copy.deepcopy(nn.ModuleDict({str(i): unit for i, unit in enumerate(units.values())}))
    for name, unit in zip(units, shadows.to("meta").eval().values(), strict=True):
        before += count_macs(unit, features)
        macs[name] = before
        with torch.no_grad():
            features = unit(features)
    stages = {name.rpartition(".")[0]: name for name in units}
    lasts = {name: stage for stage, name in stages.items() if stage not in ("", "features")}
    names = [name for name in list(units)[:-1] if macs[name] < FUTILE * before]
    return {lasts.get(name, name): macs[name] / before for name in names}


def count_params(module: nn.Module) -> int:
    """Numbers that a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())
