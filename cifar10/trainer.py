"""Train a CIFAR ResNet, or another small network, with early exits.

    python cifar10/trainer.py                        CIFAR-10, ResNet-32, one exit after layer1
    python cifar10/trainer.py --dataset digits       no download, about a minute on a laptop
    python cifar10/trainer.py --arch resnet56 --exits layer1 layer2 --regime mixed
    python cifar10/trainer.py --arch resnet20 --exits none --backbone FILE -e --split test
    python cifar10/trainer.py --config cifar10/configs/b-lenet.yaml

Flags override the preset (--config), and the preset overrides the defaults.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("cifar10.trainer", "trainer.py", log_on_stdout=True)

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cifar10 import data, networks, resnet
from early_exit import config as configs
from early_exit.cli import flags, program, settings, training_flags
from early_exit.config import Config, DataConfig
from early_exit.model.cost import with_every_exit
from early_exit.model.network import MultiExitNetwork
from early_exit.task import StaticNetwork, Task

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
CIFAR10 = {"data": {"dataset": "cifar10"}}
# An epoch of the digits' 1,257 images takes a second, and a small network is enough for them.
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

    if model.exits is None and config.run.regime == "cdl":
        return with_every_exit(build, networks.places(model.arch, shape))
    return build(model.exits)


def load_data(config: DataConfig) -> data.Data:
    """The data set that the configuration describes."""
    loaded = data.load(config.dataset, config.root, config.split_seed)
    return loaded.augmented(config.flip, config.pad, config.pad_mode)


def static_networks(config: Config, _num_classes: int) -> list[StaticNetwork]:
    """The CIFAR ResNets with a public checkpoint, up to the depth of the configuration's network,
    or to ResNet-110 if that is no ResNet; none if the data set is not CIFAR-10."""
    if config.data.dataset != "cifar10":
        return []
    depth = resnet.DEPTHS.get(config.model.arch, resnet.DEPTHS["resnet110"])
    return [
        StaticNetwork(
            name, accuracy, networks.PUBLIC_SOURCE, partial(networks.build_backbone, name)
        )
        for name, accuracy in networks.PUBLIC_ACCURACY.items()
        if resnet.DEPTHS[name] <= depth
    ]


TASK = Task(build_network, load_data, name="cifar10", static_networks=static_networks)


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser("trainer.py", "python cifar10/trainer.py [flags]", __doc__)
    group = parser.add_argument_group("data")
    flags.add_setting(
        group,
        "--dataset",
        setting="data.dataset",
        metavar="NAME",
        help="data set: cifar10, cifar100, mnist, or digits, which needs no download (default:"
        " cifar10)",
    )
    flags.add_setting(
        group,
        "--data",
        setting="data.root",
        type=flags.absolute,
        metavar="DIR",
        help="directory that holds cifar-10-batches-py, cifar-100-python or MNIST, or that they are"
        " downloaded to (default: data/ in the repository)",
    )
    training_flags.add_training_flags(parser, Config())
    parser.instead = {
        "-j": "--threads N (the images are in memory, so there are no workers)",
        "--workers": "--threads N (the images are in memory, so there are no workers)",
        "--half": "--amp fp16",
        "--pretrained": "--backbone FILE",
    }
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and trains, or with -e scores."""
    args = parser().parse_args(argv)
    with program.with_data_advice("name the directory of the data set with --data"):
        program.train_or_score(
            args, TASK, script_defaults(args), RUNS, ROOT / "cifar10" / "eval.py"
        )


def script_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The default settings for the data set and the network that the flags or their preset name."""
    config = settings.resolve_config(args, None, CIFAR10)
    defaults, arch = DIGITS if config.data.dataset == "digits" else CIFAR10, config.model.arch
    if arch not in resnet.DEPTHS:  # the digits' exits are places of the ResNets
        defaults = configs.merge(defaults, {"model": {"exits": None}})
    if arch in networks.DEFAULT_HEADS:
        defaults = configs.merge(defaults, {"model": {"head": [networks.DEFAULT_HEADS[arch]]}})
    return defaults
