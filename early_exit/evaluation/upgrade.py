"""Reading `report.json`, also of older formats."""

import json
from pathlib import Path
from typing import Any

from early_exit.choosing.outcome import ROUNDING
from early_exit.errors import UserError
from early_exit.evaluation.report import FORMAT
from early_exit.trained import unfinished_of


def read_report(path: Path) -> dict[str, Any]:
    """The values of a `report.json`, those of older formats upgraded.

    Raises UserError if it is missing, torn, not a report, or of a newer format.
    """
    try:
        values = json.loads(path.read_text("utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(
            f"{path} is incomplete or not JSON; evaluate the run again with eval.py"
        ) from None
    try:
        if values.get("format", 1) > FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, this program reads formats up to"
                f" {FORMAT}; update it"
            )
        report = upgraded(values)
        for name in ("run", "choice", "environment"):
            if not isinstance(report.get(name, {}), dict):
                raise TypeError(name)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a report; evaluate the run again with eval.py") from None
    return report


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a report of any format in the present one."""
    report = values if values.get("format", 1) == FORMAT else from_format_1(values)
    run, choice = report.get("run"), report.get("choice")
    if isinstance(run, dict) and "weights" in run:  # fields that format 2 has got since
        run.setdefault("unfinished", unfinished_of(str(run["weights"])))
        run.setdefault("rounded_to", None)
    if isinstance(choice, dict):
        choice.setdefault("left_out", [])
    return of_a_runtime(report)


TORCH = {"bfloat16": "torch-bf16", "float16": "torch-fp16"}
"""The runtime of a precision in eager torch; that of float32 is `torch`."""


def of_a_runtime(report: dict[str, Any]) -> dict[str, Any]:
    """A report with what format 2 has got since of runtimes. Before, there was torch alone."""
    report = dict(report)
    precision = str((report.get("environment") or {}).get("precision"))
    added: dict[str, dict[str, Any]] = {
        "environment": {"runtime": TORCH.get(precision, "torch")},
        "live": {"rounding": ROUNDING},
        "cuts": {"speedup": None, "lost": None},
    }
    for name, since in added.items():
        if isinstance(report.get(name), dict):
            report[name] = since | report[name]
    if "timing" in report:
        report = {"verdicts": [], "runtimes": [], **report}
    return report


OLD_TASKS = {"cifar10.trainer:DOOR": "cifar10", "imagenet.main:DOOR": "imagenet"}


def from_format_1(old: dict[str, Any]) -> dict[str, Any]:
    """A report of version 0.1, which was flat and used other names."""
    new = dict(old, format=FORMAT)

    def section(**names: str) -> dict[str, Any]:
        return {name: new.pop(key) for name, key in names.items() if key in new}

    def renamed(values: dict[str, Any], **names: str) -> dict[str, Any]:
        back = {key: name for name, key in names.items()}
        return {back.get(key, key): value for key, value in values.items()}

    task = new.pop("door", "")
    new["run"] = section(
        name="run",
        dataset="dataset",
        arch="arch",
        regime="regime",
        weights="weights",
        settings="settings",
    ) | {"task": OLD_TASKS.get(task, task)}
    new["choice"] = section(
        goal="chosen_by",
        criterion="criterion",
        calibrated="calibrated",
        thresholds_given="thresholds_given",
        policy_given="policy_given",
        val_from="val_from",
        val_images="val_images",
        test_images="test_images",
    )
    new["choice"].setdefault("policy_given", False)
    new["environment"] = section(
        device="device", precision="precision", versions="versions", command="command"
    )
    new["exits"] = [
        renamed(
            row,
            enabled="on",
            exited="taken",
            exited_accuracy="taken_accuracy",
            continuing_auroc="gain_auroc",
        )
        for row in old["exits"]
    ]
    new["classes"] = [renamed(row, exited="taken") for row in old.get("classes", ())]
    new["timing"] = [
        renamed(
            timing,
            ideal="promise",
            no_exit_taken="full",
            without_heads="trunk",
            fraction_of_ideal="kept",
            speedup_without_heads="trunk_speedup",
        )
        for timing in old.get("timing", ())
    ]
    new["static_networks"] = new.pop("statics", [])
    new["curve_seconds"] = [
        renamed(row, at_exit="alone", static_networks="statics") for row in new.pop("pace", ())
    ]
    if old.get("guarantee"):
        new["guarantee"] = renamed(
            old["guarantee"], unguaranteed="plain", unguaranteed_lost="plain_lost"
        )
    return new
