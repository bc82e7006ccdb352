"""Who leaves where: one object decides for live inference and for stored logits alike."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from early_exit.criteria import get_criterion
from early_exit.disk import write_text
from early_exit.errors import UserError

NEVER = math.inf  # a threshold no score reaches


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A criterion, and per exit a temperature, per early exit a threshold and whether it is on.

    A row leaves early exit i when its score there is at least `thresholds[i]`; every row that
    reaches the final exit leaves there. An exit that is off is not computed and says nothing.
    """

    exit_names: tuple[str, ...]
    """N names, the last being the final exit."""
    thresholds: tuple[float, ...]
    """N - 1 scores."""
    criterion: str = "max_prob"
    """Name of the criterion (`early_exit.criteria`)."""
    temperatures: tuple[float, ...] = ()
    """N temperatures; the final exit's only says how sure it is. Absent: 1 everywhere."""
    enabled: tuple[bool, ...] = ()
    """N - 1 switches. Absent: all on."""
    guarantee: dict[str, Any] | None = None
    """What is guaranteed of it and on what ground (`early_exit.guarantees.Guarantee`), if anything;
    void with other thresholds, on other images and for another network."""

    def __post_init__(self) -> None:
        get_criterion(self.criterion)
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
            raise UserError("a threshold is not a number")
        if self.criterion == "patience" and sum(self.enabled) < 2:
            raise UserError(
                "patience counts agreements between early exits and needs two of them,"
                f" this network has {sum(self.enabled)}; choose another criterion or more exits"
            )

    @property
    def num_exits(self) -> int:
        """How many exits there are, the final classifier included."""
        return len(self.exit_names)

    def refuse_other_exits(self, names: Sequence[str], whose: str) -> None:
        """Raises UserError where the policy is not for the exits `names`, which are those of
        `whose`."""
        if self.exit_names != tuple(names):
            raise UserError(
                f"the policy is for exits {', '.join(self.exit_names)}, {whose} has"
                f" {', '.join(names)}; choose thresholds for these"
            )

    def shared(self, threshold: float) -> "Policy":
        """The same policy with one threshold for all early exits, and no guarantee; NEVER: nobody
        leaves early."""
        each = (threshold,) * (self.num_exits - 1)
        return dataclasses.replace(self, thresholds=each, guarantee=None)

    def all_on(self) -> "Policy":
        """The same policy with every exit computed, and no guarantee."""
        return dataclasses.replace(self, enabled=(), guarantee=None)

    def is_on(self, exit_index: int) -> bool:
        """Whether the head at `exit_index` is computed; the final one always is."""
        return exit_index == self.num_exits - 1 or self.enabled[exit_index]

    def score(
        self, exit_index: int, logits: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the criterion makes of one exit's logits (B, K) and the rows' state so far.

        Returns the answer (B, K), the score (B,) and the new state. Everything is float32, whatever
        the network ran in.
        """
        logits = logits.float() / self.temperatures[exit_index]
        answer, score, state = get_criterion(self.criterion)(logits, state)
        if answer.shape != logits.shape or score.shape != logits.shape[:1]:
            raise UserError(
                f"the criterion {self.criterion} made an answer {tuple(answer.shape)} and a score"
                f" {tuple(score.shape)} of logits {tuple(logits.shape)}; an answer (B, K) and a"
                " score (B,) are expected"
            )
        return answer, score, state

    def leaves(self, exit_index: int, score: Tensor) -> Tensor:
        """Which rows (B,) of early exit `exit_index` are sure enough to leave."""
        return score >= self.thresholds[exit_index]

    def save(self, path: Path | str) -> None:
        """Writes the policy as YAML."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        write_text(Path(path), yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, path: Path | str) -> "Policy":
        """Reads what `save` wrote; equal to it, thresholds to the last bit."""
        try:
            values = yaml.safe_load(Path(path).read_text())
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


def as_thresholds(values: Sequence[float], num_exits: int) -> tuple[float, ...]:
    """One threshold for all early exits, or one each, as `num_exits - 1` numbers."""
    if len(values) == 1:
        values = list(values) * (num_exits - 1)
    if len(values) != num_exits - 1:
        raise UserError(
            f"got {len(values)} thresholds for {num_exits - 1} early exits; give one, or one each"
        )
    return tuple(float(value) for value in values)
