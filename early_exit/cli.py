"""From flags to a configuration and a goal, and how a program ends."""

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
from early_exit.choosing import Goal
from early_exit.config import Config
from early_exit.epochs import Diverged
from early_exit.errors import UserError
from early_exit.experiment import FrontDoor
from early_exit.policy import Policy
from early_exit.runtime import Stopped, check_torchvision
from early_exit.trained import EVALUATION

# What the regime cdl differs in: linear classifiers, and every block is a candidate.
CDL = {"model": {"head": ["linear"], "exits": None}}


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
    if args.evaluate and args.resume and settings_of(args).get("model", {}).get("backbone"):
        raise UserError("-e scores the weights of --resume or of --backbone; name one of them")
    run_dir = args.save_dir
    if run_dir is None and args.resume == "auto":  # the directory that these flags would make
        fresh = resolve_config(args, None, own, door.config)
        exit_names = door.build_network(fresh, 10).exit_names
        run_dir = training.default_run_dir(runs, fresh, exit_names)
    _, saved = training.find_resumed(args.resume, run_dir)
    config = resolve_config(args, saved and saved["config"], own, door.config)
    refuse_useless(args, config)
    if args.evaluate:
        if saved is None and config.model.backbone is None:
            raise UserError("-e scores trained weights; name them with --resume or --backbone")
        changed = configs.merge({"run": EVALUATION}, settings_of(args))
        scored = configs.merge(configs.to_dict(config), changed)
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


def refuse_useless(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError for flags that this run would not look at."""
    given = settings_of(args)
    plain, several = config.model.exits == (), len(config.loss.weights or ()) > 1
    one_phase = plain or config.run.regime == "joint" or config.model.backbone is not None
    for flag, section, name, useless, why in (
        ("--backbone-epochs", "backbone_phase", "epochs", one_phase, "has no such phase"),
        ("--backbone-lr", "backbone_phase", "lr", one_phase, "has no such phase"),
        ("--loss-weights", "loss", "weights", plain and several, "has no early exits"),
        ("--distill", "loss", "distill", plain and config.loss.distill > 0, "has no early exits"),
        ("--head", "model", "head", plain, "has no early exits"),
    ):
        if useless and name in given.get(section, {}):
            raise UserError(f"{flag} is of no use: this run {why}")


def score(config: Config, door: FrontDoor, split: str, saved: dict | None) -> None:
    """Prints the accuracy of every exit on a split."""
    with distributed.joined(runtime.choose_device(config.run.device)) as group:
        names, tally = experiment.score(config, door, split, saved, group)
    if group.leads:
        _, top1 = tally.read()
        for name, one, five in itertools.zip_longest(names, top1, tally.top5()):
            also = "" if five is None else f"   top 5 {100 * five:6.2f} %"
            print(f"{split} {name:9s} {100 * one:6.2f} %{also}")


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
        max_drop, args.budget, args.latency_budget, args.thresholds, args.policy, args.risk,
        args.delta,
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
    if args.policy and (args.criterion or args.no_calibration):
        raise UserError("--policy brings its criterion and temperatures; drop the other flag")
    confidence = 95 if args.confidence is None else args.confidence
    return Goal(
        max_drop=None if max_drop is None else max_drop / 100,
        budget=None if args.budget is None else args.budget / 100,
        thresholds=None if args.thresholds is None else tuple(args.thresholds),
        policy=args.policy and Policy.load(args.policy),
        risk=None if args.risk is None else args.risk / 100,
        confidence=None if args.on_average else confidence / 100,
        loss=args.loss or "wrong",
        delta=args.delta,
        epsilon=(args.epsilon or 0.0) / 100,
        per_exit=args.per_exit,
        latency=None if args.latency_budget is None else _latency(args.latency_budget),
        latency_batch=1 if args.latency_batch is None else args.latency_batch,
        criterion=args.criterion or "max_prob",
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
    if name is None and args.policy:  # two files are two evaluations
        name = f"policy-{args.policy.stem}"
    if name is not None and (name in ("", "..") or Path(name).name != name):
        raise UserError(f"--name is {name!r}; it names one directory, without a path")
    return {
        "overrides": settings_of(args),
        "val_from": args.val_from,
        "cut_seed": args.cut_seed,
        "cuts": args.cuts,
        "name": name,
        "batch_sizes": tuple(args.batch_sizes),
        "timing_images": args.timing_images,
        "live": not args.no_live,
        "draw": not args.no_plots,
    }


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
