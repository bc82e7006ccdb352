"""Points of the literature for a comparison, from a YAML file that the user names.

    points:
      - label: MSDNet
        dataset: cifar10
        accuracy_percent: 92.9
        macs_millions: 22
        source: "arXiv:1703.09844, read off a figure"

Each point has a label, a data set as reports name it, an accuracy, its source, and `macs_millions`,
`milliseconds` (per image), or both. Nobody here measured them: the authors train and count by other
rules, and their milliseconds, which are those of another machine, are in the table alone.
"""

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.errors import UserError
from early_exit.system.text import in_a_line
from early_exit.system.yaml_files import read_yaml

TEXTS = ("label", "dataset", "source")
NUMBERS = ("accuracy_percent", "macs_millions", "milliseconds")


@dataclass(frozen=True)
class LiteraturePoint:
    """One point of the literature."""

    label: str
    accuracy: float
    source: str
    macs: float | None
    """Multiply-adds per image."""
    seconds: float | None
    """Per image, on the authors' machine."""


def read_points(path: Path, dataset: str) -> list[LiteraturePoint]:
    """The points of a file on one data set, in their order.

    Raises UserError if the file cannot be read, for a point with an unknown key, without a key that
    it needs, or with a value of another kind, and if no point is on the data set.
    """
    values = read_yaml(path, "a file of points")
    points = values.get("points")
    if set(values) != {"points"} or not isinstance(points, list) or not points:
        raise UserError(f"{path} must have one key, points, with a list of points")
    found = [_point(point, f"{path}, point {n}") for n, point in enumerate(points, 1)]
    on_dataset = [point for name, point in found if name == dataset]
    if not on_dataset:
        names = ", ".join(sorted({name for name, _ in found}))
        raise UserError(
            f"{path} has no point on {in_a_line(dataset)}, the data set of the runs; it has {names}"
        )
    return on_dataset


def _point(values: Any, where: str) -> tuple[str, LiteraturePoint]:
    """The data set and the point."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a mapping, got {values!r}")
    known = (*TEXTS, *NUMBERS)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"choose of {', '.join(known)}"
            raise UserError(f"{where} has an unknown key {str(key)!r}; {hint}")
    texts = {key: _text(values, key, where) for key in TEXTS}
    numbers = {key: _number(values[key], key, where) for key in NUMBERS if key in values}
    accuracy = numbers.get("accuracy_percent")
    if accuracy is None:
        raise UserError(f"{where} has no accuracy_percent; add it")
    if accuracy > 100:
        raise UserError(f"{where}: accuracy_percent is {accuracy:g}; at most 100 is possible")
    macs, milliseconds = numbers.get("macs_millions"), numbers.get("milliseconds")
    if macs is None and milliseconds is None:
        raise UserError(f"{where} has no cost; add macs_millions or milliseconds")
    return texts["dataset"], LiteraturePoint(
        label=texts["label"],
        accuracy=accuracy / 100,
        source=texts["source"],
        macs=None if macs is None else 1e6 * macs,
        seconds=None if milliseconds is None else 1e-3 * milliseconds,
    )


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    if key not in values:
        raise UserError(f"{where} has no {key}; add it")
    text = values[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {key} must be text, got {text!r}")
    return " ".join(text.split())


def _number(value: Any, key: str, where: str) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 < value < sys.float_info.max:  # NaN and huge whole numbers too
        raise UserError(f"{where}: {key} must be a number above 0, got {value!r}")
    return float(value)
