"""Train a CIFAR ResNet, or another small network, with early exits.

    python cifar10/trainer.py                        CIFAR-10, ResNet-32, one exit after layer1
    python cifar10/trainer.py --dataset digits       no network needed, a minute on a laptop
    python cifar10/trainer.py --arch resnet56 --exits layer1 layer2 --regime mixed
    python cifar10/trainer.py --arch resnet20 --exits none --backbone FILE -e --split test
    python cifar10/trainer.py --config cifar10/configs/b-lenet.yaml
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cifar10 import data, networks, resnet
from early_exit import cli, experiment, flags
from early_exit.config import Config, DataConfig
from early_exit.cost import with_every_exit
from early_exit.network import MultiExitNetwork

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
CIFAR10 = {"data": {"dataset": "cifar10"}}
# What the digits differ in: 1,257 images are seen in a second, and a small network is enough.
DIGITS = {
    "model": {"arch": "resnet20", "exits": ["layer1", "layer2"]},
    "optim": {"epochs": 25, "batch_size": 64, "schedule": "cosine"},
}


def build_network(config: Config, num_classes: int) -> MultiExitNetwork:
    """The network that the configuration describes."""
    model = config.model
    shape = data.SHAPES.get(config.data.dataset, data.SHAPES["cifar10"])

    def build(exits: Sequence[str] | None) -> MultiExitNetwork:
        return networks.build_network(model.arch, exits, model.head, num_classes, shape)

    if model.exits is None and config.run.regime == "cdl":  # every block is a candidate
        return with_every_exit(build, networks.places(model.arch, shape))
    return build(model.exits)


def load_data(settings: DataConfig) -> data.Data:
    """The data set that `settings` describe."""
    return data.load(settings.dataset, settings.root, settings.split_seed)


def statics(config: Config, _num_classes: int) -> list[experiment.StaticNetwork]:
    """The CIFAR ResNets with a public checkpoint that are not deeper than the configuration's, if
    that is one of them."""
    known, arch = networks.PUBLIC_ACCURACY, config.model.arch
    if config.data.dataset != "cifar10" or arch not in known:
        return []
    return [
        experiment.StaticNetwork(
            name, accuracy, networks.PUBLIC_SOURCE, partial(networks.build_backbone, name)
        )
        for name, accuracy in known.items() if resnet.DEPTHS[name] <= resnet.DEPTHS[arch]
    ]


DOOR = experiment.FrontDoor(build_network, load_data, name="cifar10.trainer:DOOR", statics=statics)


def parser() -> flags.Parser:
    """The trainer's flags."""
    parser = flags.build_parser("trainer.py", "python cifar10/trainer.py [flags]", __doc__)
    group = parser.add_argument_group("data")
    flags.add_setting(
        group, "--dataset", setting="data.dataset", metavar="NAME",
        help="cifar10, mnist, or digits, which needs no network (default cifar10)",
    )
    flags.add_setting(
        group, "--data", setting="data.root", type=flags.absolute, metavar="DIR",
        help="where cifar-10-batches-py or MNIST lies, or is put (default: data/ in the"
        " repository)",
    )
    flags.add_training_flags(parser, Config())
    parser.add_argument(
        "-j", "--workers", action=flags.Elsewhere,
        hint="the whole data set lies in memory as a tensor, so there are no workers;"
        " --threads N sets the CPU threads",
    )
    parser.add_argument(
        "--half", action=flags.Elsewhere, hint="use --amp fp16, which keeps the weights in float32"
    )
    parser.add_argument(
        "--pretrained", action=flags.Elsewhere, hint="use --backbone FILE for trained weights"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and trains, or with -e scores."""
    args = parser().parse_args(argv)
    cli.train_or_score(args, DOOR, own_settings(args), RUNS, ROOT / "cifar10" / "eval.py")


def own_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The defaults that go with the data set that the flags or their preset name."""
    given = cli.resolve_config(args, None, CIFAR10)
    return DIGITS if given.data.dataset == "digits" else CIFAR10


if __name__ == "__main__":
    cli.run(main, "trainer.py")
