"""The command line: flags that both trainers share, and how a program ends."""

import argparse
import contextlib
import itertools
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from early_exit import config as configs
from early_exit import checkpoint, distributed, evaluation, experiment, runtime, training
from early_exit.classifier import USUAL
from early_exit.config import Config
from early_exit.choosing import Goal
from early_exit.criteria import CRITERIA
from early_exit.errors import UserError
from early_exit.experiment import FrontDoor
from early_exit.guarantees import LOSSES
from early_exit.heads import HEADS
from early_exit.runtime import Stopped, check_torchvision
from early_exit.trained import EVALUATION
from early_exit.training import Diverged


def absolute(path: str) -> str:
    """A path that means the same from every working directory."""
    return str(Path(path).absolute())


# What the regime cdl differs in: linear classifiers, and every block is a candidate.
CDL = {"model": {"head": ["linear"], "exits": None}}


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


def add_setting(group: Any, *flags: str, setting: str, **options: Any) -> None:
    """A flag that sets the dotted `setting`; what is not given stays out of the namespace."""
    group.add_argument(*flags, dest=setting, default=argparse.SUPPRESS, **options)


def add_training_flags(
    parser: argparse.ArgumentParser, default: Config, default_split: str = "val"
) -> None:
    """The flags every trainer has, each for one setting of its configuration `default`."""
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


def evaluation_parser(folder: str, trainer: str, docstring: str) -> Parser:
    """The flags of `folder`/eval.py, which evaluates what `folder`/`trainer` trained."""
    parser = build_parser("eval.py", f"python {folder}/eval.py RUN [flags]", docstring)
    parser.add_argument("run", type=Path, metavar="RUN", help=f"run directory that {trainer} made")
    add_setting(
        parser, "--data", setting="data.root", type=absolute, metavar="DIR",
        help="where the data set lies (default: where it lay in training)",
    )
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
        "--criterion", choices=list(CRITERIA), default="max_prob", metavar="NAME",
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
    add_machine_flags(parser, "off")
    return parser


def evaluate(args: argparse.Namespace, door: FrontDoor) -> None:
    """What an evaluation's flags ask for; prints the table."""
    report, directory = evaluation.evaluate(
        args.run, door, goal_of(args), **evaluation_options(args)
    )
    print(evaluation.summary(report, directory))


def goal_of(args: argparse.Namespace) -> Goal:
    """What the evaluation's flags ask for; nothing: half a point."""
    max_drop = args.max_drop
    goals = (
        max_drop, args.budget, args.latency_budget, args.thresholds, args.risk, args.delta
    )
    if all(value is None for value in goals):
        max_drop = 0.5
    if args.risk is None and (args.confidence is not None or args.on_average or args.loss):
        raise UserError("--confidence, --on-average and --loss go with --risk")
    if args.latency_budget is None and args.latency_batch is not None:
        raise UserError("--latency-batch goes with --latency-budget")
    if args.delta is None and args.epsilon is not None:
        raise UserError("--epsilon goes with --delta")
    if args.confidence is not None and args.on_average:
        raise UserError("--on-average has no confidence; drop one of the two")
    confidence = 95 if args.confidence is None else args.confidence
    return Goal(
        max_drop=None if max_drop is None else max_drop / 100,
        budget=None if args.budget is None else args.budget / 100,
        thresholds=None if args.thresholds is None else tuple(args.thresholds),
        risk=None if args.risk is None else args.risk / 100,
        confidence=None if args.on_average else confidence / 100,
        loss=args.loss or "wrong",
        delta=args.delta,
        epsilon=(args.epsilon or 0.0) / 100,
        per_exit=args.per_exit,
        latency=None if args.latency_budget is None else _latency(args.latency_budget),
        latency_batch=1 if args.latency_batch is None else args.latency_batch,
        criterion=args.criterion,
        calibrate=not args.no_calibration and args.delta is None,  # delta is of plain outputs
    )


def _latency(text: str) -> tuple[float, str]:
    """`3ms` or `60%` as seconds or a share."""
    for suffix, scale, unit in (("ms", 1000, "s"), ("%", 100, "share")):
        if text.endswith(suffix):
            with contextlib.suppress(ValueError):
                return float(text.removesuffix(suffix)) / scale, unit
    raise UserError(f"--latency-budget takes 3ms or 60%, got {text!r}")


def evaluation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The other keyword arguments of `evaluation.evaluate`."""
    for flag, number in (
        ("--cuts", args.cuts), ("--timing-images", args.timing_images),
        ("--batch-sizes", min(args.batch_sizes)),
    ):
        if number < 1:
            raise UserError(f"{flag} must be at least 1, got {number}")
    if args.cut_seed < 0:
        raise UserError(f"--cut-seed must not be negative, got {args.cut_seed}")
    name = args.name
    if name is not None and (name in ("", "..") or Path(name).name != name):
        raise UserError(f"--name is {name!r}; it names one directory, without a path")
    return {
        "overrides": for_evaluation(args),
        "val_from": args.val_from,
        "cut_seed": args.cut_seed,
        "cuts": args.cuts,
        "name": args.name,
        "batch_sizes": tuple(args.batch_sizes),
        "timing_images": args.timing_images,
        "live": not args.no_live,
        "draw": not args.no_plots,
    }


def build_parser(prog: str, usage: str, docstring: str) -> Parser:
    """A parser whose help opens with the script's docstring: a summary, then examples."""
    summary, _, examples = docstring.partition("\n\n")
    return Parser(
        prog=prog, usage=f"{usage}\n\n{examples.rstrip()}", description=summary,
        formatter_class=Formatter,
    )


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


