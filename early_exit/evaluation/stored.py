"""Evaluations read back from the reports of run directories."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.choosing.goals import Goal
from early_exit.errors import UserError
from early_exit.evaluation.stored_seconds import Seconds, read_seconds
from early_exit.evaluation.stored_settings import read_settings
from early_exit.evaluation.upgrade import read_report
from early_exit.manifest import refuse_deployed
from early_exit.output import source_run
from early_exit.system.directories import restore_all
from early_exit.trained import HELD_OUT, evaluations, training_commands


@dataclass(frozen=True)
class Value:
    """A number; if it is a mean over seeds or cuts, with the sample standard deviation."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class PublicNetwork:
    """A network without exits, trained by others, that a report compares with."""

    name: str
    accuracy: float
    """On the official test set, as its source states it."""
    macs: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a comparison needs of a report. MACs are per image, accuracies on test."""

    path: Path
    run: Path
    name: str
    dataset: str
    seed: int | None
    """None if the run's config.yaml is not there."""
    settings: dict[str, Any]
    """The run's settings by dotted name, without the seed; without a config.yaml, those that the
    report has."""
    goal: str
    criterion: str
    calibrated: bool
    val_images: tuple[Any, ...]
    """Equal for evaluations on the same images of val."""
    val_from: str
    """Where val came from; if it was half of the official test set, test is the other half."""
    cuts: int
    """Number of cuts that the values are means over; 0 if there is one split."""
    given: bool
    """Whether the user gave the thresholds or the policy, so they were not chosen on val."""
    test_images: int | None
    """None: the report does not say."""
    accuracy: Value
    macs_share: Value
    """Of the plain network's MACs."""
    final_accuracy: Value
    plain_macs: int
    exit_accuracy: dict[str, float]
    """By early exit: the accuracy if every test image exited there."""
    curve_macs: np.ndarray
    """MACs of the outcomes of a shared threshold, rising."""
    curve_accuracy: np.ndarray
    curve_val: np.ndarray | None
    """(2, P): MACs and accuracy on val of the same thresholds, in the same order; None if the
    report does not say."""
    val: tuple[float, float] | None
    """MACs and accuracy of the chosen policy on val; None if there are several cuts, and if the
    report does not say."""
    speedups: dict[int, float]
    """Over the plain network, by batch size."""
    seconds: dict[int, Seconds]
    """By batch size."""
    public: tuple[PublicNetwork, ...]
    """The networks that it was compared with."""
    precision: str
    device: str
    versions: dict[str, str]
    """Of the packages that it was made with."""
    runtime: str = "torch"
    """What ran the network."""
    unfinished: str | None = None
    """How far the run was trained; None: to its end."""
    left_out: int = 0
    """Images of val and test that could not be read."""
    weights: str = ""
    """Hash of the weights, and which they are."""
    rounded_to: str | None = None
    """What the weights were rounded to."""
    outdated: bool
    """Whether the run was trained further since then (`early_exit.trained.trained_since`)."""

    @property
    def cautions(self) -> list[str]:
        """Why its numbers may not be those of the trained run, in words."""
        found = []
        if self.unfinished:
            found.append(f"not finished: {self.unfinished}")
        if self.outdated:
            found.append("outdated: the run was trained further since then; evaluate it again")
        if self.left_out:
            found.append(f"without {self.left_out} unreadable or missing files of val and test")
        return found

    def accuracy_of_exit(self, index: int) -> float | None:
        """Accuracy if every test image exited at one early exit; None if there is no such exit."""
        accuracies = list(self.exit_accuracy.values())
        return accuracies[index] if index < len(accuracies) else None


def find_reports(path: Path, names: Sequence[str]) -> list[Path]:
    """The reports at `path`: a report, an evaluation's directory, or a run directory.

    names: the evaluations of a run directory to use; default: all. Raises UserError if there is no
    report.
    """
    return [_with_run(report) for report in _reports_at(path, names)]


def _with_run(report: Path) -> Path:
    """The path, absolute if it is too short to contain the run: RUN/eval/NAME/report.json."""
    return report if len(report.parts) > 3 else Path(os.path.abspath(report))


def _reports_at(path: Path, names: Sequence[str]) -> list[Path]:
    """See `find_reports`."""
    if path.is_file():
        return [path]
    refuse_deployed(path)
    if (parent := Path(os.path.abspath(path)).parent).name == "eval":
        restore_all(parent)
    if (path / "report.json").is_file():
        return [path / "report.json"]
    if not path.is_dir():
        raise UserError(f"there is no run, evaluation or report at {path}")
    stored = evaluations(path, "report.json")
    if not stored:
        if any(path.glob("*/eval/*/report.json")):
            raise UserError(f"{path} is a directory of runs; name the runs, as in {path}/*")
        raise UserError(f"{path} has no evaluation yet; make one: {evaluation_command(path)}")
    wanted = [name for name in names if name in stored] if names else list(stored)
    if not wanted:
        raise UserError(
            f"{path} has no evaluation {' or '.join(names)}; it has {', '.join(stored)}"
        )
    return [stored[name] for name in wanted]


