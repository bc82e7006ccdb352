"""The settings of an evaluated run, by which a comparison groups and names runs."""

from pathlib import Path
from typing import Any

from early_exit import config as configs
from early_exit.config import Config
from early_exit.errors import UserError
from early_exit.model.losses import resolve_weights

# Settings that change the speed or the output of a training, not what is learned.
IGNORED_SETTINGS = {
    "data.root",
    "data.workers",
    "data.bad_files",
    "data.check_files",
    "run.device",
    "run.threads",
    "run.compile",
    "run.channels_last",
    "run.deterministic",
    "run.save_every",
    "run.print_freq",
    "run.tensorboard",
}


def read_settings(run: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The run's settings by dotted name. Those that an older run does not have are set to their
    defaults, and settings that mean the same are written in the same way."""
    exits = [row["name"] for row in report["exits"][:-1]]
    path = run / "config.yaml"
    if not path.is_file():
        return {
            "model.arch": report["run"]["arch"],
            "run.regime": report["run"]["regime"],
            "model.exits": exits,
        }
    nested = configs.merge(configs.to_dict(Config()), configs.load_preset(path))
    if not all(isinstance(section, dict) for section in nested.values()):
        raise UserError(f"{path} is not the configuration of a run")
    settings = {
        f"{section}.{name}": value
        for section, values in nested.items()
        for name, value in values.items()
        if f"{section}.{name}" not in IGNORED_SETTINGS
    }
    heads = settings["model.head"]
    heads = [heads] if isinstance(heads, str) else heads
    weights = settings["loss.weights"] if exits else None  # no effect on a plain network
    return settings | {
        "model.exits": exits,
        "model.head": heads[:1] if len(set(heads)) == 1 else heads,
        "loss.weights": list(resolve_weights(weights, len(exits) + 1)),
    }
