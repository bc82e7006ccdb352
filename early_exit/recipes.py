"""Stored evaluations read back: of several runs, and seeds of one recipe taken together.

Runs whose settings are equal but for the seed (and for what does not bear on the result), evaluated
under the same name for the same goal, are seeds of one recipe.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from early_exit import config as configs
from early_exit.config import Config
from early_exit.errors import UserError
from early_exit.losses import resolve_weights
from early_exit.metrics import mean_std
from early_exit.trained import evaluations, training_command

GRID = 200  # multiply-adds at which the curves of several seeds are read
# Settings that change how fast or how visibly a run goes, not what it learns.
IRRELEVANT = {
    "data.root", "data.workers", "data.bad_files",
    *(f"run.{name}" for name in (
        "device", "threads", "compile", "channels_last", "deterministic", "save_every",
        "print_freq", "tensorboard",
    )),
}


@dataclass(frozen=True)
class Value:
    """A number, and its sample standard deviation where it is a mean over seeds or cuts."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a comparison needs of a report. MACs are an image's, accuracies test's."""

    path: Path
    run: Path
    name: str
    dataset: str
    seed: int | None
    settings: dict[str, Any]
    """Of the run, by dotted name, without the seed; of an evaluation without its run what the
    report says."""
    goal: tuple[str, str, bool]
    """What was asked for, the criterion, and whether there were temperatures."""
    split: str
    """Where val came from; if it was half of test, test is the other half."""
    cuts: int
    accuracy: Value
    share: Value
    final: Value
    plain_macs: int
    alone: dict[str, float]
    curve: tuple[np.ndarray, np.ndarray]
    """Rising MACs and their accuracies."""
    speedups: dict[int, float]
    precision: str
    device: str

    def exit_alone(self, at: int) -> float | None:
        """Accuracy if all of test left at one early exit, None where there is no such exit."""
        return dict(enumerate(self.alone.values())).get(at)


@dataclass(frozen=True)
class Recipe:
    """A row: one evaluation, or several that differ in the seed alone."""

    members: tuple[Evaluation, ...]
    name: str = ""
    """What sets its run apart from the others."""
    goal: str = ""
    label: str = ""
    """Name, and the goal where the compared goals differ."""

    @property
    def first(self) -> Evaluation:
        """One for what all have in common."""
        return self.members[0]

    @property
    def plain(self) -> bool:
        """Whether it has no early exit."""
        return not self.first.alone

    @property
    def batch_sizes(self) -> list[int]:
        """Those that were timed."""
        return sorted({size for member in self.members for size in member.speedups})

    def over(self, get: Callable[[Evaluation], Value | float | None]) -> Value | None:
        """Mean and deviation over seeds of what `get` finds; of one seed just that."""
        found = [value for value in map(get, self.members) if value is not None]
        values = [value if isinstance(value, Value) else Value(value) for value in found]
        if len(values) < 2:
            return values[0] if values else None
        return Value(*mean_std([value.mean for value in values]))

    def accuracy(self) -> Value:
        """At the chosen point."""
        return self.over(lambda one: one.accuracy)

    def final(self) -> Value:
        """Accuracy of the final exit."""
        return self.over(lambda one: one.final)

    def share(self) -> Value:
        """MACs at the chosen point, as a share of the plain network's."""
        return self.over(lambda one: one.share)

    def macs(self) -> Value:
        """MACs at the chosen point."""
        share, plain = self.share(), self.first.plain_macs
        return Value(plain * share.mean, None if share.std is None else plain * share.std)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """MACs, mean accuracy and its deviation. Of several seeds: read off each curve by linear
        interpolation at the same MACs, evenly over the range that all of them cover."""
        curves = [member.curve for member in self.members]
        if len(curves) == 1:
            return (*curves[0], np.zeros(len(curves[0][0])))
        low, high = max(macs[0] for macs, _ in curves), min(macs[-1] for macs, _ in curves)
        grid = np.unique(np.linspace(low, high, GRID)) if low <= high else np.empty(0)
        rows = np.array([np.interp(grid, *curve) for curve in curves])
        return grid, rows.mean(axis=0), rows.std(axis=0, ddof=1)


