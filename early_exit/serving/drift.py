"""Whether traffic looks like val: how far the shares of images at each exit are from val's.

What was chosen on val (thresholds, `--max-drop`, a guarantee) holds for images of val's
distribution. Labels of live images are not known, but the exits they take are.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from early_exit.inference.policy import Policy

WINDOW = 1000
"""Images that are compared with val."""
FALSE_ALARM = 1e-3
"""The share of windows of images like val's that are beyond `distance_by_chance`."""
DRAWS = 20_000  # 20 of them are beyond it


def distance(counts: Sequence[int] | np.ndarray, val_shares: Sequence[float]) -> float:
    """The total variation distance between the shares of images at each exit and val's: the share
    that would have to take another exit. In [0, 1].

    counts: of images at each exit, at least one in total.
    """
    shares = np.asarray(counts) / np.sum(counts)
    return float(np.abs(shares - val_shares).sum() / 2)


@functools.lru_cache(maxsize=64)
def distance_by_chance(val_shares: tuple[float, ...], val_images: int, rows: int) -> float:
    """The distance that a share `FALSE_ALARM` of windows exceed if live images are independent
    draws from val's distribution.

    By simulation, a parametric bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 6): val and the window are both drawn, from val's shares after half an image was
    added at each exit (Jeffreys' prior), because an exit that few images take may have none on val.

    val_shares: of the exits that can be taken; rows: images in the window.
    """
    shares = np.array(val_shares) * val_images + 0.5
    shares /= shares.sum()
    rng = np.random.default_rng(0)
    val, live = (rng.multinomial(size, shares, DRAWS) / size for size in (val_images, rows))
    return float(np.quantile(np.abs(live - val).sum(axis=1) / 2, 1 - FALSE_ALARM))


class Window:
    """The exits of the last images that were answered under one policy."""

    def __init__(self, size: int = WINDOW) -> None:
        self.policy: Policy | None = None
        self._exits: deque[int] = deque(maxlen=size)

    def add(self, policy: Policy, exits: Iterable[int]) -> None:
        """Adds images that were answered under a policy. Begins anew if it is another one than
        before."""
        if policy != self.policy:
            self.policy = policy
            self._exits.clear()
        self._exits.extend(exits)

    def counts(self, policy: Policy) -> np.ndarray | None:
        """The images (N,) at each exit; None until the window is full of images under `policy`."""
        if policy != self.policy or len(self._exits) < (self._exits.maxlen or 0):
            return None
        return np.bincount(self._exits, minlength=policy.num_exits)
