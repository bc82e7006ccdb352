"""The flags that the scripts share, and how their mistakes are told."""

import argparse
from pathlib import Path
from typing import Any

from early_exit.classifier import USUAL
from early_exit.config import Config
from early_exit.criteria import CRITERIA
from early_exit.guarantees import LOSSES
from early_exit.heads import HEADS


class Formatter(argparse.HelpFormatter):
    """Help with room for the names, and lines as wide as a page."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end in one line and exit code 2."""

    def error(self, message: str) -> None:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class Elsewhere(argparse.Action):
    """A flag that other scripts have and this one does not: an error that names ours."""

    def __init__(self, option_strings: list[str], dest: str, nargs=None, hint: str = "") -> None:
        super().__init__(option_strings, dest, nargs="?", help=argparse.SUPPRESS)
        self.hint = hint

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string}: {self.hint}")


def build_parser(prog: str, usage: str, docstring: str | None) -> Parser:
    """A parser whose help opens with the script's docstring: a summary, then examples.

    Under `python -OO` there are no docstrings: the help then opens with the usage alone.
    """
    summary, _, examples = (docstring or "").partition("\n\n")
    shown = f"{usage}\n\n{examples}".rstrip().replace("%", "%%")  # argparse formats a usage
    return Parser(prog=prog, usage=shown, description=summary or None, formatter_class=Formatter)


def absolute(path: str) -> str:
    """A path that means the same from every working directory."""
    return str(Path(path).absolute())


def add_setting(group: Any, *flags: str, setting: str, **options: Any) -> None:
    """A flag that sets the dotted `setting`; what is not given stays out of the namespace."""
    group.add_argument(*flags, dest=setting, default=argparse.SUPPRESS, **options)


def add_training_flags(
    parser: argparse.ArgumentParser, default: Config, default_split: str = "val"
) -> None:
    """The flags every trainer has, each for one setting of its configuration `default`.
    default_split: what -e scores."""
    _add_network_flags(parser, default)
    _add_optim_flags(parser, default)
    _add_run_flags(parser, default, default_split)
    group = add_machine_flags(parser, default.run.amp)
    add_setting(
        group, "--sync-bn", setting="run.sync_bn", action="store_const", const=True,
        help="BatchNorm over the images of all GPUs",
    )
    group = parser.add_argument_group("reproducibility")
    add_setting(
        group, "--seed", setting="run.seed", metavar="N",
        help=f"seed of weights, order and augmentation (default {default.run.seed})",
    )
    add_setting(
        group, "--split-seed", setting="data.split_seed", metavar="N",
        help=f"seed of the cut into train and val (default {default.data.split_seed})",
    )
    add_setting(
        group, "--deterministic", setting="run.deterministic", action="store_const", const=True,
        help="deterministic algorithms only",
    )


def _add_network_flags(parser: argparse.ArgumentParser, default: Config) -> None:
    group = parser.add_argument_group("network")
    add_setting(
        group, "-a", "--arch", setting="model.arch", metavar="NAME",
        help=f"backbone (default {default.model.arch})",
    )
    add_setting(
        group, "--exits", setting="model.exits", nargs="*", metavar="PLACE",
        help="places that get an exit, such as layer1 layer2.0; no names: the default places;"
        " none: the plain network (default:"
        f" {'none' if default.model.exits == () else 'the default places'})",
    )
    add_setting(
        group, "--head", setting="model.head", nargs="+", metavar="KIND",
        help=f"{', '.join(HEADS)}: the early exits' heads, one for all or one each"
        f" (default {' '.join(default.model.head)})",
    )
    add_setting(
        group, "--backbone", setting="model.backbone", metavar="FILE",
        help="trained weights of the plain network; skips the first phase of mixed, frozen and cdl",
    )


