"""Train a torchvision network with early exits on ImageNet, or on any images in class folders.

    python imagenet/main.py --arch resnet50 --exits             data/imagenet; layer1 and layer2
    python imagenet/main.py DIR --arch resnet18 --exits layer2  DIR/train/CLASS/*, DIR/val/CLASS/*
    python imagenet/main.py --dummy 2560 --epochs 1 --exits     noise: no data needed
    python imagenet/main.py DIR --pretrained --exits --regime frozen --epochs 10
    torchrun --nproc-per-node 8 imagenet/main.py DIR --config imagenet/configs/modern.yaml
"""

import argparse
import http.client
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from early_exit import cli, experiment, flags
from early_exit import config as configs
from early_exit.cost import with_every_exit
from early_exit.disk import locked, written_whole
from early_exit.errors import UserError
from early_exit.network import MultiExitNetwork
from imagenet import data, networks
from imagenet.data import FolderRun

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
WEIGHTS = ROOT / "data" / "weights"
# The recipe of ImageNet's first ResNets: He et al. 2015, section 3.4, in 90 epochs.
CLASSIC = {
    "model": {"arch": "resnet50", "exits": [], "head": networks.DEFAULT_HEAD},
    "optim": {
        "epochs": 90, "batch_size": 256, "lr": 0.1, "milestones": [1 / 3, 2 / 3],
        "warmup_epochs": 0.0,
    },
}
TORCHRUN = "torchrun starts the processes, as in: torchrun --nproc-per-node 8 imagenet/main.py"


def build_network(config: FolderRun, num_classes: int) -> MultiExitNetwork:
    """The network that the configuration describes."""
    model, images = config.model, config.data
    if model.arch.startswith("vit_") and images.train_crop != images.val_crop:
        raise UserError(
            f"{model.arch} takes images of one size, and --train-crop is {images.train_crop},"
            f" --val-crop {images.val_crop}; give both the same"
        )

    def build(exits: Sequence[str] | None) -> MultiExitNetwork:
        return networks.build_network(model.arch, exits, model.head, num_classes, images.val_crop)

    if model.exits is None and config.run.regime == "cdl":  # every block is a candidate
        return with_every_exit(build, tuple(networks.place_shares(model.arch)))
    return build(model.exits)


def statics(config: FolderRun, num_classes: int) -> list[experiment.StaticNetwork]:
    """The networks of the configuration's family, if its data set is called imagenet, has as many
    classes, and is read as torchvision reads it."""
    read = config.data.val_resize, config.data.val_crop
    if (config.data.dataset, num_classes, *read) != ("imagenet", 1000, 256, 224):
        return []
    return [
        experiment.StaticNetwork(
            name, accuracy, "torchvision (first weights of each network)",
            partial(networks.build_backbone, name),
        )
        for name, accuracy in networks.public_accuracy(config.model.arch).items()
    ]


def held_out(config: FolderRun, image: Image.Image) -> Image.Image:
    """What is done to an image that is evaluated."""
    return data.held_out(config.data)(image)


DOOR = experiment.FrontDoor(
    build_network, data.load, FolderRun, name="imagenet.main:DOOR", statics=statics,
    held_out=held_out,
)


class Directory(argparse.Action):
    """A directory by its absolute path. (A `type` would be applied to the default too, which says
    that there is none.)"""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, flags.absolute(values))


