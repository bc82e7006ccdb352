"""Train a torchvision network with early exits on ImageNet, or on any images in class folders.

    python imagenet/main.py --arch resnet50 --exits             data/imagenet; layer1 and layer2
    python imagenet/main.py DIR --arch resnet18 --exits layer2  DIR/train/CLASS/*, DIR/val/CLASS/*
    python imagenet/main.py --dummy 2560 --epochs 1 --exits     noise: no data needed
    python imagenet/main.py DIR --pretrained --exits --regime frozen --epochs 10
    torchrun --nproc-per-node 8 imagenet/main.py DIR --config imagenet/configs/modern.yaml

Flags override the preset (--config), and the preset overrides the defaults.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("imagenet.main", "main.py", log_on_stdout=True)

import argparse
import contextlib
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from early_exit import config as configs
from early_exit.cli import flags, program, settings, training_flags
from early_exit.data import folders
from early_exit.data.class_folders import LooseImages
from early_exit.data.folders import FolderConfig, FolderRun
from early_exit.errors import UserError
from early_exit.model.cost import with_every_exit
from early_exit.model.network import MultiExitNetwork
from early_exit.task import StaticNetwork, Task
from imagenet import networks, weights

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
DATA = ROOT / "data" / "imagenet"
# Moves the 50,000 images of val into their class folders, as in PyTorch's own ImageNet example.
SORT_VAL = (
    "wget -qO- https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"
    " | bash"
)
# The recipe of the first ResNets on ImageNet (He et al. 2015, section 3.4), in 90 epochs.
CLASSIC = {
    "model": {"arch": "resnet50", "exits": [], "head": networks.DEFAULT_HEAD},
    "optim": {
        "epochs": 90,
        "batch_size": 256,
        "lr": 0.1,
        "milestones": [1 / 3, 2 / 3],
        "warmup_epochs": 0.0,
    },
}


def build_network(config: FolderRun, num_classes: int) -> MultiExitNetwork:
    """The network that the configuration describes."""
    model, images = config.model, config.data
    if model.arch.startswith("vit_") and images.train_crop != images.val_crop:
        raise UserError(
            f"{model.arch} takes images of one size, but --train-crop is {images.train_crop} and"
            f" --val-crop is {images.val_crop}; set both to the same"
        )

    def build(exits: Sequence[str] | None) -> MultiExitNetwork:
        return networks.build_network(model.arch, exits, model.head, num_classes, images.val_crop)

    if model.exits is None and config.run.regime == "cdl":
        return with_every_exit(build, networks.places(model.arch))
    return build(model.exits)


def load_data(config: FolderConfig) -> folders.Data:
    """The class folders that the configuration describes; default: data/imagenet in the
    repository."""
    try:
        return folders.load(config, DATA)
    except LooseImages as error:
        if not error.example.startswith("ILSVRC2012_val_"):
            raise
        raise UserError(
            f"{error}; for ImageNet's val run: cd {shlex.quote(str(error.folder))} && {SORT_VAL}"
        ) from None


def static_networks(config: FolderRun, num_classes: int) -> list[StaticNetwork]:
    """torchvision's networks of the same family as the configuration's; none if the data set is not
    ImageNet, or is not read as in torchvision's evaluation."""
    evaluation = config.data.val_resize, config.data.val_crop
    if (config.data.dataset, num_classes, *evaluation) != ("imagenet", 1000, 256, 224):
        return []
    return [
        StaticNetwork(
            name,
            accuracy,
            "torchvision (first weights of each network)",
            partial(networks.build_backbone, name),
        )
        for name, accuracy in networks.public_accuracy(config.model.arch).items()
    ]


TASK = Task(
    build_network,
    load_data,
    FolderRun,
    name="imagenet",
    static_networks=static_networks,
    prepare=folders.prepare,
)


class StoreDirectory(flags.StoreSetting):
    """Stores the absolute path of a directory. (argparse would apply a `type` to the suppressed
    default too.)"""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        super().__call__(parser, namespace, flags.absolute(values), option_string)


