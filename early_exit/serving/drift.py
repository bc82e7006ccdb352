"""Whether traffic looks like val: how far the shares of images at each exit are from val's.

What was chosen on val (thresholds, `--max-drop`, a guarantee) holds for images of val's
distribution. Labels of live images are not known, but the exits they take are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from early_exit.inference.policy import Policy

WINDOW = 1000
"""Images that are compared with val. With a large val and one early exit, a distance of 0.075 is
then beyond chance; ten times as many would find 0.024, later."""
FALSE_ALARM = 1e-3
"""The probability, at most, that a window of images like val's is beyond `distance_by_chance`."""


def distance(counts: Sequence[int] | np.ndarray, val_shares: Sequence[float]) -> float:
    """The total variation distance between the shares of images at each exit and val's: the share
    that would have to take another exit. In [0, 1].

    counts: of images at each exit, at least one in total.
    """
    shares = np.asarray(counts) / np.sum(counts)
    return float(np.abs(shares - val_shares).sum() / 2)


def distance_by_chance(num_exits: int, rows: int, val_images: int | None) -> float:
    """A distance that is exceeded with a probability of at most `FALSE_ALARM` if the images are
    independent draws from val's distribution. It holds for any shares and any number of images.

    The expected distance is at most sqrt((num_exits - 1) (1/rows + 1/val_images)) / 2, by the
    variances of the shares and the inequality of Cauchy and Schwarz. One image of either sample
    changes the distance by at most 1/rows or 1/val_images, so it exceeds its expectation by more
    than sqrt(ln(1/p) (1/rows + 1/val_images) / 2) with probability p at most (McDiarmid, On the
    method of bounded differences, 1989). That thresholds were chosen on the same val images is not
    counted.

    num_exits: enabled ones and the final one; val_images: None if their number is not known, and
    val's shares count as exact.
    """
    variance = 1 / rows + (1 / val_images if val_images else 0.0)
    return (math.sqrt(num_exits - 1) / 2 + math.sqrt(-math.log(FALSE_ALARM) / 2)) * math.sqrt(
        variance
    )


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