def find(run: Path, names: Sequence[str]) -> list[Path]:
    """The reports that a RUN of the command line stands for."""
    if run.is_file():
        return [run]
    if (run / "report.json").is_file():
        return [run / "report.json"]
    if not run.is_dir():
        raise UserError(f"there is no run, evaluation or report at {run}")
    there = evaluations(run, "report.json")
    if not there:
        raise UserError(f"{run} has no evaluation yet; make one: {evaluating(run)}")
    chosen = [there[name] for name in names if name in there] if names else list(there.values())
    if not chosen:
        raise UserError(f"{run} has no evaluation {' or '.join(names)}; it has {', '.join(there)}")
    return chosen


def evaluating(run: Path) -> str:
    """The command that evaluates a run: that of the folder whose trainer made it."""
    trainer = Path(*training_command(run)[:1])  # of a run that does not say, only the script's name
    script = trainer.with_name("eval.py") if trainer.suffix == ".py" else Path("eval.py")
    return shlex.join(["python", str(script), str(run)])


def read(path: Path) -> Evaluation:
    """The evaluation whose report lies at `path`."""
    inside = path.parent.parent.name == "eval"
    run = path.parent.parent.parent if inside else path.parent
    again = f"run eval.py on {run if inside else 'its run'} again"
    try:
        report = json.loads(path.read_text(), parse_constant=_no_number)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is torn or no JSON; {again}") from None
    try:
        settings = _settings(run, report)
        return _evaluation(path, run, settings.pop("run.seed", None), settings, report)
    except KeyError as error:
        raise UserError(f"{path} has no {error}, so it is of another version; {again}") from None
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no whole report of this version; {again}") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _evaluation(path, run, seed, settings, report) -> Evaluation:
    cuts, plain = report.get("cuts"), int(report["plain_macs"])
    if cuts:
        found = [Value(float(cuts[name]["mean"]), float(cuts[name]["std"]))
                 for name in ("accuracy", "macs_share", "final_accuracy")]
    else:
        test = report["test"]
        found = [Value(float(value)) for value in (
            test["accuracy"], test["macs_share"], report["final_accuracy"]
        )]
    points = [(point["test"]["macs_share"] * plain, point["test"]["accuracy"])
              for point in report["curve"]]
    macs, accuracy = np.array(sorted(points), dtype=float).T
    return Evaluation(
        path, run, path.parent.name, str(report["dataset"]), seed, settings,
        (str(report["chosen_by"]), report.get("criterion", ""), report.get("calibrated", True)),
        str(report["val_from"]), int(cuts["count"]) if cuts else 0, *found, plain,
        {str(row["name"]): float(row["accuracy"]) for row in report["exits"][:-1]},
        (macs, accuracy),
        {int(timing["batch_size"]): timing["plain"]["total"] / timing["live"]["total"]
         for timing in report.get("timing", ())},
        str(report.get("precision")),
        str(report.get("device")),
    )


def _settings(run: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The run's settings by dotted name, those of older runs filled in with their defaults, and
    spelt one way."""
    exits = [row["name"] for row in report["exits"][:-1]]
    path = run / "config.yaml"
    if not path.is_file():
        return {
            "model.arch": report["arch"], "run.regime": report["regime"], "model.exits": exits,
        }
    nested = configs.merge(configs.to_dict(Config()), configs.load_preset(path))
    if not all(isinstance(section, dict) for section in nested.values()):
        raise UserError(f"{path} is not the configuration of a run")
    settings = {
        f"{section}.{name}": value for section, values in nested.items()
        for name, value in values.items() if f"{section}.{name}" not in IRRELEVANT
    }
    heads = settings["model.head"]
    heads = [heads] if isinstance(heads, str) else heads
    weights = settings["loss.weights"] if exits else None  # a plain network has no use for them
    return settings | {
        "model.exits": exits,
        "model.head": heads[:1] if len(set(heads)) == 1 else heads,
        "loss.weights": list(resolve_weights(weights, len(exits) + 1)),
    }


def group(evaluations: Sequence[Evaluation], each: bool = False) -> list[Recipe]:
    """Recipes in the order of their first member. Two runs of the same seed are not two seeds."""
    recipes: dict[str, list[Evaluation]] = {}
    for found in evaluations:
        key = [
            found.settings, found.name, found.goal, found.split, found.cuts, found.precision
        ]
        alone = each or found.seed is None  # without a config.yaml nobody knows what is equal
        key = json.dumps([*key, str(found.path) if alone else ""], sort_keys=True, default=str)
        recipes.setdefault(key, []).append(found)
    rows = []
    for members in recipes.values():
        repeated = len({member.seed for member in members}) < len(members)
        rows += [(member,) for member in members] if repeated else [tuple(members)]
    return [Recipe(row) for row in rows]
