"""Made-up runs with a report, as far as a comparison reads them."""

import json
from pathlib import Path

import yaml

from early_exit.config import Config, to_dict
from early_exit.evaluation.groups import Group, group_runs
from early_exit.evaluation.labels import labelled
from early_exit.evaluation.stored import find_reports, read_evaluation

PLAIN_MACS = 20_000_000


def made_report(
    accuracy: float = 0.9,
    share: float = 0.5,
    final: float = 0.95,
    exits: tuple[float, ...] = (0.6,),
    curve: list[tuple[float, float]] | None = None,
    val_curve: list[tuple[float, float]] | None = None,
    names: tuple[str, ...] = tuple("abcdef"),
    **changes: object,
) -> dict:
    """A report.

    exits: the accuracy of each early exit; names: their names; curve: points (share of MACs,
    accuracy) on test; val_curve: the same on val, by default equal; changes: other values, of
    whatever section.
    """
    names = (*names[: len(exits)], "final")
    curve = curve or [(1.0, final), (0.2, exits[0] if exits else final)]
    values = {
        "format": 2,
        "run": {"name": "run", "dataset": "shapes", "arch": "resnet20", "regime": "joint"},
        "choice": {
            "goal": "budget 50 % of MACs",
            "criterion": "max_prob",
            "calibrated": True,
            "val_from": "held out from train",
            "thresholds_given": False,
            "policy_given": False,
            "test_images": 10_000,
        },
        "environment": {
            "device": "a CPU",
            "precision": "float32",
            "runtime": "torch",
            "versions": {},
        },
        "plain_macs": PLAIN_MACS,
        "test": point(accuracy, share),
        "final_accuracy": final,
        "cuts": None,
        "timing": [],
        "exits": [
            {"name": name, "accuracy": value}
            for name, value in zip(names, [*exits, final], strict=True)
        ],
        "curve": [
            {"val": point(*on_val[::-1]), "test": point(*on_test[::-1])}
            for on_val, on_test in zip(val_curve or curve, curve, strict=True)
        ],
    }
    for name, value in changes.items():
        sections = (values["run"], values["choice"], values["environment"])
        next((section for section in sections if name in section), values)[name] = value
    return values


def point(accuracy: float, share: float) -> dict:
    """An outcome on a sample."""
    return {"accuracy": accuracy, "macs_share": share}


def timing(size: int, plain: float, live: float, **networks: float) -> dict:
    """Seconds of the plain network, with exits and of other networks, for one batch of a size."""
    return {
        "batch_size": size,
        "images": size,
        "plain": {"total": plain},
        "live": {"total": live},
        "networks": {name: {"total": total} for name, total in networks.items()},
    }


def public(name: str, accuracy: float, macs: float) -> dict:
    """A network without exits in a report. macs: in millions."""
    share = 1e6 * macs / PLAIN_MACS
    return {"name": name, "accuracy": accuracy, "macs_share": share, "source": "its authors"}


def write_run(
    directory: Path,
    seed: int = 0,
    evaluation: str = "budget-50",
    settings: dict | None = None,
    **values: object,
) -> Path:
    """Writes a run with one evaluation. settings: nested in sections; values: of its report."""
    config = to_dict(Config())
    for section, changed in (settings or {}).items():
        config[section] |= changed
    config["run"]["seed"] = seed
    written = directory / "eval" / evaluation
    written.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (written / "report.json").write_text(json.dumps(made_report(**values)))
    return directory


def rows(
    *runs: Path, each: bool = False, labels: tuple[str, ...] | list[str] | None = None
) -> list[Group]:
    """The labelled groups of all evaluations of some runs."""
    paths = [path for run in runs for path in find_reports(run, ())]
    return labelled(group_runs([read_evaluation(path) for path in paths], each), labels)


def seeds(run, **values) -> list[Path]:
    """Three seeds, of accuracy 90, 92 and 94 % at 50, 60 and 70 % of the MACs.

    run: the fixture `made_run`.
    """
    found = zip((0.90, 0.92, 0.94), (0.5, 0.6, 0.7), strict=True)
    return [
        run(f"net-{seed}", seed, accuracy=accuracy, share=share, **values)
        for seed, (accuracy, share) in enumerate(found)
    ]
