"""The phases of a regime."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from early_exit import config as configs
from early_exit.config import Config, OptimConfig
from early_exit.errors import UserError
from early_exit.model.losses import resolve_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimiser of its own."""

    name: str
    """plain, backbone, joint or heads."""
    optim: OptimConfig
    weights: tuple[float, ...]
    """Loss weight of each exit that is computed."""

    @property
    def backbone_only(self) -> bool:
        """Whether only the plain network is computed."""
        return self.name in ("plain", "backbone")

    @property
    def backbone_frozen(self) -> bool:
        """Whether the backbone's weights and statistics stay fixed."""
        return self.name == "heads"

    @property
    def may_leave_unused(self) -> bool:
        """Whether a parameter that requires a gradient when the phase starts may get none in a
        step.

        An exit of weight 0 gives none, nor does a stem that is no longer trained. A frozen backbone
        has no parameters that require one, so neither its stem nor its final exit counts.
        """
        if self.backbone_frozen:
            return not all(self.weights[:-1])
        return 0 < self.optim.stem_epochs < self.optim.epochs or not all(self.weights)


def plan_phases(config: Config, num_exits: int) -> list[Phase]:
    """The phases of a regime.

    `joint` has one; the others train the backbone first unless it is loaded from a checkpoint. On a
    frozen backbone the heads are independent of each other, so all stages of CDL are trained at
    once. Raises UserError for settings that contradict each other.
    """
    given, optim = config.model.backbone is not None, config.optim
    if given and (num_exits == 1 or config.run.regime == "joint"):
        raise UserError(
            "--backbone loads trained weights, but this run would train the backbone from"
            " scratch; add --regime mixed or --regime frozen and exits, or -e to score it"
        )
    if num_exits == 1:
        return [Phase("plain", optim, (1.0,))]
    weights = resolve_weights(config.loss.weights, num_exits)
    if config.run.regime == "joint":
        return [Phase("joint", optim, weights)]
    first = dataclasses.replace(
        optim,
        epochs=config.backbone_phase.epochs or optim.epochs,
        lr=config.backbone_phase.lr or optim.lr,
    )
    phases = [] if given else [Phase("backbone", first, (1.0,))]
    if config.run.regime == "mixed":
        return [*phases, Phase("joint", optim, weights)]
    if config.run.regime == "cdl" and set(config.model.head) != {"linear"}:
        raise UserError(
            f"--regime cdl has linear heads, got --head {' '.join(config.model.head)}; remove"
            " --head, or use --regime frozen"
        )
    if not any(weights[:-1]):
        raise UserError(
            f"--regime {config.run.regime} trains only the heads, and all their loss weights are 0"
        )
    return [*phases, Phase("heads", optim, (*weights[:-1], 0.0))]


def unfinished(config: Config, num_exits: int, position: Mapping[str, int]) -> str | None:
    """How far a run is trained whose checkpoint has this position; None if it is finished."""
    phases = plan_phases(config, num_exits)
    if position["phase"] >= len(phases):
        return None
    phase = phases[position["phase"]]
    return f"epoch {position['epoch']} of {phase.optim.epochs}, phase {phase.name}"


def warn_if_unfinished(state: Mapping[str, Any], cls: type[Config], name: object) -> None:
    """Logs a warning if weights are those of a run that is not finished.

    state: of its checkpoint; weights of another origin lack what is needed. cls: of its settings;
    those of another task are not looked at. name: whose weights they are.
    """
    if not {"config", "position", "exit_names"} <= state.keys():
        return
    with suppress(UserError):
        config = configs.build(cls, state["config"])
        if trained := unfinished(config, len(state["exit_names"]), state["position"]):
            log.warning("%s is not finished: its weights are those of %s", name, trained)