def _add_optim_flags(parser: argparse.ArgumentParser, default: Config) -> None:
    group = parser.add_argument_group("training")
    add_setting(
        group, "--regime", setting="run.regime", metavar="NAME",
        help="joint: all from scratch; mixed: the backbone first, then everything; frozen: the"
        " heads alone, on a trained backbone; cdl: as frozen, linear heads after every block"
        f" (default {default.run.regime})",
    )
    add_setting(
        group, "--epochs", setting="optim.epochs", metavar="N",
        help=f"epochs, of the last phase where there are two (default {default.optim.epochs})",
    )
    add_setting(
        group, "--backbone-epochs", setting="backbone_phase.epochs", metavar="N",
        help="epochs of the backbone's own phase (default: as --epochs)",
    )
    add_setting(
        group, "--backbone-lr", setting="backbone_phase.lr", metavar="RATE",
        help="learning rate of the backbone's own phase (default: as --lr)",
    )
    add_setting(
        group, "-b", "--batch-size", setting="optim.batch_size", metavar="N",
        help=f"images a step, over all processes (default {default.optim.batch_size})",
    )
    add_setting(
        group, "--accumulate", setting="optim.accumulate", metavar="N",
        help="goes in which a process computes its images of a step, to save memory"
        f" (default {default.optim.accumulate})",
    )
    add_setting(
        group, "--lr", "--learning-rate", setting="optim.lr", metavar="RATE",
        help=f"peak learning rate (default {default.optim.lr})",
    )
    add_setting(
        group, "--schedule", setting="optim.schedule", metavar="NAME",
        help="step: a tenth of the rate after"
        f" {' and '.join(f'{mark:.0%}' for mark in default.optim.milestones)} of the epochs; cosine"
        f" (default {default.optim.schedule})".replace("%", "%%"),
    )
    add_setting(
        group, "--momentum", setting="optim.momentum", metavar="M",
        help=f"momentum of SGD (default {default.optim.momentum})",
    )
    add_setting(
        group, "--wd", "--weight-decay", setting="optim.weight_decay", metavar="W",
        help=f"weight decay (default {default.optim.weight_decay:g})",
    )
    add_setting(
        group, "--ema", setting="optim.ema", metavar="DECAY",
        help="report a running average of the weights, of this decay a step, such as 0.999"
        " (default: none)",
    )
    add_setting(
        group, "--loss-weights", setting="loss.weights", nargs="+", metavar="W",
        help="one per exit, or one per early exit, the final one then getting the rest to 1"
        " (default: 1 each)",
    )
    add_setting(
        group, "--distill", setting="loss.distill", metavar="W",
        help="how much the final exit teaches the early ones (default 0)",
    )
    group.add_argument(
        "--start-epoch", type=int, default=0, metavar="N",
        help="begin a fresh run at this epoch of its schedule (default 0)",
    )


def _add_run_flags(parser: argparse.ArgumentParser, default: Config, default_split: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config", type=Path, metavar="FILE",
        help="preset (YAML); defaults < preset < flags",
    )
    group.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any other setting by its name in a preset, such as optim.nesterov=true",
    )
    group.add_argument(
        "--save-dir", type=Path, metavar="DIR",
        help="run directory (default: runs/NAME in the repository, the name made of the settings)",
    )
    group.add_argument(
        "--resume", metavar="PATH",
        help="go on from a checkpoint or run directory; auto: from the newest whole checkpoint of"
        " the run directory, fresh where there is none",
    )
    add_setting(
        group, "--save-every", setting="run.save_every", metavar="N",
        help=f"epochs between two checkpoints (default {default.run.save_every})",
    )
    add_setting(
        group, "-p", "--print-freq", setting="run.print_freq", metavar="N",
        help="steps between two readings of loss and accuracy (default: 20 on the bar; when the"
        " output is no terminal, one line an epoch)",
    )
    group.add_argument(
        "-e", "--evaluate", action="store_true",
        help="score the weights of --resume or --backbone on a split and leave",
    )
    group.add_argument(
        "--split", choices=("val", "test"), default=None,
        help=f"the split that -e scores (default {default_split})",
    )
    add_setting(
        group, "--tensorboard", setting="run.tensorboard", action="store_const", const=True,
        help="write TensorBoard files into the run directory",
    )
    group.add_argument(
        "--check", action="store_true",
        help="read everything, open the data, print the resolved run and leave: 0 or 2",
    )


def evaluation_parser(folder: str, trainer: str, docstring: str | None) -> Parser:
    """The flags of `folder`/eval.py, which evaluates what `folder`/`trainer` trained."""
    parser = build_parser("eval.py", f"python {folder}/eval.py RUN [flags]", docstring)
    parser.add_argument("run", type=Path, metavar="RUN", help=f"run directory that {trainer} made")
    add_setting(
        parser, "--data", setting="data.root", type=absolute, metavar="DIR",
        help="where the data set lies (default: where it lay in training)",
    )
    _add_choosing_flags(parser)
    _add_report_flags(parser)
    add_machine_flags(parser, "off")
    return parser


