"""Cheaper policies while the queue is long: what may be used, and when.

Every policy has one threshold for all early exits and was measured on val when the run was
evaluated; the enabled exits stay as they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.policy import NEVER, Policy
from early_exit.manifest import Manifest
from early_exit.serving.load import LoadState

STEPS = 12  # from the chosen policy to the cheapest
HOLD = 5.0  # seconds for which a policy would have been enough before it is used again
SHORT = 0.5  # of the target: a shorter queue does not lead to a cheaper policy
WINDOW = 2.0  # targets over which the rate is taken (see `Adapter`)
PRIOR = 50  # rows: what val's exit shares count, compared with those of recent runs
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


def segment_shares(manifest: Manifest, policies: Sequence[Policy]) -> np.ndarray:
    """The shares of val (policies, segments) that exit at the end of each segment.

    Raises UserError if the model does not store them.
    """
    shares = []
    for policy in policies:
        val = val_point(manifest, policy)
        if val is None or val.exit_shares is None:
            raise UserError(
                f"the model does not store the share of val that exits at each exit with thresholds"
                f" {policy.thresholds}, by which --adapt forecasts what a policy costs; it was"
                " exported by an earlier version: evaluate the run and export it again"
            )
        shares.append([val.exit_shares[segment.last] for segment in manifest.segments])
    return np.array(shares)


def _threshold(stored: Any) -> float:
    """A threshold from JSON, which has no infinity."""
    return NEVER if stored is None else stored


class Adapter:
    """Which policy to use, by the rows that wait and the rate at which rows arrive.

    A policy is enough if the queue is at most half of the target, or will be one target from now at
    the rate of the last two. The other half is for chance, which is larger the fewer rows are
    answered in one target. A burst is in the queue and, by half, in the rate. If a policy can
    answer it and what arrives beside it (r) within the target, B <= (1 - r) T, nothing changes:
    B + (B / 2 + r T) - T <= T / 2. The rate alone decides nothing: a server that is nearly idle
    runs small batches, of which a row takes longer.

    policies: the chosen one first, then ever cheaper ones, as `curve_policies` gives them; shares:
    (policies, segments), those of val that exit at the end of each segment; target: the longest
    wait that is accepted, in seconds; hold: seconds for which a more accurate policy must have been
    enough before it is used again.
    """

    def __init__(
        self, policies: Sequence[Policy], shares: np.ndarray, target: float, hold: float = HOLD
    ) -> None:
        self.policies, self.target, self.hold = list(policies), target, hold
        self.index = 0
        """Of the policy in use."""
        self.wait = self.rate = 0.0
        """At the last step: the seconds that the rows that wait will take, and the rows that arrive
        in a second."""
        self._index_of = {policy.thresholds: index for index, policy in enumerate(policies)}
        reached = np.cumsum(shares[:, ::-1], axis=1)[:, ::-1]
        self._val_remaining = np.divide(
            reached[:, 1:],
            reached[:, :-1],
            out=np.zeros_like(reached[:, 1:]),
            where=reached[:, :-1] > 0,
        )
        """(policies, segments - 1): of the rows that reach a segment, those that reach the next."""
        self._arrivals: deque[tuple[float, int]] = deque()
        """Times, and rows that had arrived; the first is a window ago."""
        self._queues = np.zeros(len(policies))
        """Seconds: those of more accurate policies, had they been used, and the present queue."""
        self._not_enough_at = np.full(len(policies), -np.inf)
        """When each policy was last not enough; it never rises from a policy to a cheaper one."""

    def step(self, load: LoadState, now: float) -> Policy | None:
        """The policy to change to; None: no change. Call this at regular intervals, shorter than
        `target`; now: seconds."""
        costs = self._costs(load)
        self.wait = float(
            sum(
                costs[self._index_of.get(thresholds, 0)] @ counts
                for thresholds, counts in load.waiting.items()
            )
        )
        queue = max(self.wait, self.target * load.filled)  # a refusal is as bad as a late answer
        self._update_queues(queue, costs[:, 0], load.arrived, now)
        later = self._queues + (self.rate * costs[:, 0] - 1) * self.target
        enough = np.minimum(self._queues, later) <= SHORT * self.target
        needed = int(enough.argmax()) if enough.any() else len(enough) - 1
        self._not_enough_at[:needed] = now
        index = int(np.sum(now - self._not_enough_at < self.hold))
        if index == self.index:
            return None
        self.index = index
        return self.policies[index]

    def _costs(self, load: LoadState) -> np.ndarray:
        """The expected seconds (policies, segments) from a row's run of a segment to its answer."""
        remaining = self._val_remaining.copy()
        for thresholds, counts in load.remaining.items():
            index = self._index_of.get(thresholds)
            if index is not None:
                rows, remained = counts[:-1].T
                remaining[index] = (remained + PRIOR * remaining[index]) / (rows + PRIOR)
        costs = np.tile(load.seconds, (len(self.policies), 1))
        for position in reversed(range(remaining.shape[1])):
            costs[:, position] += remaining[:, position] * costs[:, position + 1]
        return costs

    def _update_queues(self, queue: float, seconds: np.ndarray, arrived: int, now: float) -> None:
        """Brings the rate and the queues up to now. queue: what waits, in seconds; seconds:
        (policies,), per row."""
        last, arrived_then = self._arrivals[-1] if self._arrivals else (now, arrived)
        work = (arrived - arrived_then) * seconds
        # longer queues than the target would outlast the overload
        queues = np.minimum(self._queues + work - (now - last), self.target)
        self._queues = np.maximum(queues, queue)  # what waits now has to be answered first
        self._queues[self.index :] = queue
        self._arrivals.append((now, arrived))
        while len(self._arrivals) > 2 and self._arrivals[1][0] <= now - WINDOW * self.target:
            self._arrivals.popleft()
        begin, arrived_then = self._arrivals[0]
        window = max(now - begin, WINDOW * self.target)  # at first nothing is known of a part of it
        self.rate = max(0, arrived - arrived_then) / window
