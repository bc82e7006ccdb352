"""The flags of a trainer."""

import argparse
from pathlib import Path
from typing import Any

from early_exit.cli.flags import add_machine_flags, add_setting
from early_exit.config import Config
from early_exit.model.heads import HEADS


def add_training_flags(
    parser: argparse.ArgumentParser, default: Config, default_split: str = "val"
) -> None:
    """Adds the flags of every trainer, most of them for one setting each.

    default: the configuration whose values the help shows. default_split: the split that -e scores.
    """
    _add_network_flags(parser, default)
    _add_optim_flags(parser, default)
    _add_run_flags(parser, default, default_split)
    group = add_machine_flags(parser, default.run.amp)
    add_setting(
        group,
        "--cuda-graphs",
        setting="run.cuda_graphs",
        const=True,
        help="train with CUDA graphs, for small networks on one GPU, whose kernels take less time"
        " than their launches",
    )
    add_setting(
        group,
        "--sync-bn",
        setting="run.sync_bn",
        const=True,
        help="compute BatchNorm's statistics over the images of all GPUs (default: of each GPU)",
    )
    group = parser.add_argument_group("reproducibility")
    add_setting(
        group,
        "--seed",
        setting="run.seed",
        metavar="N",
        help="seed of the initial weights, the order of the images and the augmentation (default:"
        f" {default.run.seed})",
    )
    add_setting(
        group,
        "--split-seed",
        setting="data.split_seed",
        metavar="N",
        help=f"seed of the cut into train and val (default: {default.data.split_seed})",
    )
    add_setting(
        group,
        "--deterministic",
        setting="run.deterministic",
        const=True,
        help="allow deterministic algorithms only (default: allow all)",
    )


def _add_network_flags(parser: argparse.ArgumentParser, default: Config) -> None:
    group = parser.add_argument_group("network")
    add_setting(
        group,
        "-a",
        "--arch",
        setting="model.arch",
        metavar="NAME",
        help=f"backbone (default: {default.model.arch})",
    )
    plain = default.model.exits == ()
    add_setting(
        group,
        "--exits",
        setting="model.exits",
        nargs="*",
        metavar="PLACE",
        help="places that get an exit, such as layer1 layer2.0; no names: the backbone's default"
        f" places; none: the plain network (default: {'none' if plain else 'the default places'})",
    )
    add_setting(
        group,
        "--head",
        setting="model.head",
        nargs="+",
        metavar="KIND",
        help=f"kind of the early exits' heads, one for all or one per exit: {', '.join(HEADS)}"
        f" (default: {' '.join(default.model.head)}, unless the network has its own)",
    )
    add_setting(
        group,
        "--backbone",
        setting="model.backbone",
        metavar="FILE",
        help="trained weights of the plain network (a run, or a file of torch.save or safetensors),"
        " instead of the first phase of mixed, frozen and cdl (default: train it)",
    )


def _add_optim_flags(parser: argparse.ArgumentParser, default: Config) -> None:
    group = parser.add_argument_group("training")
    add_setting(
        group,
        "--regime",
        setting="run.regime",
        metavar="NAME",
        help="joint: the backbone and all heads from scratch; mixed: first the backbone, then both"
        " together; frozen: first the backbone, then only the heads; cdl: as frozen, with linear"
        f" heads after every block (default: {default.run.regime})",
    )
    _add_phase_flags(group, default)
    _add_sgd_flags(group, default)
    add_setting(
        group,
        "--ema",
        setting="optim.ema",
        metavar="DECAY",
        help="evaluate a moving average of the weights with this decay per step, such as 0.999"
        " (default: the last weights)",
    )
    add_setting(
        group,
        "--loss-weights",
        setting="loss.weights",
        nargs="+",
        metavar="W",
        help="loss weights: one per exit; or one per early exit, then the final exit gets 1 minus"
        " their sum (default: 1 each)",
    )
    add_setting(
        group,
        "--distill",
        setting="loss.distill",
        metavar="W",
        help="weight of the loss that distills the final exit into the early ones (default:"
        f" {default.loss.distill:g})",
    )