def _add_choosing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("choosing (on val)")
    goal = group.add_mutually_exclusive_group()
    goal.add_argument(
        "--max-drop", type=float, metavar="POINTS",
        help="accuracy given up against the final exit, in points (default 0.5)",
    )
    goal.add_argument(
        "--budget", type=float, metavar="PERCENT",
        help="multiply-adds an image may cost on average, in percent of the plain network's",
    )
    goal.add_argument(
        "--latency-budget", metavar="TIME",
        help="what a batch may take: 3ms, or 60%% of the plain network's time; from the stages'"
        " times, measured here, and the shares of val that reach them",
    )
    goal.add_argument(
        "--thresholds", type=float, nargs="+", metavar="SCORE",
        help="given scores: one for all early exits, or one each; with --criterion entropy minus"
        " BranchyNet's T, as in --thresholds=-0.3",
    )
    goal.add_argument(
        "--policy", type=Path, metavar="FILE",
        help="given whole: criterion, temperatures, thresholds and switches, as in the policy.yaml"
        " of an evaluation",
    )
    goal.add_argument(
        "--risk", type=float, metavar="POINTS",
        help="guaranteed: at most so many of a hundred images are lost against the full network"
        " (--loss), with a probability of --confidence; a fifth of val fits, the rest certifies",
    )
    goal.add_argument(
        "--delta", type=float, metavar="P",
        help="Conditional Deep Learning: an image stops where a class has this probability, at the"
        " stages whose gain on val exceeds --epsilon",
    )
    group.add_argument(
        "--latency-batch", type=int, metavar="B",
        help="of --latency-budget: images in a batch (default 1)",
    )
    group.add_argument(
        "--per-exit", action="store_true",
        help="a threshold of its own for each exit (default: one for all)",
    )
    group.add_argument(
        "--epsilon", type=float, metavar="PERCENT",
        help="of --delta: the multiply-adds that a stage must gain, in percent of the plain"
        " network's (default 0)",
    )
    group.add_argument(
        "--confidence", type=float, metavar="PERCENT", help="of --risk (default 95)"
    )
    group.add_argument(
        "--on-average", action="store_true",
        help="--risk holds on average over the draw of the certifying images instead",
    )
    group.add_argument(
        "--loss", choices=list(LOSSES), metavar="NAME",
        help="of --risk; " + "; ".join(f"{name}: {words}" for name, words in LOSSES.items())
        + ", which takes no labels (default wrong)",
    )
    group.add_argument(
        "--criterion", choices=list(CRITERIA), metavar="NAME",
        help=f"{', '.join(CRITERIA)} (default max_prob)",
    )
    group.add_argument(
        "--no-calibration", action="store_true", help="no temperatures: logits as they come"
    )
    group.add_argument(
        "--val-from", choices=("train", "test"), default="train", metavar="SPLIT",
        help="train: the images held out in training; test: half of the official test set, for"
        " backbones that may have seen those (default train)",
    )
    group.add_argument(
        "--cut-seed", type=int, default=0, metavar="N",
        help="seed of the cut that --val-from test makes (default 0)",
    )
    group.add_argument(
        "--cuts", type=int, default=1, metavar="N",
        help="with --val-from test: repeat the choice over N cuts, from --cut-seed on, and report"
        " mean and deviation (default 1)",
    )


def _add_report_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 256], metavar="B",
        help="batch sizes that are timed (default 1 256)",
    )
    group.add_argument(
        "--timing-images", type=int, default=2000, metavar="N",
        help="test images that are timed at most (default 2000)",
    )
    group.add_argument(
        "--no-live", action="store_true", help="answer from the records alone, in seconds"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--name", metavar="NAME",
        help="directory under RUN/eval (default: named after the goal); replaced if it exists",
    )
    group.add_argument("--no-plots", action="store_true", help="no pictures")


def add_evaluated_run(parser: argparse.ArgumentParser) -> None:
    """What names a run and one of its evaluations."""
    parser.add_argument(
        "run", type=Path, metavar="RUN",
        help="run directory that was evaluated, or one of its evaluations RUN/eval/NAME",
    )
    parser.add_argument(
        "--eval", metavar="NAME",
        help=f"the evaluation whose policy is taken (default: the only one, or {USUAL})",
    )


def add_machine_flags(parser: argparse.ArgumentParser, amp: str) -> Any:
    """The flags that say how the machine is used, shared by training and evaluation; returns their
    group."""
    group = parser.add_argument_group("machine")
    add_setting(
        group, "--device", setting="run.device", metavar="NAME",
        help="cpu, cuda or cuda:1 (default: the GPU where there is one)",
    )
    add_setting(
        group, "--threads", setting="run.threads", metavar="N",
        help="CPU threads (default: torch's choice)",
    )
    add_setting(
        group, "--amp", setting="run.amp", metavar="MODE",
        help=f"auto, bf16, fp16 or off; auto: bf16 where the processor is made for it"
        f" (default {amp})",
    )
    add_setting(
        group, "--compile", setting="run.compile", action="store_const", const=True,
        help="torch.compile: a minute of waiting first, then faster, or not; measure it",
    )
    add_setting(
        group, "--no-channels-last", setting="run.channels_last", action="store_const",
        const=False, help="images and weights channels first",
    )
    return group
