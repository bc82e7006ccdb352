"""The flags of an evaluation."""

import argparse
from pathlib import Path
from typing import Any

from early_exit.choosing.guarantees import LOSSES
from early_exit.cli.flags import Parser, add_data_flag, add_machine_flags, build_parser
from early_exit.inference.criteria import CRITERIA
from early_exit.training.rounding import ROUNDINGS


def evaluation_parser(script: str, trainer: str, docstring: str | None) -> Parser:
    """The parser of a script, such as cifar10/eval.py, which evaluates the runs of `trainer`."""
    parser = build_parser(Path(script).name, f"python {script} RUN [flags]", docstring)
    parser.add_argument("run", type=Path, metavar="RUN", help=f"run directory made by {trainer}")
    add_data_flag(parser)
    _add_weights_flag(parser)
    _add_choosing_flags(parser)
    _add_measuring_flags(parser)
    _add_output_flags(parser)
    _add_runtime_flag(add_machine_flags(parser, "off"))
    return parser


def _add_weights_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=ROUNDINGS,
        metavar="TYPE",
        help="float16: round all weights to it first, so that thresholds and numbers are those of"
        " the rounded network, which an export stores in half the size; running statistics stay as"
        " they are, and what the network computes in does not change (default: the weights as they"
        " were trained)",
    )


def _add_choosing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("goal (one of these), for which a policy is chosen on val")
    _add_goal_flags(group.add_mutually_exclusive_group())
    _add_goal_refinements(parser.add_argument_group("refinements of a goal"))
    group = parser.add_argument_group("choosing on val")
    group.add_argument(
        "--criterion",
        choices=list(CRITERIA),
        metavar="NAME",
        help=f"exit criterion: {', '.join(CRITERIA)} (default: max_prob)",
    )
    group.add_argument(
        "--no-calibration",
        action="store_true",
        help="do not fit temperatures; use the logits as they are (default: fit one per exit)",
    )
    group.add_argument(
        "--val-from",
        choices=("train", "test"),
        default="train",
        metavar="SPLIT",
        help="train: val is the images held out in training; test: val is half of the official test"
        " set, for backbones that may have been trained on val (default: train)",
    )
    group.add_argument(
        "--cut-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the cut for --val-from test (default: 0)",
    )
    group.add_argument(
        "--cuts",
        type=int,
        default=1,
        metavar="N",
        help="with --val-from test: repeat the choice for N cuts, with seeds --cut-seed,"
        " --cut-seed + 1, ..., and"
        " report mean and standard deviation (default: 1)",
    )


def _add_goal_flags(goal: Any) -> None:
    goal.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="the cheapest policy that loses at most this much accuracy against the final exit, in"
        " percentage points (default goal: --max-drop 0.5)",
    )
    goal.add_argument(
        "--budget",
        type=float,
        metavar="PERCENT",
        help="the most accurate policy whose mean multiply-adds per image are at most this, in"
        " percent of the plain network's",
    )
    goal.add_argument(
        "--latency-budget",
        metavar="TIME",
        help="the most accurate policy whose predicted time per batch is at most this: milliseconds"
        " such as 3ms, or a percentage of the plain network's time such as 60%%; predicted from"
        " times of segments measured now and the fractions of val that reach each of them",
    )
    goal.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="SCORE",
        help="these thresholds: one for all early exits, or one per exit; with --criterion entropy,"
        " minus BranchyNet's T, as in --thresholds=-0.3",
    )
    goal.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="the policy in this file (criterion, temperatures, thresholds, enabled exits), such as"
        " the policy.yaml of an evaluation",
    )
    goal.add_argument(
        "--risk",
        type=float,
        metavar="POINTS",
        help="the cheapest policy with a guarantee: at most this percentage of images has a loss"
        " (--loss) against the full network, with probability --confidence; a fifth of val fits the"
        " policy, the rest certifies it",
    )
    goal.add_argument(
        "--delta",
        type=float,
        metavar="P",
        help="Conditional Deep Learning: an image exits when a class reaches this probability, at"
        " least 0.5 and below 1; only stages whose gain on val exceeds --epsilon are enabled",
    )


def _add_goal_refinements(group: Any) -> None:
    group.add_argument(
        "--minimise",
        choices=("macs", "seconds"),
        metavar="PRICE",
        help="for --max-drop and the default goal: what the cheapest policy has fewest of: macs, or"
        " seconds per batch, measured in the runtime (default: macs)",
    )
    group.add_argument(
        "--latency-batch",
        type=int,
        metavar="B",
        help="for --latency-budget and --minimise seconds: images per batch (default: 1)",
    )
    group.add_argument(
        "--epsilon",
        type=float,
        metavar="PERCENT",
        help="for --delta: the gain in multiply-adds that an enabled stage must exceed, in percent"
        " of the plain network's (default: 0)",
    )
    group.add_argument(
        "--confidence",
        type=float,
        metavar="PERCENT",
        help="for --risk: probability that the guarantee holds, in percent (default: 95)",
    )
    group.add_argument(
        "--on-average",
        action="store_true",
        help="for --risk: guarantee the risk on average over draws of the certifying images,"
        " instead of with a probability",
    )
    losses = "; ".join(f"{name}: {words}" for name, words in LOSSES.items())
    group.add_argument(
        "--loss",
        choices=list(LOSSES),
        metavar="NAME",
        help=f"for --risk: what counts as a loss. {losses}, which needs no labels (default: wrong)",
    )


def _add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        metavar="B",
        help="batch sizes to time (default: 1 256)",
    )
    group.add_argument(
        "--timing-images",
        type=int,
        metavar="N",
        help="time at most this many test images (default: 2000)",
    )
    group.add_argument(
        "--no-live",
        action="store_true",
        help="use the stored logits only: no inference with exits taken, no timing; takes seconds",
    )


def _add_runtime_flag(group: Any) -> None:
    group.add_argument(
        "--runtime",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="what runs the network, precision included: torch, torch-bf16, compile, onnxruntime,"
        " openvino-bf16, ...; of several, each has its own record, thresholds and times, and the"
        " report compares them; fastest: the one in which the plain network is fastest, without"
        " 8-bit integers, which change the accuracy, and torch.compile, which takes minutes"
        " (default: torch, as --amp and --compile say)",
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--name",
        metavar="NAME",
        help="directory under RUN/eval, replaced if it exists; with several runtimes, theirs are"
        " appended (default: named after the goal, --weights and the runtime)",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write records/ and eval/NAME here and only read RUN; predict, export and compare then"
        " take DIR as they take RUN (default: RUN)",
    )
    group.add_argument("--no-plots", action="store_true", help="write no plots and no report.html")
