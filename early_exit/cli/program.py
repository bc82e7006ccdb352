"""What the programs do with their flags."""

import argparse
import contextlib
import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from early_exit import config as configs
from early_exit.cli.flags import settings_of
from early_exit.cli.settings import (
    check_flags_have_effect,
    evaluation_options,
    goal_of,
    resolve_config,
)
from early_exit.config import Config
from early_exit.errors import DataError, UserError
from early_exit.evaluation import evaluate as evaluation
from early_exit.evaluation.markdown import summary
from early_exit.evaluation.seconds import runtime_table
from early_exit.system import distributed, streams, torchrun
from early_exit.system.device import choose_device
from early_exit.task import Task
from early_exit.trained import EVALUATION
from early_exit.training import checkpoint
from early_exit.training import score as scoring
from early_exit.training import train as training
from early_exit.training.state import find_resumed


@contextlib.contextmanager
def with_data_advice(advice: str) -> Iterator[None]:
    """Adds to a `DataError` how this script is told where the data set is."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{error}; {advice}") from None


def train_or_score(
    args: argparse.Namespace,
    task: Task,
    defaults: dict[str, Any],
    runs: Path,
    eval_script: Path,
    default_split: str = "val",
) -> None:
    """What a trainer's flags ask for: a training, or with -e the accuracy of every exit.

    defaults: the script's own; runs: where run directories are; eval_script: the next step;
    default_split: the split that -e scores.
    """
    if args.split and not args.evaluate:
        raise UserError("--split needs -e")
    if args.evaluate and (args.check or args.start_epoch or args.print_config):
        raise UserError("-e only scores; remove --check, --start-epoch and --print-config")
    if args.check and args.print_config:
        raise UserError("--print-config prints the settings alone; remove --check")
    if args.evaluate and args.resume and settings_of(args).get("model", {}).get("backbone"):
        raise UserError("-e scores the weights of --resume, --backbone or --pretrained; give one")
    run_dir = args.save_dir
    if run_dir is None and args.resume == "auto":  # the directory that these flags would make
        fresh = resolve_config(args, None, defaults, task.config)
        exit_names = task.build_network(fresh, 10).exit_names
        run_dir = training.default_run_dir(runs, fresh, exit_names)
    path, saved = find_resumed(args.resume, run_dir)
    config = resolve_config(args, saved and saved["config"], defaults, task.config)
    check_flags_have_effect(args, config)
    if args.print_config:
        print(yaml.safe_dump(configs.to_dict(config), sort_keys=False), end="")
        return
    if args.evaluate:
        if saved is None and config.model.backbone is None:
            raise UserError("-e scores trained weights; name them with --resume or --backbone")
        changed = configs.merge({"run": EVALUATION}, settings_of(args))
        scored = configs.merge(configs.to_dict(config), changed)
        score(configs.build(task.config, scored), task, args.split or default_split, path, saved)
        return
    if not args.check:
        streams.make_optional()  # a log that nobody reads ends no training
    saved = None  # many megabytes; training reads the checkpoint again under its lock
    if run_dir is None and args.resume is not None:
        resumed = Path(args.resume)
        run_dir = resumed if resumed.is_dir() else resumed.parent
    run_dir = training.train(
        config,
        task,
        runs=runs,
        run_dir=run_dir,
        resume=args.resume,
        start_epoch=args.start_epoch,
        check=args.check,
    )
    if not args.check and torchrun.rank() == 0:
        print(f"trained: {run_dir}\nnext: {_next_command(config, run_dir, eval_script)}")


def _next_command(config: Config, run_dir: Path, eval_script: Path) -> str:
    """The command that evaluates a run; a plain network is only scored."""
    if config.model.exits == ():
        words = [sys.argv[0], "-e", "--split", "test", "--resume", str(run_dir)]
        return shlex.join([sys.executable, *words])
    words = [str(eval_script), str(run_dir)]
    if config.run.regime == "cdl":
        words += ["--delta", "0.9"]
    others = config.model.backbone or config.loss.teacher  # weights that may have seen val
    if others and checkpoint.load(run_dir)["unseen_val"] is None:
        words += ["--val-from", "test"]
    return shlex.join([sys.executable, *words])


def score(config: Config, task: Task, split: str, path: Path | None, saved: dict | None) -> None:
    """Prints the accuracy of every exit on a split."""
    with distributed.process_group(choose_device(config.run.device)) as group:
        names, tally = scoring.score(config, task, split, path, saved, group)
    if group.is_main:
        _, top1 = tally.read()
        for name, one, five in itertools.zip_longest(names, top1, tally.top5()):
            also = "" if five is None else f"   top 5 {100 * five:6.2f} %"
            print(f"{split} {name:9s} {100 * one:6.2f} %{also}")


def evaluate(args: argparse.Namespace, task: Task) -> None:
    """What an evaluation's flags ask for; prints the tables."""
    goal, options = goal_of(args), evaluation_options(args)
    with with_data_advice("if the data set has moved, name its directory with --data"):
        found = evaluation.evaluate_each(args.run, task, goal, **options)
    parts = [summary(report, directory) for report, directory in found]
    if runtimes := found[0][0].runtimes:
        parts.append(runtime_table(runtimes))
    print("\n\n".join(parts))
