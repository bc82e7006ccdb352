"""The networks for small images by name, and the same with exits."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from cifar10.airbench import Airbench
from cifar10.alexnet import AlexNet
from cifar10.lenet import LeNet, MnistCNN
from cifar10.msdnet import LAYERS, MSDNet
from cifar10.nested import NestedAirbench
from cifar10.resnet import DEPTHS, ResNet
from early_exit.errors import UserError
from early_exit.model.cost import place_shares
from early_exit.model.network import MultiExitNetwork

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(ResNet, depth) for name, depth in DEPTHS.items()},
    **{name: partial(MSDNet, layers) for name, layers in LAYERS.items()},
    "airbench": Airbench,
    "airbench_mid": partial(Airbench, widths=(48, 144, 144)),
    "airbench_half": partial(Airbench, widths=(32, 128, 128)),
    "airbench_slim": partial(Airbench, widths=(16, 128, 128)),
    "airbench_nested": NestedAirbench,
    "airbench_nested_wide": partial(NestedAirbench, second=(48, 192, 192)),
    "alexnet": AlexNet,
    "lenet": LeNet,
    "mnist_2c": partial(MnistCNN, (6, 12), (5, 5)),
    "mnist_3c": partial(MnistCNN, (8, 16, 32), (3, 3, 3)),
}
DEFAULT_HEADS = dict.fromkeys(LAYERS, "msdnet")
"""The kind of head that a network gets by default, where it is not `conv`."""
# Test accuracy of the public checkpoints as their author states it, of the best epoch on test.
PUBLIC_ACCURACY = {
    "resnet20": 0.9173,
    "resnet32": 0.9263,
    "resnet44": 0.9310,
    "resnet56": 0.9339,
    "resnet110": 0.9368,
    "resnet1202": 0.9382,
}
PUBLIC_SOURCE = "github.com/akamaster/pytorch_resnet_cifar10 (best epoch on test)"


def build_backbone(
    arch: str, num_classes: int = 10, shape: Sequence[int] = (3, 32, 32)
) -> nn.Module:
    """The plain network called `arch`, untrained.

    shape: of an image, (C, H, W). Raises UserError for an unknown network.
    """
    if arch not in BACKBONES:
        raise UserError(f"there is no network {arch!r}; choose one of {', '.join(BACKBONES)}")
    return BACKBONES[arch](num_classes, shape)


def places(arch: str, shape: Sequence[int] = (3, 32, 32)) -> tuple[str, ...]:
    """The places of `arch` where an exit saves multiply-adds, if its head costs none."""
    with torch.random.fork_rng(devices=[]):
        units = build_backbone(arch, shape=shape).units()
    return tuple(place_shares(units, torch.empty(1, *shape)))


def build_network(
    arch: str = "resnet32",
    exits: Sequence[str] | None = None,
    head: str | Sequence[str] | None = None,
    num_classes: int = 10,
    shape: Sequence[int] = (3, 32, 32),
) -> MultiExitNetwork:
    """`arch` with exits after the named blocks; None: its default places; (): the plain network.

    head: the kind of head, one for all exits or one per exit; None: the network's default. shape:
    of an image, (C, H, W). Raises UserError for an unknown network, place or kind of head.
    """
    backbone = build_backbone(arch, num_classes, shape)
    return MultiExitNetwork(
        backbone,
        backbone.units(),
        backbone.default_exits if exits is None else exits,
        head=DEFAULT_HEADS.get(arch, "conv") if head is None else head,
        num_classes=num_classes,
        example=torch.zeros(1, *shape),
    )