def settings_of(namespace: argparse.Namespace) -> dict[str, Any]:
    """The nested settings that flags (and --set) gave."""
    given = {key: value for key, value in vars(namespace).items() if "." in key}
    for pair in getattr(namespace, "set", []):
        key, equals, value = pair.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--set takes SECTION.NAME=VALUE, got {pair!r}")
        given[key] = value.split(",") if "," in value else value
    nested: dict[str, Any] = {}
    for key, value in given.items():
        section, name = key.split(".", 1)
        nested.setdefault(section, {})[name] = value
    model = nested.get("model", {})
    for name, what in (("exits", "a place"), ("head", "a kind of head")):
        given = model.get(name)
        for word in given if isinstance(given, list) else ():
            if "/" in word or (Path(word) / "train").is_dir():
                raise UserError(
                    f"--{name} took the directory {word} for {what}; put the directory before the"
                    " flags, or -- between"
                )
    exits = model.get("exits")
    if exits is not None:
        # no names: the default places, which the configuration writes as null
        nested["model"]["exits"] = exits or None
    return nested


def for_evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """What an evaluation changes in a run's settings."""
    return configs.merge({"run": EVALUATION}, settings_of(args))


def resolve_config(
    namespace: argparse.Namespace,
    saved: dict[str, Any] | None,
    own: dict[str, Any] | None = None,
    cls: type[Config] = Config,
) -> Config:
    """Defaults of `cls` < the script's own < the regime's < a resumed run's < preset < flags."""
    given = saved or {}
    if namespace.config:
        preset = configs.load_preset(namespace.config)
        configs.build(cls, preset)  # a mistake in the preset is named as the preset's
        given = configs.merge(given, preset)
    given = configs.merge(given, settings_of(namespace))
    if given.get("run", {}).get("regime") == "cdl":
        own = configs.merge(own or {}, CDL)
    return configs.build(cls, configs.merge(own or {}, given))


def train_or_score(
    args: argparse.Namespace,
    door: FrontDoor,
    own: dict[str, Any],
    runs: Path,
    eval_script: Path,
    default_split: str = "val",
) -> None:
    """What a trainer's flags ask for: a training, or with -e the accuracy of every exit.

    own: the script's own defaults; runs: where run directories lie; eval_script: what comes next;
    default_split: what -e scores.
    """
    if args.split and not args.evaluate:
        raise UserError("--split goes with -e")
    if args.evaluate and (args.check or args.start_epoch):
        raise UserError("--check and --start-epoch are for training, -e only scores")
    run_dir = args.save_dir
    if run_dir is None and args.resume == "auto":  # the directory that these flags would make
        fresh = resolve_config(args, None, own, door.config)
        exit_names = door.build_network(fresh, 10).exit_names
        run_dir = training.default_run_dir(runs, fresh, exit_names)
    _, saved = training.find_resumed(args.resume, run_dir)
    config = resolve_config(args, saved and saved["config"], own, door.config)
    if args.evaluate:
        if saved is None and config.model.backbone is None:
            raise UserError("-e scores trained weights; name them with --resume or --backbone")
        scored = configs.merge(configs.to_dict(config), for_evaluation(args))
        score(configs.build(door.config, scored), door, args.split or default_split, saved)
        return
    saved = None  # of many megabytes; training reads what it goes on from under its lock
    if run_dir is None and args.resume is not None:
        path = Path(args.resume)
        run_dir = path if path.is_dir() else path.parent
    run_dir = training.train(
        config, door, runs=runs, run_dir=run_dir, resume=args.resume,
        start_epoch=args.start_epoch, check=args.check,
    )
    if args.check or distributed.rank() > 0:
        return
    following = [str(eval_script), str(run_dir)]
    if config.run.regime == "cdl":
        following += ["--delta", "0.9"]
    if config.model.backbone and checkpoint.load(run_dir)["unseen_val"] is None:
        following += ["--val-from", "test"]
    if config.model.exits == ():  # a plain network has nothing to choose
        following = [sys.argv[0], "-e", "--split", "test", "--resume", str(run_dir)]
    print(f"trained: {run_dir}\nnext: {shlex.join([sys.executable, *following])}")


def score(config: Config, door: FrontDoor, split: str, saved: dict | None) -> None:
    """Prints the accuracy of every exit on a split."""
    with distributed.joined(runtime.choose_device(config.run.device)) as group:
        names, tally = experiment.score(config, door, split, saved, group)
    if group.leads:
        _, top1 = tally.read()
        for name, one, five in itertools.zip_longest(names, top1, tally.top5()):
            also = "" if five is None else f"   top 5 {100 * five:6.2f} %"
            print(f"{split} {name:9s} {100 * one:6.2f} %{also}")


def run(main: Callable[[Sequence[str] | None], None], prog: str) -> None:
    """Runs a script's `main` and leaves: 0 done, 2 bad usage or bad data, 143 or 130 stopped by a
    signal and saved, 1 anything else."""
    level = logging.WARNING if distributed.rank() else logging.INFO
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stdout)
    try:
        runtime.leave_on_sigterm()
        check_torchvision()
        main(None)
    except (UserError, Stopped) as error:
        sys.exit(_fail(prog, error, error.code))
    except (Diverged, distributed.Lost) as error:
        sys.exit(_fail(prog, error, 1))
    except KeyboardInterrupt:
        sys.exit(_fail(prog, "interrupted", 130))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _fail(prog: str, message: object, code: int) -> int:
    """Prints the one line and returns the code; one of several processes leaves at once, because
    what connects it with the others can not be taken down alone."""
    sys.stdout.flush()
    if distributed.rank() > 0:
        # mostly the first process says the same, and torchrun ends this one as soon as it leaves
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if not (distributed.rank() and isinstance(message, Stopped)):  # of which all are told
        print(f"{prog}: {message}", file=sys.stderr, flush=True)
    if distributed.world_size() > 1:
        os._exit(code)
    return code
