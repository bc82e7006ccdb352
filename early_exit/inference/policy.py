"""The policy: one object decides which rows exit, in live inference and on stored logits alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from early_exit.errors import UserError
from early_exit.inference.criteria import apply_criterion, check_threshold, get_traits
from early_exit.system.files import write_text
from early_exit.system.yaml_files import read_yaml

if TYPE_CHECKING:
    from torch import Tensor

NEVER = math.inf  # a threshold no score reaches
LEAST_TEMPERATURE = 1e-6  # logits divided by less may overflow
SLACK = 1e-5  # of the lowest score, for the rounding of float32


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A criterion; per exit a temperature; per early exit a threshold and whether it is enabled.

    A row exits at early exit i if its score there is at least `thresholds[i]`; every row that
    reaches the final exit exits there. The head of a disabled exit is not computed.
    """

    exit_names: tuple[str, ...]
    """N names, the last being the final exit."""
    thresholds: tuple[float, ...]
    """N - 1 scores."""
    criterion: str = "max_prob"
    """Name of the criterion (`early_exit.inference.criteria`)."""
    temperatures: tuple[float, ...] = ()
    """N temperatures; that of the final exit changes only the reported confidence, unless the
    answer is made of several exits. Default: 1."""
    enabled: tuple[bool, ...] = ()
    """N - 1 flags. Default: all enabled."""
    guarantee: dict[str, Any] | None = None
    """What is guaranteed of the policy and why (`early_exit.choosing.guarantees.Guarantee`), if
    anything. It holds for these thresholds, this network and images of this kind only."""

    def __post_init__(self) -> None:
        traits = get_traits(self.criterion)
        object.__setattr__(self, "exit_names", _values("exit_names", self.exit_names, str))
        num_exits = len(self.exit_names)
        for name, convert, default, length in (
            ("thresholds", _number, None, num_exits - 1),
            ("temperatures", _number, 1.0, num_exits),
            ("enabled", _flag, True, num_exits - 1),
        ):
            values = _values(name, getattr(self, name), convert)
            if not values and default is not None:
                values = (default,) * length
            if len(values) != length:
                raise UserError(
                    f"a policy of {num_exits} exits needs {length} {name}, got {len(values)}"
                )
            object.__setattr__(self, name, values)
        if not all(LEAST_TEMPERATURE <= t < math.inf for t in self.temperatures):
            raise UserError(
                f"temperatures must be at least {LEAST_TEMPERATURE:g}, got {self.temperatures}"
            )
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise UserError(f"each threshold must be a number, got {self.thresholds}")
        if not isinstance(self.guarantee, Mapping | None):
            raise UserError(f"guarantee must be a mapping, got {self.guarantee!r}")
        if sum(self.enabled) < traits.min_early_exits > 1:
            raise UserError(
                f"the criterion {self.criterion} needs {traits.min_early_exits} early exits, got"
                f" {sum(self.enabled)}; choose another criterion or more exits"
            )

    @property
    def num_exits(self) -> int:
        """The number of exits, the final classifier included."""
        return len(self.exit_names)

    @property
    def shared_threshold(self) -> float | None:
        """The threshold of all enabled early exits; None if they differ or there are none."""
        thresholds = {
            threshold
            for threshold, enabled in zip(self.thresholds, self.enabled, strict=True)
            if enabled
        }
        return thresholds.pop() if len(thresholds) == 1 else None

    def check_exits(self, names: Sequence[str], owner: str) -> None:
        """Raises UserError if the policy is for other exits than `names`, those of `owner`."""
        if self.exit_names != tuple(names):
            raise UserError(
                f"the policy is for exits {', '.join(self.exit_names)}, {owner} has"
                f" {', '.join(names)}; choose thresholds for these"
            )

    def check_thresholds(self, num_classes: int) -> None:
        """Raises UserError for an enabled exit with a threshold that no score, or every score,
        reaches. One that equals the lowest score may have been chosen on val and is accepted."""
        for name, threshold, enabled in zip(
            self.exit_names, self.thresholds, self.enabled, strict=False
        ):
            if enabled:
                owner = f"in the policy, the threshold of {name},"
                exits = sum(self.enabled)
                check_threshold(self.criterion, threshold, owner, num_classes, exits, SLACK)

    def with_threshold(self, threshold: float) -> Policy:
        """The same policy with one threshold for all early exits, and no guarantee."""
        thresholds = (threshold,) * (self.num_exits - 1)
        return dataclasses.replace(self, thresholds=thresholds, guarantee=None)

    def with_all_enabled(self) -> Policy:
        """The same policy with every exit enabled, and no guarantee."""
        return dataclasses.replace(self, enabled=(), guarantee=None)

    def is_enabled(self, exit_index: int) -> bool:
        """Whether the exit at `exit_index` is computed; the final one always is."""
        return exit_index == self.num_exits - 1 or self.enabled[exit_index]

    def score(
        self, exit_index: int, logits: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Answer (B, K), score (B,) and new state for the logits (B, K) of one exit."""
        return apply_criterion(self.criterion, logits, self.temperatures[exit_index], state)

    def exits(self, exit_index: int, score: Any) -> Any:
        """Which rows (B,) exit at early exit `exit_index`; score: (B,), torch or numpy."""
        return score >= self.thresholds[exit_index]

    def save(self, path: Path | str) -> None:
        """Writes the policy as YAML."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        write_text(Path(path), yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, path: Path | str) -> Policy:
        """Reads what `save` wrote; equal to it, thresholds to the last bit."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"there is no policy at {path}; eval.py writes one")
        values = read_yaml(path, "a policy")
        fields = {item.name: item for item in dataclasses.fields(cls)}
        unknown = [repr(name) for name in values if name not in fields]
        missing = [name for name in ("exit_names", "thresholds") if name not in values]
        if unknown or missing:
            words = [*(f"an unknown entry {name}" for name in unknown)]
            words += [f"no {name}" for name in missing]
            raise UserError(
                f"{path} is not a policy: it has {' and '.join(words)}; a policy has"
                f" {', '.join(fields)}"
            )
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{path} is not a policy: {error}") from None


def _values(name: str, values: Any, convert: Callable[[Any], Any]) -> tuple:
    """A field's values, converted. Raises UserError, naming the field and the value."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{name} must be a list, got {values!r}")
    converted = []
    for value in values:
        try:
            converted.append(convert(value))
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{name} has {value!r}; expected {KINDS[name]}") from None
    return tuple(converted)


KINDS = {
    "exit_names": "names",
    "thresholds": "numbers",
    "temperatures": "numbers",
    "enabled": "true or false",
}


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    """A bool; of torch or numpy too, but no text: bool("false") is True."""
    if isinstance(value, str) or value not in (0, 1):
        raise TypeError
    return bool(value)
