"""What GET /metrics answers, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from early_exit.inference.policy import Policy
from early_exit.manifest import Manifest
from early_exit.serving import drift
from early_exit.serving.adapt import val_point
from early_exit.serving.engine import Engine


class Metrics:
    """The numbers of a service: those of requests are counted here, the others are the engine's."""

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self.engine, self.window = engine, drift.Window()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "early_exit_requests",
            "Requests that were answered",
            ("route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "early_exit_request_seconds",
            "Seconds from a request's headers to its answer",
            ("route",),
            registry=self.registry,
        )
        self._rejected = Counter(
            "early_exit_rejected",
            "Requests refused because the service is overloaded",
            registry=self.registry,
        )
        self.registry.register(_EngineMetrics(engine, manifest, self.window))

    def count(self, route: str, status: int, seconds: float | None = None) -> None:
        """Counts a request. route: as in the table of routes, without names that clients give."""
        self._requests.labels(route, str(status)).inc()
        if seconds is not None:
            self._seconds.labels(route).observe(seconds)

    def count_rejected(self) -> None:
        """Counts a request that was refused because the service is overloaded."""
        self._rejected.inc()

    def count_exits(self, policy: Policy, exits: Sequence[int]) -> None:
        """Counts images that were answered, for the comparison with val. policy: that they came
        with; under an earlier one they are not compared. exits: their indices."""
        if policy == self.engine.policy:
            self.window.add(policy, exits)

    def text(self) -> bytes:
        """The numbers now."""
        return generate_latest(self.registry)


class _EngineMetrics(Collector):
    """The engine's numbers, read when they are asked for."""

    def __init__(self, engine: Engine, manifest: Manifest, window: drift.Window) -> None:
        self.engine, self.manifest, self.window = engine, manifest, window

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        state, policy = self.engine.snapshot(), self.engine.policy
        exits = policy.exit_names
        segments = [exits[segment.last] for segment in self.manifest.segments]
        thresholds = [
            (name, threshold)
            for name, threshold, enabled in zip(
                exits, policy.thresholds, policy.enabled, strict=False
            )
            if enabled
        ]
        yield _gauge("rows_in_flight", "Images submitted and not answered", state.in_flight)
        yield _gauge(
            "expected_wait_seconds",
            "Seconds that an image submitted now is expected to wait",
            self.engine.expected_wait,
        )
        yield _family(
            GaugeMetricFamily("early_exit_threshold", "Of the policy now", labels=("exit",)),
            thresholds,
        )
        yield _family(
            CounterMetricFamily("early_exit_answered_rows", "Images answered", labels=("exit",)),
            zip(exits, state.answered, strict=True),
        )
        val = val_point(self.manifest, policy)
        if val is not None and val.exit_shares is not None:
            family = GaugeMetricFamily(
                "early_exit_val_share",
                "Share of val that exits here by the policy now",
                labels=("exit",),
            )
            yield _family(family, zip(exits, val.exit_shares, strict=True))
            counts = self.window.counts(policy)
            if counts is not None:
                yield _gauge(
                    "drift",
                    f"Total variation distance between the exits of the last {counts.sum()} images"
                    " under the policy now and val's",
                    drift.distance(counts, val.exit_shares),
                )
                if val.images:
                    shares = tuple(val.exit_shares[one.last] for one in self.manifest.segments)
                    yield _gauge(
                        "drift_by_chance",
                        f"The drift that a share {drift.FALSE_ALARM:g} of windows of images like"
                        " val's exceed",
                        drift.distance_by_chance(shares, val.images, int(counts.sum())),
                    )
        waiting = GaugeMetricFamily(
            "early_exit_waiting_rows", "Images that wait for a segment", labels=("segment",)
        )
        yield _family(waiting, zip(segments, state.waiting, strict=True))
        for name, text, values in (
            ("runs", "Runs of a segment", state.runs),
            ("rows", "Images in them", state.rows),
            ("seconds", "Seconds in them", state.seconds),
        ):
            total = CounterMetricFamily(f"early_exit_segment_{name}", text, labels=("segment",))
            yield _family(total, zip(segments, values, strict=True))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"early_exit_{name}", text, value)


def _family(
    family: CounterMetricFamily | GaugeMetricFamily, values: Iterable[tuple[str, float]]
) -> Metric:
    """The family with a value for each label."""
    for label, value in values:
        family.add_metric((label,), value)
    return family
