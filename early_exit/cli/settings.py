"""From flags to a configuration, a goal and the options of an evaluation."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from early_exit import config as configs
from early_exit.choosing.goals import (
    Budget,
    ConditionalDeepLearning,
    FixedPolicy,
    FixedThresholds,
    Goal,
    LatencyBudget,
    MaxDrop,
    Risk,
)
from early_exit.cli.flags import check_at_least, flag_of, settings_of
from early_exit.config import Config
from early_exit.errors import UserError
from early_exit.evaluation.runtimes import FASTEST
from early_exit.inference.policy import Policy
from early_exit.system.names import is_hidden

# The schedules that a setting of optim belongs to.
SCHEDULES_OF = {
    "milestones": ("step",),
    "warmup_epochs": ("step", "cosine"),
    **dict.fromkeys(("peak", "start_factor", "end_factor"), ("triangular",)),
}
# The defaults of the regime cdl: linear heads, and an exit after every block.
CDL = {"model": {"head": ["linear"], "exits": None}}


def resolve_config(
    args: argparse.Namespace,
    saved: dict[str, Any] | None,
    defaults: dict[str, Any] | None = None,
    cls: type[Config] = Config,
) -> Config:
    """Defaults of `cls` < the script's `defaults` < the regime's < a resumed run's (`saved`) <
    preset < flags."""
    given = saved or {}
    if args.config:
        preset = configs.load_preset(args.config)
        configs.build(cls, preset)  # an error in the preset is reported as the preset's
        given = configs.merge(given, preset)
    given = configs.merge(given, settings_of(args))
    if given.get("run", {}).get("regime") == "cdl":
        defaults = configs.merge(defaults or {}, CDL)
    return configs.build(cls, configs.merge(defaults or {}, given))


def check_flags_have_effect(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError for flags that this run would ignore."""
    given = settings_of(args)
    plain, several = config.model.exits == (), len(config.loss.weights or ()) > 1
    has_weights = config.model.backbone is not None
    one_phase = plain or config.run.regime == "joint" or has_weights
    no_scaled_heads = plain and config.optim.head_lr_scale != 1
    only_heads = has_weights and config.run.regime in ("frozen", "cdl")
    no_stem = only_heads and config.optim.stem_epochs > 0
    no_heads = plain and config.run.regime != "joint" and not has_weights  # else: plan_phases
    no_teacher, schedule = config.loss.teacher is None, config.optim.schedule
    no_distillation = no_teacher and config.loss.distill == 0
    of_schedule = [
        (f"--set optim.{name}", "optim", name, schedule not in schedules, f"a {schedule} schedule")
        for name, schedules in SCHEDULES_OF.items()
    ]
    for flag, section, name, ignored, reason in (
        ("--set loss.teacher_weight", "loss", "teacher_weight", no_teacher, "no teacher"),
        (
            "--set loss.distill_temperature",
            "loss",
            "distill_temperature",
            no_distillation,
            "no distillation (--distill or loss.teacher)",
        ),
        ("--set loss.start", "loss", "start", plain and config.loss.start, "no early exits"),
        ("--set optim.head_lr_scale", "optim", "head_lr_scale", no_scaled_heads, "no early exits"),
        ("--set optim.stem_epochs", "optim", "stem_epochs", no_stem, "a frozen backbone"),
        *of_schedule,
        ("--backbone-epochs", "backbone_phase", "epochs", one_phase, "no such phase"),
        ("--backbone-lr", "backbone_phase", "lr", one_phase, "no such phase"),
        ("--loss-weights", "loss", "weights", plain and several, "no early exits"),
        ("--distill", "loss", "distill", plain and config.loss.distill > 0, "no early exits"),
        ("--head", "model", "head", plain, "no early exits"),
        ("--regime", "run", "regime", no_heads, "no early exits (--exits names them)"),
    ):
        if ignored and name in given.get(section, {}):
            raise UserError(f"{flag} has no effect: this run has {reason}; remove it")


