"""Train a CIFAR ResNet with early exits.

    python cifar10/trainer.py                        CIFAR-10, ResNet-32, one exit after layer1
    python cifar10/trainer.py --dataset digits       no network needed, a minute on a laptop
    python cifar10/trainer.py --arch resnet56 --exits layer1 layer2 --regime mixed
    python cifar10/trainer.py --arch resnet20 --exits none --backbone FILE -e --split test
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from cifar10 import data, resnet
from early_exit import cli, experiment, training
from early_exit.config import Config, DataConfig
from early_exit.errors import UserError
from early_exit.network import MultiExitNetwork

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
CIFAR10 = {"data": {"dataset": "cifar10"}}
# What the digits differ in: 1,257 images are seen in a second, and a small network is enough.
DIGITS = {
    "model": {"arch": "resnet20", "exits": ["layer1", "layer2"]},
    "optim": {"epochs": 25, "batch_size": 64, "schedule": "cosine"},
}

log = logging.getLogger(__name__)


def build_network(config: Config, num_classes: int) -> MultiExitNetwork:
    """The network that the configuration describes."""
    model = config.model
    return resnet.build_network(model.arch, model.exits, model.head, num_classes)


def load_data(settings: DataConfig) -> data.Data:
    """The data set that `settings` describe."""
    return data.load(settings.dataset, settings.root, settings.split_seed)


DOOR = experiment.FrontDoor(build_network, load_data)


def parser() -> cli.Parser:
    """The trainer's flags."""
    parser = cli.build_parser("trainer.py", "python cifar10/trainer.py [flags]", __doc__)
    group = parser.add_argument_group("data")
    cli.add_setting(
        group, "--dataset", setting="data.dataset", metavar="NAME",
        help="cifar10, or digits, which needs no network (default cifar10)",
    )
    cli.add_setting(
        group, "--data", setting="data.root", metavar="DIR",
        help="where cifar-10-batches-py lies, or is put (default: data/ in the repository)",
    )
    cli.add_training_flags(parser, Config())
    parser.add_argument(
        "-j", "--workers", action=cli.Elsewhere,
        hint="the whole data set lies in memory as a tensor, so there are no workers;"
        " --threads N sets the CPU threads",
    )
    parser.add_argument(
        "--half", action=cli.Elsewhere, hint="use --amp fp16, which keeps the weights in float32"
    )
    parser.add_argument(
        "--pretrained", action=cli.Elsewhere, hint="use --backbone FILE for trained weights"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and trains, or with -e scores."""
    args = parser().parse_args(argv)
    _, saved = training.find_resumed(args.resume, args.save_dir)
    config = cli.resolve_config(args, saved and saved["config"], CIFAR10)
    if config.data.dataset == "digits":
        config = cli.resolve_config(args, saved and saved["config"], DIGITS)
    if args.evaluate:
        split = args.split or "val"
        if saved is None and config.model.backbone is None:
            raise UserError("-e scores trained weights; name them with --resume or --backbone")
        names, accuracy = experiment.score(config, DOOR, split, saved)
        for name, value in zip(names, accuracy, strict=True):
            print(f"{split} {name:9s} {100 * value:6.2f} %")
        return
    if args.split:
        raise UserError("--split goes with -e")
    run_dir = args.save_dir
    if run_dir is None and args.resume not in (None, "auto"):
        path = Path(args.resume)
        run_dir = path if path.is_dir() else path.parent
    run_dir = training.train(
        config, DOOR, runs=RUNS, run_dir=run_dir, resume=args.resume, start_epoch=args.start_epoch
    )
    print(f"trained: {run_dir}\nnext: python {ROOT / 'cifar10' / 'eval.py'} {run_dir}")


if __name__ == "__main__":
    cli.run(main, "trainer.py")