def evaluation_command(run: Path) -> str:
    """The command that evaluates a run: eval.py beside the trainer that made it. If the run does
    not say which trainer, the command has no directory."""
    commands = training_commands(source_run(run))
    trainer = Path(*commands[0][:1]) if commands else Path()
    script = trainer.with_name("eval.py") if trainer.suffix == ".py" else Path("eval.py")
    return shlex.join(["python", str(script), str(run)])


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation of a `report.json` of any format.

    Raises UserError if it cannot be read, is torn, or is not a complete report.
    """
    report = read_report(path)
    try:
        return _evaluation(path, report)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{path} is a report without {error}; evaluate the run again with eval.py"
        ) from None
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError):
        raise UserError(
            f"{path} is not a complete report; evaluate the run again with eval.py"
        ) from None


def _evaluation(path: Path, report: dict[str, Any]) -> Evaluation:
    run = path.parent.parent.parent if path.parent.parent.name == "eval" else path.parent
    settings = read_settings(source_run(run), report)
    choice, environment = report["choice"], report["environment"]
    cuts = report.get("cuts")
    macs, accuracy, val, order = _curve(report)
    return Evaluation(
        path=path,
        run=run,
        name=path.parent.name,
        dataset=str(report["run"]["dataset"]),
        seed=settings.pop("run.seed", None),
        settings=settings,
        goal=str(choice["goal"]),
        criterion=choice.get("criterion", Goal.criterion),
        calibrated=choice.get("calibrated", True),
        val_images=_val_images(report, settings),
        val_from=str(choice["val_from"]),
        cuts=int(cuts["count"]) if cuts else 0,
        given=bool(choice.get("thresholds_given") or choice.get("policy_given")),
        test_images=choice.get("test_images"),
        **_test_values(report),
        plain_macs=int(report["plain_macs"]),
        exit_accuracy={str(row["name"]): float(row["accuracy"]) for row in report["exits"][:-1]},
        curve_macs=macs,
        curve_accuracy=accuracy,
        curve_val=val,
        val=_val(report),
        speedups={
            int(timing["batch_size"]): timing["plain"]["total"] / timing["live"]["total"]
            for timing in report.get("timing", ())
        },
        seconds=read_seconds(report, order),
        public=_public(report),
        precision=environment.get("precision", "unknown"),
        device=environment.get("device", "unknown"),
        versions=environment.get("versions", {}),
        runtime=environment.get("runtime", "torch"),
        unfinished=report["run"].get("unfinished"),
        left_out=len(choice.get("left_out", ())),
        weights=str(report["run"].get("weights", "")),
        rounded_to=report["run"].get("rounded_to"),
        outdated=False,
    )


def _val_images(report: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, ...]:
    """Where val came from: the files that were not read count, and if it was held out from train,
    the cut."""
    choice = report["choice"]
    origin, left_out = str(choice["val_from"]), len(choice.get("left_out", ()))
    if origin != HELD_OUT:
        return origin, left_out
    data = report["run"].get("settings", {}).get("data", {})  # older reports have none
    cut = (data.get(name, settings.get(f"data.{name}")) for name in ("split_seed", "val_size"))
    return origin, left_out, *cut


def _test_values(report: dict[str, Any]) -> dict[str, Value]:
    """Accuracy and cost of the chosen policy and accuracy of the final exit, over all cuts if there
    are several; by the names of `Evaluation`'s fields."""
    if cuts := report.get("cuts"):
        return {
            name: Value(float(cuts[name]["mean"]), float(cuts[name]["std"]))
            for name in ("accuracy", "macs_share", "final_accuracy")
        }
    return {
        "accuracy": Value(float(report["test"]["accuracy"])),
        "macs_share": Value(float(report["test"]["macs_share"])),
        "final_accuracy": Value(float(report["final_accuracy"])),
    }


def _val(report: dict[str, Any]) -> tuple[float, float] | None:
    """MACs and accuracy of the chosen policy on val."""
    point = report.get("val")
    if not point or report.get("cuts"):
        return None
    return int(report["plain_macs"]) * float(point["macs_share"]), float(point["accuracy"])


def _curve(
    report: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """The report's curve by rising MACs on test: MACs and accuracy on test, (P,) each, the same on
    val, (2, P), and which point of the report each is, (P,)."""
    plain_macs, points = int(report["plain_macs"]), report["curve"]

    def values(split: str) -> np.ndarray:
        pairs = [(plain_macs * p[split]["macs_share"], p[split]["accuracy"]) for p in points]
        return np.array(pairs, dtype=float).T

    macs, accuracy = values("test")
    order = np.lexsort((accuracy, macs))
    val = values("val")[:, order] if all("val" in point for point in points) else None
    return macs[order], accuracy[order], val, order


def _public(report: dict[str, Any]) -> tuple[PublicNetwork, ...]:
    return tuple(
        PublicNetwork(
            str(row["name"]),
            float(row["accuracy"]),
            round(row["macs_share"] * int(report["plain_macs"])),
            str(row["source"]),
        )
        for row in report.get("static_networks", ())
    )