class ListArchs(argparse.Action):
    """Prints what is supported and leaves."""

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
        "data.root", nargs="?", action=Directory, metavar="DIR", default=argparse.SUPPRESS,
        help="directory with train/ and val/ (default: data/imagenet in the repository)",
    )
    parser.add_argument(
        "--list-archs", action=ListArchs,
        help="print every network with its places, their shares of the MACs, and leave",
    )
    group = parser.add_argument_group("data")
    add_workers_flag(group)
    flags.add_setting(
        group, "--bad-files", setting="data.bad_files", metavar="N",
        help="unreadable files that a process names and skips before the run stops"
        f" (default {default.data.bad_files})",
    )
    for name, what in (
        ("train_crop", "side of the crops that are trained on"),
        ("val_resize", "shorter side of held-out images before their crop"),
        ("val_crop", "side of that crop"),
    ):
        flags.add_setting(
            group, f"--{name.replace('_', '-')}", setting=f"data.{name}", metavar="PIXELS",
            help=f"{what} (default {getattr(default.data, name)})",
        )
    flags.add_setting(
        group, "--val-size", setting="data.val_size", metavar="N",
        help="images cut from train as val: a number, or a share such as 0.1 (default: 50,000, or a"
        " tenth where that is less); DIR/val is test",
    )
    flags.add_setting(
        group, "--dummy", setting="data.dummy", nargs="?", const=data.DUMMY_IMAGES, metavar="N",
        help="N images of noise instead of DIR (no N: as many as ImageNet)",
    )
    flags.add_training_flags(parser, default, default_split="test")
    parser.add_argument(
        "--pretrained", nargs="?", const="", metavar="WEIGHTS",
        help="torchvision's trained weights for the backbone, downloaded once; by name, such as"
        " IMAGENET1K_V2 (no name: IMAGENET1K_V1)",
    )
    flags.add_setting(
        parser, "--gpu", setting="run.device", type=lambda number: f"cuda:{number}", metavar="N",
        help="the one GPU to use: short for --device cuda:N",
    )
    for flag in ("--multiprocessing-distributed", "--world-size", "--rank", "--dist-url",
                 "--dist-backend"):
        parser.add_argument(flag, action=flags.Elsewhere, hint=TORCHRUN)
    return parser


def add_workers_flag(group: Any) -> None:
    """What training and evaluation share."""
    flags.add_setting(
        group, "-j", "--workers", setting="data.workers", metavar="N",
        help="processes that decode images on a machine (default: one per processor, at most 8 for"
        " each GPU)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and trains, or with -e scores."""
    args = parser().parse_args(argv)
    given = cli.resolve_config(args, None, CLASSIC, FolderRun)
    name = "dummy" if given.data.dummy else Path(given.data.root or data.ROOT).name
    own = configs.merge(CLASSIC, {"data": {"dataset": name}})
    if args.pretrained is not None:
        if given.model.backbone:
            raise UserError("--pretrained and --backbone both bring weights; drop one")
        if given.run.regime == "joint" and not args.evaluate:
            raise UserError(
                "--pretrained brings trained weights and a joint run begins from scratch; add"
                " --regime frozen or --regime mixed and exits, or -e to score them"
            )
        fetched = str(download(given, args.pretrained))
        own = configs.merge(own, {"model": {"backbone": fetched}})
    cli.train_or_score(args, DOOR, own, RUNS, ROOT / "imagenet" / "eval.py", default_split="test")


def download(config: FolderRun, name: str) -> Path:
    """A file with torchvision's weights for the configuration's network, fetched where absent.

    Raises UserError where there is no network, or no weights of that name or size.
    """
    from torchvision import models

    arch = config.model.arch
    networks.refuse_unknown(arch)
    known = {weights.name: weights for weights in models.get_model_weights(arch)}
    fitting = [
        weights.name for weights in known.values()
        if not arch.startswith("vit_") or weights.transforms().crop_size == [config.data.val_crop]
    ]
    if "/" in name or Path(name, "train").is_dir():
        raise UserError(f"--pretrained took {name} for weights; put the directory before the flags")
    if not name:
        name = next(iter(fitting), "")
    if name not in fitting:
        raise UserError(
            f"torchvision has no weights {name or 'of that size'} for {arch} at"
            f" {config.data.val_crop} pixels; it has {', '.join(known)}"
        )
    path = WEIGHTS / f"{arch}-{name}.pth"
    with locked(WEIGHTS, wait=True):  # several processes, or several runs
        if not path.exists():
            try:
                net = models.get_model(arch, weights=known[name])
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                raise UserError(
                    f"downloading {known[name].url} failed ({' '.join(str(error).split())});"
                    " fetch it elsewhere and name it with --backbone FILE"
                ) from None
            with written_whole(path) as file:
                torch.save(net.state_dict(), file)
    return path


if __name__ == "__main__":
    cli.run(main, "main.py")
