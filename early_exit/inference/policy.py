"""The policy: one object decides which rows exit, in live inference and on stored logits alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from early_exit.errors import UserError
from early_exit.inference.criteria import apply_criterion, get_traits
from early_exit.system.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

NEVER = math.inf  # a threshold no score reaches


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
    """N temperatures; that of the final exit changes only the reported confidence. Default: 1."""
    enabled: tuple[bool, ...] = ()
    """N - 1 flags. Default: all enabled."""
    guarantee: dict[str, Any] | None = None
    """What is guaranteed of the policy and why (`early_exit.choosing.guarantees.Guarantee`), if
    anything. It holds for these thresholds, this network and images of this kind only."""

    def __post_init__(self) -> None:
        traits = get_traits(self.criterion)
        object.__setattr__(self, "exit_names", tuple(self.exit_names))
        num_exits = len(self.exit_names)
        for name, kind, default, length in (
            ("thresholds", float, None, num_exits - 1),
            ("temperatures", float, 1.0, num_exits),
            ("enabled", bool, True, num_exits - 1),
        ):
            values = tuple(map(kind, getattr(self, name)))
            if not values and default is not None:
                values = (default,) * length
            if len(values) != length:
                raise UserError(
                    f"a policy of {num_exits} exits needs {length} {name}, got {len(values)}"
                )
            object.__setattr__(self, name, values)
        if not all(t > 0 and math.isfinite(t) for t in self.temperatures):
            raise UserError(f"temperatures must be positive, got {self.temperatures}")
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise UserError(f"each threshold must be a number, got {self.thresholds}")
        if sum(self.enabled) < traits.min_early_exits > 1:
            raise UserError(
                f"the criterion {self.criterion} needs {traits.min_early_exits} early exits, got"
                f" {sum(self.enabled)}; choose another criterion or more exits"
            )

    @property
    def num_exits(self) -> int:
        """The number of exits, the final classifier included."""
        return len(self.exit_names)

    def check_exits(self, names: Sequence[str], owner: str) -> None:
        """Raises UserError if the policy is for other exits than `names`, those of `owner`."""
        if self.exit_names != tuple(names):
            raise UserError(
                f"the policy is for exits {', '.join(self.exit_names)}, {owner} has"
                f" {', '.join(names)}; choose thresholds for these"
            )

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
        try:
            values = yaml.safe_load(Path(path).read_text("utf-8-sig"))
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**values)
        except FileNotFoundError:
            raise UserError(f"there is no policy at {path}; eval.py writes one") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except UserError:
            raise
        except (yaml.YAMLError, TypeError, AttributeError, ValueError):
            raise UserError(f"{path} is not a policy that eval.py wrote") from None