class ListArchs(argparse.Action):
    """Prints the supported networks and exits."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for line in networks.describe_archs():
            print(line)
        parser.exit()


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser("main.py", "python imagenet/main.py [DIR] [flags]", __doc__)
    default = configs.build(FolderRun, CLASSIC)
    parser.add_argument(
        "data.root",
        nargs="?",
        action=StoreDirectory,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="directory with train/ and val/ (default: data/imagenet in the repository)",
    )
    parser.add_argument(
        "--list-archs",
        action=ListArchs,
        help="print every network with its places and their shares of the MACs, and exit",
    )
    _add_data_flags(parser, default.data)
    training_flags.add_training_flags(parser, default, default_split="test")
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const="",
        metavar="WEIGHTS",
        help="start from torchvision's trained weights of this name, such as IMAGENET1K_V2,"
        " downloaded once; no name: IMAGENET1K_V1 (default: from scratch)",
    )
    flags.add_setting(
        parser,
        "--gpu",
        setting="run.device",
        type=lambda number: f"cuda:{number}",
        metavar="N",
        help="the one GPU to use; short for --device cuda:N (default: see --device)",
    )
    parser.instead = dict.fromkeys(
        ("--multiprocessing-distributed", "--world-size", "--rank", "--dist-url", "--dist-backend"),
        "torchrun --nproc-per-node 8 imagenet/main.py",
    )
    return parser


def _add_data_flags(parser: argparse.ArgumentParser, default: FolderConfig) -> None:
    group = parser.add_argument_group("data")
    add_reading_flags(group)
    flags.add_setting(
        group,
        "--no-file-check",
        setting="data.check_files",
        const=False,
        help="do not read the headers of all val and test images before training (default: read"
        " them, to find unreadable files early)",
    )
    for name, meaning in (
        ("train_crop", "side of the random crops for training"),
        ("val_resize", "shorter side of val and test images before the centre crop"),
        ("val_crop", "side of the centre crop of val and test images"),
    ):
        flags.add_setting(
            group,
            f"--{name.replace('_', '-')}",
            setting=f"data.{name}",
            metavar="PIXELS",
            help=f"{meaning}, in pixels (default: {getattr(default, name)})",
        )
    flags.add_setting(
        group,
        "--val-size",
        setting="data.val_size",
        metavar="N",
        help="train images held out as val: a number, or a fraction such as 0.1; DIR/val is test"
        " (default: 50000, or a tenth of train if that is less)",
    )
    flags.add_setting(
        group,
        "--dummy",
        setting="data.dummy",
        nargs="?",
        const=folders.DUMMY_IMAGES,
        metavar="N",
        help="use N images of noise instead of DIR; no N: as many as ImageNet has"
        " (default: use DIR)",
    )


def add_reading_flags(group: Any) -> None:
    """Adds the flags for reading files, which training and evaluation share."""
    flags.add_setting(
        group,
        "-j",
        "--workers",
        setting="data.workers",
        metavar="N",
        help="processes per machine that decode images; 0: none (default: one per processor, at"
        " most 8 per GPU)",
    )
    flags.add_setting(
        group,
        "--bad-files",
        setting="data.bad_files",
        metavar="N",
        help="unreadable files that each process names and leaves out before it stops (default: 0;"
        " evaluations: as in training)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and trains, or with -e scores."""
    args = parser().parse_args(argv)
    advice = "name the directory of the data set before the flags, or try --dummy, which needs none"
    with program.with_data_advice(advice):
        defaults = script_defaults(args)
        if args.pretrained is not None:
            backbone = str(_pretrained(args, defaults))
            args.settings = {**args.settings, "model.backbone": backbone}
        program.train_or_score(
            args,
            TASK,
            defaults,
            RUNS,
            ROOT / "imagenet" / "eval.py",
            default_split="test",
        )


def script_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The default settings, with the data set named after its directory."""
    with contextlib.suppress(UserError):  # if the flags fit only the settings of a resumed run
        config = settings.resolve_config(args, None, CLASSIC, FolderRun)
        name = "dummy" if config.data.dummy else Path(config.data.root or DATA).name
        return configs.merge(CLASSIC, {"data": {"dataset": name}})
    return CLASSIC


def _pretrained(args: argparse.Namespace, defaults: dict[str, Any]) -> Path:
    """The file of the weights that --pretrained names. Raises UserError if they have no use."""
    config = settings.resolve_config(args, None, defaults, FolderRun)
    if config.model.backbone:
        raise UserError("--pretrained and --backbone both give weights; remove one")
    if config.run.regime == "joint" and not args.evaluate:
        raise UserError(
            "--pretrained gives trained weights, but a joint run trains from scratch; add --exits"
            " with --regime frozen or --regime mixed, or add -e to score the weights"
        )
    return weights.find(config, args.pretrained, fetch=not args.print_config)
