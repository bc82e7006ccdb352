"""The cost of each exit: multiply-adds (MACs) per image, and parameters. Needs no torch.

`early_exit.model.cost` counts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """MACs per image: multiply-adds of convolutions, linear layers and other matrix products.

    Normalisation, activations, pooling, additions, softmax and the exit decision are not counted.
    """

    exit_names: tuple[str, ...]
    stage_macs: tuple[int, ...]
    """N, of each stage without its early head; the last includes the backbone's classifier."""
    head_macs: tuple[int, ...]
    """N, of each early head; 0 for the final exit."""
    backbone_params: int
    head_params: tuple[int, ...]
    """N; 0 for the final exit."""

    @property
    def plain_macs(self) -> int:
        """MACs of the plain network; every share is relative to them."""
        return sum(self.stage_macs)

    def cumulative(self, enabled: Sequence[bool] = ()) -> tuple[int, ...]:
        """MACs (N,) of an image that exits at each exit: of its stages and enabled heads.

        enabled: N - 1 flags. Default: all enabled.
        """
        costs = cumulative_cost(self.stage_macs, self.head_macs, enabled)
        return tuple(int(macs) for macs in costs)

    def shares(self, enabled: Sequence[bool] = ()) -> tuple[float, ...]:
        """`cumulative` as shares of the plain network's MACs; the last is over 1 if a head is
        enabled."""
        return tuple(macs / self.plain_macs for macs in self.cumulative(enabled))

    def mean_macs(self, enabled: Sequence[bool], shares: np.ndarray) -> np.ndarray:
        """Mean MACs per image (P,) of P policies.

        shares: (P, N), the share of images that take each exit.
        """
        return shares @ np.asarray(self.cumulative(enabled), np.float64)


def cumulative_cost(
    stages: Sequence[float], heads: Sequence[float], enabled: Sequence[bool]
) -> tuple[float, ...]:
    """The cost (N,) of an image that exits at each exit.

    stages, heads: N costs each, in any unit. enabled: N - 1 flags; empty: all enabled.
    """
    enabled = [*(enabled or [True] * (len(stages) - 1)), True]
    total: float = 0
    totals = []
    for stage, head, is_enabled in zip(stages, heads, enabled, strict=True):
        total += stage + (head if is_enabled else 0)
        totals.append(total)
    return tuple(totals)