def goal_of(args: argparse.Namespace) -> Goal:
    """The goal that an evaluation's flags name; none: --max-drop 0.5."""
    _check_companions(args)
    common: dict[str, Any] = {
        "criterion": args.criterion or Goal.criterion,
        "calibrate": not args.no_calibration,
    }
    if args.policy is not None:
        if args.criterion or args.no_calibration:
            raise UserError(
                "--policy has its own criterion and temperatures; remove the other flag"
            )
        return FixedPolicy(Policy.load(args.policy))
    if args.thresholds is not None:
        return FixedThresholds(tuple(args.thresholds), **common)
    if args.budget is not None:
        return Budget(args.budget / 100, **common)
    if args.latency_budget is not None:
        batch = 1 if args.latency_batch is None else args.latency_batch
        limit, of_plain = _latency(args.latency_budget)
        return LatencyBudget(limit, of_plain, batch, **common)
    if args.risk is not None:
        percent = 95 if args.confidence is None else args.confidence
        confidence = None if args.on_average else percent / 100
        return Risk(args.risk / 100, confidence, args.loss or "wrong", **common)
    if args.delta is not None:
        return ConditionalDeepLearning(
            args.delta, (args.epsilon or 0) / 100, criterion=common["criterion"]
        )
    drop = 0.005 if args.max_drop is None else args.max_drop / 100
    if args.minimise == "seconds":
        batch = 1 if args.latency_batch is None else args.latency_batch
        return MaxDrop(drop, "seconds", batch, **common)
    return MaxDrop(drop, **common)


def _check_companions(args: argparse.Namespace) -> None:
    """Raises UserError for a flag without the one that it refines."""
    refinements = {
        "risk": ("confidence", "on_average", "loss"),
        "delta": ("epsilon",),
    }
    others = ("budget", "latency_budget", "thresholds", "policy", "risk", "delta")
    other = next((name for name in others if getattr(args, name) is not None), None)
    if args.minimise and other:
        raise UserError(f"--minimise is for --max-drop; remove --minimise or {flag_of(other)}")
    if args.latency_batch is not None and not (args.latency_budget or args.minimise == "seconds"):
        raise UserError("--latency-batch needs --latency-budget or --minimise seconds")
    for goal, names in refinements.items():
        for name in names:
            value = getattr(args, name)
            if getattr(args, goal) is None and value is not None and value is not False:
                raise UserError(f"{flag_of(name)} needs {flag_of(goal)}")
    if args.confidence is not None and args.on_average:
        raise UserError("--on-average has no confidence; remove --confidence or --on-average")


def _latency(text: str) -> tuple[float, bool]:
    """`3ms` in seconds, or `60%` as a share of the plain network's time; and whether it is one."""
    for suffix, scale, of_plain in (("ms", 1000, False), ("%", 100, True)):
        if text.endswith(suffix):
            with contextlib.suppress(ValueError):
                return float(text.removesuffix(suffix)) / scale, of_plain
    raise UserError(f"--latency-budget takes 3ms or 60%, got {text!r}")


def evaluation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The other keyword arguments of `early_exit.evaluation.evaluate.evaluate_each`."""
    check_at_least(args, 1, "cuts", "timing_images", "batch_sizes")
    if args.cut_seed < 0:
        raise UserError(f"--cut-seed must not be negative, got {args.cut_seed}")
    name = args.name
    if name is not None and (is_hidden(name) or Path(name).name != name):
        raise UserError(
            f"--name is {name!r}; give the name of one directory, without a path, that is not"
            " hidden: it must not begin with a dot"
        )
    runtimes = tuple(args.runtime or (None,))
    if args.no_live:
        # the fastest runtime is the one at the first batch size
        timed = ["timing_images", *([] if FASTEST in runtimes else ["batch_sizes"])]
        for given in (flag_of(flag) for flag in timed if getattr(args, flag) is not None):
            raise UserError(
                f"{given} has no effect with --no-live, which does not time test images; remove it"
            )
    measuring = {
        "batch_sizes": args.batch_sizes and tuple(args.batch_sizes),
        "timing_images": args.timing_images,
    }
    return {
        "runtimes": runtimes,
        "overrides": settings_of(args),
        "val_from": args.val_from,
        "cut_seed": args.cut_seed,
        "cuts": args.cuts,
        "name": name,
        "base": f"policy-{_policy_name(args.policy)}" if args.policy else None,
        "out": args.out,
        "rounded_to": args.weights,
        **{option: value for option, value in measuring.items() if value is not None},
        "live": not args.no_live,
        "draw": not args.no_plots,
    }


def _policy_name(path: Path) -> str:
    """A name for a policy file: its own, or for a policy.yaml that of its directory, after the
    run's if it is of an evaluation."""
    path = path.resolve()
    if path.name != "policy.yaml":
        return path.stem
    in_run = path.parent.parent.name == "eval"
    return f"{path.parents[2].name}-{path.parent.name}" if in_run else path.parent.name
