"""Which policy an engine uses: that of the model's file or, under load, a cheaper one."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from early_exit.deployed import load_policy
from early_exit.errors import UserError
from early_exit.inference.policy import Policy
from early_exit.manifest import Manifest
from early_exit.serving.adapt import Adapter, curve_policies, segment_shares
from early_exit.serving.engine import Engine

log = logging.getLogger(__name__)

STEPS_PER_TARGET = 10  # the load is looked at this often within the target, if that is long
LEAST_INTERVAL = 0.01  # seconds between two looks
LEAST_TARGET = 2 * LEAST_INTERVAL


class Policies:
    """Changes the policy of an engine. Used on the event loop."""

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        directory: Path,
        max_drop: float | None,
        target: float,
    ) -> None:
        """directory: of the model; max_drop: the accuracy (a fraction) on val that cheaper policies
        may lose, None: there are none; target: the longest wait that is accepted, in seconds.

        Raises UserError if the model does not store what its policies gave on val, and if there are
        cheaper policies and the target is shorter than `LEAST_TARGET`.
        """
        self.engine, self.manifest, self.directory = engine, manifest, directory
        self.max_drop, self.target = max_drop, target
        self.adapter = self._adapter_of(engine.policy)
        self._reading = asyncio.Lock()

    async def reload(self) -> None:
        """Reads the file again. If its policy cannot be used, the one before stays."""
        async with self._reading:  # signals in the order in which they came
            try:
                policy = await asyncio.to_thread(load_policy, self.directory, self.manifest)
                adapter = self._adapter_of(policy)
                self.engine.set_policy(policy)
            except (UserError, OSError) as error:
                log.error("the policy stays as it was: %s", error)
                return
            self.adapter = adapter
            log.info("policy.yaml was read again; its thresholds are %s", policy.thresholds)

    async def adapt(self) -> None:
        """Changes the policy with the load until it is cancelled."""
        while True:
            await asyncio.sleep(max(self.target / STEPS_PER_TARGET, LEAST_INTERVAL))
            self.step(asyncio.get_running_loop().time())

    def step(self, now: float) -> None:
        """Changes the policy if the load asks for it; now: seconds."""
        if self.adapter is None:
            return
        policy = self.adapter.step(self.engine.load(), now)
        if policy is not None:
            self.engine.set_policy(policy)
            log.info(
                "what waits takes %.0f ms, %.0f images arrive a second: the thresholds are now %s",
                1000 * self.adapter.wait,
                self.adapter.rate,
                policy.thresholds,
            )

    def _adapter_of(self, policy: Policy) -> Adapter | None:
        if self.max_drop is None:
            return None
        if self.target < LEAST_TARGET:
            raise UserError(
                f"--target-p99 is {1000 * self.target:g}; with --adapt it must be at least"
                f" {1000 * LEAST_TARGET:g}"
            )
        policies = curve_policies(self.manifest, policy, self.max_drop)
        if len(policies) == 1:
            log.warning(
                "--adapt has no effect: no threshold of val_curve in model.json costs less within"
                " --max-drop %g",
                100 * self.max_drop,
            )
        return Adapter(policies, segment_shares(self.manifest, policies), self.target)
