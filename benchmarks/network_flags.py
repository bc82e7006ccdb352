"""The flags of a network with random weights, its exits and random images, which several benchmarks
share. Imports no torch."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from early_exit.cli.flags import flag_of
from early_exit.errors import UserError

CIFAR_SIZE = 32  # the side of the images of cifar10's networks
NETWORK = {
    "arch": "resnet56",
    "image_size": CIFAR_SIZE,
    "exits": ["layer1", "layer2"],
    "exit_shares": [0.5, 0.3],
    "images": 1024,
}
"""Defaults."""


def add_network_flags(group: Any, defaults: Mapping[str, Any]) -> None:
    """Adds the flags that there are defaults for."""
    for name, kind, metavar, text in (
        ("arch", str, "NAME", "backbone"),
        (
            "image_size",
            int,
            "PIXELS",
            f"side of the images; {CIFAR_SIZE}: a network of cifar10, more: one of imagenet",
        ),
        ("exits", str, "PLACE", "places of the early exits"),
        ("exit_shares", float, "SHARE", "share of the images that exits at each early exit"),
        ("images", int, "N", "number of images"),
        ("batch_sizes", int, "N", "batch sizes to time"),
    ):
        if name not in defaults:
            continue
        default = defaults[name]
        several = isinstance(default, list)
        shown = " ".join(map(str, default)) if several else default
        group.add_argument(
            flag_of(name),
            nargs="+" if several else None,
            type=kind,
            default=default,
            metavar=metavar,
            help=f"{text} (default {shown})",
        )


def check_shares(args: argparse.Namespace) -> None:
    """Raises UserError for shares or batch sizes that cannot be measured."""
    if (
        len(args.exit_shares) != len(args.exits)
        or min(args.exit_shares) < 0
        or sum(args.exit_shares) > 1
    ):
        raise UserError(
            f"--exit-shares takes {len(args.exits)} shares, one per early exit, that add up to"
            " at most 1"
        )
    if not 1 <= min(args.batch_sizes) <= max(args.batch_sizes) <= args.images:
        raise UserError(f"--batch-sizes must be between 1 and the {args.images} --images")


def check_order(args: argparse.Namespace, exit_names: Sequence[str]) -> None:
    """Raises UserError if --exits are in another order than the network's, in which --exit-shares
    are applied. exit_names: the network's, the final exit's last."""
    own = list(exit_names[:-1])
    if args.exits != own:
        raise UserError(
            "--exit-shares belong to the exits in the network's order; pass --exits"
            f" {' '.join(own)}, and the shares in that order"
        )
