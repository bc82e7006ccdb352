"""Cheaper policies while the queue is long: what may be used, and when.

Every policy has one threshold for all early exits and was measured on val when the run was
evaluated; the enabled exits stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.policy import NEVER, Policy
from early_exit.manifest import Manifest

STEPS = 12  # from the chosen policy to the cheapest
HOLD = 5.0  # seconds of a short queue before one step back
SLACK = 1e-12  # for the rounding of sums


@dataclass(frozen=True)
class ValPoint:
    """What a policy gave on val."""

    accuracy: float
    macs_share: float
    """Of the plain network's multiply-adds."""
    exit_shares: tuple[float, ...] | None
    """Of the images that exit at each exit; None if it is not stored."""
    images: int | None
    """Of val; None if it is not stored."""


def val_point(manifest: Manifest, policy: Policy) -> ValPoint | None:
    """What the policy gave on val, as the model stores it.

    None if it does not: for temperatures other than the evaluation's, for thresholds that are
    neither the evaluation's nor in `val_curve`, and for a model that was exported before these were
    stored.
    """
    if list(policy.temperatures) != manifest.val.get("temperatures"):
        return None
    for row in manifest.val_curve:
        if policy.shared_threshold == _threshold(row["threshold"]):
            return _point(row, manifest)
    if list(policy.thresholds) == list(map(_threshold, manifest.val["thresholds"])):
        return _point(manifest.val, manifest)
    return None


def _point(row: dict[str, Any], manifest: Manifest) -> ValPoint:
    shares = row.get("exit_shares")
    return ValPoint(
        row["accuracy"],
        row["macs_share"],
        None if shares is None else tuple(shares),
        manifest.val.get("images"),
    )


def curve_policies(manifest: Manifest, policy: Policy, max_drop: float) -> list[Policy]:
    """The policy and up to `STEPS` cheaper ones, in order of falling cost on val: those of
    `val_curve` that lose at most `max_drop` accuracy (a fraction) against it on val.

    Cost is multiply-adds, and the steps are about equal in it. Raises UserError if the model does
    not store what the policy gave on val, and for a `max_drop` outside of 0 to 1.
    """
    if not 0 <= max_drop <= 1:
        raise UserError(f"--max-drop is {100 * max_drop:g} points; it must be in 0 to 100")
    own = val_point(manifest, policy)
    if own is None:
        raise UserError(
            "the model does not store what its policy gave on val, so no drop can be bounded; use"
            " the policy that was exported or a threshold of val_curve in model.json, or export"
            " the run again"
        )
    allowed = [
        row
        for row in manifest.val_curve
        if row["accuracy"] >= own.accuracy - max_drop - SLACK
        and row["macs_share"] < own.macs_share - SLACK
    ]
    if not allowed:
        return [policy]
    shares = np.array([row["macs_share"] for row in allowed])
    wanted = np.linspace(own.macs_share, shares.min(), STEPS + 1)[1:]
    nearest = dict.fromkeys(int(np.abs(shares - share).argmin()) for share in wanted)
    chosen = sorted(nearest, key=lambda index: -shares[index])
    return [policy, *(policy.with_threshold(allowed[index]["threshold"]) for index in chosen)]


def _threshold(stored: Any) -> float:
    """A threshold from JSON, which has no infinity."""
    return NEVER if stored is None else stored


class Adapter:
    """Which policy to use, by how long a new row is expected to wait.

    policies: rising in accuracy lost, the chosen one first, as `curve_policies` gives them; target:
    seconds of waiting, beyond which a cheaper policy is used; hold: seconds for which the wait must
    stay below half the target before the next more expensive policy is used.
    """

    def __init__(self, policies: Sequence[Policy], target: float, hold: float = HOLD) -> None:
        self.policies, self.target, self.hold = list(policies), target, hold
        self.index = 0
        """Of the policy in use."""
        self._cheaper_at = -math.inf
        """When the last step to a cheaper policy was made."""
        self._short_since: float | None = None
        """Since when the wait has been below half the target."""

    def step(self, expected_wait: float, now: float) -> Policy | None:
        """The policy to change to, one step from that in use; None: no change.

        expected_wait: seconds, at `now`; call this at regular intervals, shorter than `target`. A
        cheaper policy is for rows that arrive from then on, which run after those that wait
        already, so steps to cheaper ones are at least `target` seconds apart.
        """
        if expected_wait >= self.target / 2:
            self._short_since = None
            is_last = self.index == len(self.policies) - 1
            if expected_wait <= self.target or is_last or now - self._cheaper_at < self.target:
                return None
            self._cheaper_at = now
            self.index += 1
            return self.policies[self.index]
        if self._short_since is None:
            self._short_since = now
        if self.index == 0 or now - self._short_since < self.hold:
            return None
        self._short_since = now
        self.index -= 1
        return self.policies[self.index]
