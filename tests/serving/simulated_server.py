"""A server with one worker on a virtual clock: real queues, load and rule, invented segments."""

import math
from dataclasses import dataclass, field

import numpy as np

from early_exit.inference.infer import all_rows
from early_exit.serving.adapt import Adapter
from early_exit.serving.load import Load
from early_exit.serving.queues import Queues


@dataclass
class SimulatedServer:
    """Segments of which a run takes `fixed` seconds and `seconds[position]` per row."""

    adapter: Adapter
    shares: np.ndarray
    """(policies, segments): of rows that exit at the end of each segment; other ones than the
    adapter's for traffic that is not like val."""
    seconds: tuple[float, ...]
    fixed: float = 0.0
    max_batch: int = 8
    max_rows: int = 10**9
    changes: list[tuple[float, int]] = field(default_factory=list)
    """Times, and indices of the policies from then on."""

    def run(self, times: np.ndarray, until: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Serves rows that arrive at `times` (R,), ascending; the load is looked at ten times per
        target, until `until`. Returns the seconds (R,) from each arrival to the answer, infinite
        for refused rows and those that are not answered by then, and the index of its policy."""
        target, policies = self.adapter.target, self.adapter.policies
        stays = np.random.default_rng(seed).random(len(times))  # a row's difficulty
        ends_of = dict(zip((one.thresholds for one in policies), self.shares.cumsum(1)))
        queues = Queues(len(self.seconds), self.max_batch, 0, 0.25 * target, times.item)
        load = Load(len(self.seconds))
        latency, index = np.full(len(times), math.inf), np.zeros(len(times), int)
        arrivals, in_flight, batch, look = 0, 0, None, 0.0
        began, ends = 0.0, math.inf
        while True:
            arrival = times[arrivals] if arrivals < len(times) else math.inf
            now = min(arrival, ends, look)
            if now > until:
                return latency, index
            if now == ends:
                position, numbers = batch.position, np.array(batch.numbers)
                remains = stays[numbers] >= ends_of[batch.policy.thresholds][position]
                remains &= position < len(self.seconds) - 1
                thresholds, took = batch.policy.thresholds, now - began
                load.add(position, thresholds, len(numbers), remains.sum(), took, took)
                latency[numbers[~remains]] = now - times[numbers[~remains]]
                in_flight -= int(np.sum(~remains))
                if remains.any():
                    rows = all_rows(numbers[remains, None])
                    rows.index = numbers[remains]
                    queues.put(position + 1, batch.policy, rows, now)
                batch, ends = None, math.inf
            elif now == arrival:
                load.arrived += 1
                index[arrivals] = self.adapter.index
                if in_flight < self.max_rows:
                    rows = all_rows(np.zeros((1, 1)), arrivals)
                    queues.put(0, policies[self.adapter.index], rows, now)
                    in_flight += 1
                arrivals += 1
            else:
                look += target / 10
                if self.adapter.step(
                    load.state(queues.counts_by_thresholds, 1, in_flight / self.max_rows), now
                ):
                    self.changes.append((now, self.adapter.index))
            if batch is None and (batch := queues.take(now)) is not None:
                began, ends = (
                    now,
                    now + self.fixed + self.seconds[batch.position] * len(batch.numbers),
                )


def poisson(rate: float, begin: float, end: float, seed: int) -> np.ndarray:
    """Times of arrival, independent of each other, `rate` per second on average."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(begin, end, rng.poisson(rate * (end - begin))))