def _add_phase_flags(group: Any, default: Config) -> None:
    add_setting(
        group,
        "--epochs",
        setting="optim.epochs",
        metavar="N",
        help=f"epochs, of the second phase if there are two (default: {default.optim.epochs})",
    )
    add_setting(
        group,
        "--backbone-epochs",
        setting="backbone_phase.epochs",
        metavar="N",
        help="epochs of the first phase, which trains the backbone (default: as --epochs)",
    )
    add_setting(
        group,
        "--backbone-lr",
        setting="backbone_phase.lr",
        metavar="RATE",
        help="peak learning rate of the first phase (default: as --lr)",
    )
    group.add_argument(
        "--start-epoch",
        type=int,
        default=0,
        metavar="N",
        help="start a new run at this epoch of its schedule (default: 0)",
    )


def _add_sgd_flags(group: Any, default: Config) -> None:
    optim = default.optim
    add_setting(
        group,
        "-b",
        "--batch-size",
        setting="optim.batch_size",
        metavar="N",
        help=f"images per step, over all processes (default: {optim.batch_size})",
    )
    add_setting(
        group,
        "--accumulate",
        setting="optim.accumulate",
        metavar="N",
        help="micro-batches per step and process; more need less memory (default:"
        f" {optim.accumulate})",
    )
    add_setting(
        group,
        "--lr",
        "--learning-rate",
        setting="optim.lr",
        metavar="RATE",
        help=f"peak learning rate (default: {optim.lr})",
    )
    milestones = " and ".join(f"{milestone:.0%}" for milestone in optim.milestones)
    add_setting(
        group,
        "--schedule",
        setting="optim.schedule",
        metavar="NAME",
        help=f"step: the learning rate falls tenfold after {milestones} of the epochs; cosine: it"
        " falls to 0 along a cosine; triangular: it rises and falls linearly"
        f" (default: {optim.schedule})".replace("%", "%%"),
    )
    add_setting(
        group,
        "--momentum",
        setting="optim.momentum",
        metavar="M",
        help=f"momentum of SGD (default: {optim.momentum})",
    )
    add_setting(
        group,
        "--wd",
        "--weight-decay",
        setting="optim.weight_decay",
        metavar="W",
        help=f"weight decay (default: {optim.weight_decay:g})",
    )


def _add_run_flags(parser: argparse.ArgumentParser, default: Config, default_split: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="preset (YAML); it overrides the defaults, flags override it (default: none)",
    )
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="other settings by their names in a preset, such as optim.nesterov=true",
    )
    group.add_argument(
        "--save-dir",
        type=Path,
        metavar="DIR",
        help="run directory (default: runs/NAME in the repository, with a name made from the"
        " settings)",
    )
    group.add_argument(
        "--resume",
        metavar="PATH",
        help="continue from a checkpoint or a run directory; auto: from the newest readable"
        " checkpoint in the run directory, or a new run if there is none (default: a new run)",
    )
    add_setting(
        group,
        "--save-every",
        setting="run.save_every",
        metavar="N",
        help=f"epochs between checkpoints (default: {default.run.save_every})",
    )
    add_setting(
        group,
        "-p",
        "--print-freq",
        setting="run.print_freq",
        metavar="N",
        help="steps between updates of loss and accuracy (default: 20 in the progress bar of a"
        " terminal; elsewhere one line per epoch)",
    )
    group.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help="score the weights of --resume or --backbone on a split, and exit",
    )
    group.add_argument(
        "--split",
        choices=("val", "test"),
        default=None,
        help=f"split that -e scores (default: {default_split})",
    )
    add_setting(
        group,
        "--tensorboard",
        setting="run.tensorboard",
        const=True,
        help="write TensorBoard files into the run directory",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="check the settings and the data, print what would be trained, and exit; the exit code"
        " is 2 after an error",
    )
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings as a preset, and exit",
    )
