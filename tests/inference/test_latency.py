"""Latency: what is timed, never how fast it is."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_close, in_torch, replay

from early_exit.choosing.record import score_record
from early_exit.inference import latency
from early_exit.inference.latency import (
    BatchSeconds,
    Timing,
    make_timer,
    measure,
    segment_inputs,
    stage_inputs,
    summary,
    turns,
)
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.segments import segments_of


@pytest.fixture
def policy(stored):
    """Half of the images reach the threshold of every exit."""
    never = Policy(exit_names=stored.info.exit_names, thresholds=(NEVER,) * 3)
    scores = np.sort(score_record(stored, never).scores[:, :-1], axis=0)
    middle = scores[1023:1025].mean(axis=0)  # of 2,048: between two images
    return Policy(exit_names=stored.info.exit_names, thresholds=tuple(middle.tolist()))


def spread(total):
    """The seconds of a sample, in batches of one second."""
    return BatchSeconds(p50=1.0, p95=1.0, total=total)


HAND = Timing(
    batch_size=2,
    images=8,
    repeats=3,
    plain=spread(12.0),
    live=spread(8.0),
    ideal=spread(6.0),
    no_exit_taken=spread(15.0),
    without_heads=spread(4.0),
    segment_seconds=(1.0, 2.0, 5.0),
    speedup_range=(1.4, 1.6),
)


def test_speedup_is_over_the_plain_network():
    assert HAND.speedup == 1.5


def test_fraction_of_ideal():
    assert HAND.fraction_of_ideal == 0.75


def test_without_heads_it_looks_faster():
    assert HAND.speedup_without_heads == 3.0


def test_overhead_is_what_exits_cost_when_none_is_taken():
    assert HAND.overhead == 0.25


def test_where_it_is_not_measured_there_is_none_without_heads():
    assert dataclasses.replace(HAND, without_heads=None).speedup_without_heads is None


def test_segment_shares_are_of_all_segments():
    assert HAND.segment_shares == (0.125, 0.25, 0.625)


class QueueingDevice:
    """A runtime on a device that works only while it is waited for."""

    def __init__(self):
        self.now = self.queued = 0.0

    def call(self, seconds):
        """What starts that much work."""

        def start():
            self.queued += seconds

        return start

    def synchronize(self):
        """Does all that is queued."""
        self.now, self.queued = self.now + self.queued, 0.0


def test_the_work_that_a_call_has_queued_is_timed_and_no_other(monkeypatch):
    device = QueueingDevice()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: device.now))
    timer = make_timer(SimpleNamespace(runtime=device))
    device.call(100.0)()  # of what ran before
    assert timer(device.call(3.0), device.call(5.0)) == 8.0
    assert (device.now, device.queued) == (116.0, 0.0)  # both ran once before they were timed


def test_segments_take_the_features_of_the_remaining_rows(tiny_net, images, stored, policy):
    net, some = tiny_net.double(), images[:256].double()
    with torch.inference_mode():
        inputs = segment_inputs(segments_of(net, policy), some, policy)
        features, of_all = some, []
        for stage in net.stages:
            of_all.append(features)
            features, _ = stage(features)
    exit_index = replay(stored, policy).exit_index[:256]
    assert [list(item.segment.stages) for item in inputs] == [[stage] for stage in net.stages]
    for index, item in enumerate(inputs):
        remaining = torch.from_numpy(np.flatnonzero(exit_index >= index))
        assert torch.equal(item.rows.index, remaining)
        # the stem and four convolutions of at most 32 channels
        assert_close(item.rows.features, of_all[index][remaining], terms=4 * 32 * 9 + 3 * 9)
    assert 0 < len(inputs[-1].rows.index) < 256


def test_a_segment_that_no_row_reaches_is_not_timed(tiny_net, images):
    at_once = Policy(exit_names=tiny_net.exit_names, thresholds=(0.0, 0.0, 0.0))
    with torch.inference_mode():
        (item,) = segment_inputs(segments_of(tiny_net, at_once), images[:4], at_once)
    assert item.segment.stages == (tiny_net.stages[0],)
    assert item.rows.features.shape == (4, 3, 16, 16)


def test_the_stages_of_a_segment_take_its_rows(tiny_net, images, policy):
    """Two stages with a disabled exit between them are one segment."""
    policy = dataclasses.replace(policy, enabled=(False, True, True))
    net, some = tiny_net.double(), images[:64].double()
    with torch.inference_mode():
        inputs = segment_inputs(segments_of(net, policy), some, policy)
        stages = stage_inputs(inputs)
        features, _ = net.stages[0](some)
    assert [len(item.segment.stages) for item in inputs] == [2, 1, 1]
    assert [stage for stage, _ in stages] == net.stages
    assert_close(stages[1][1], features, terms=3 * 9)
    rows = [len(features) for _, features in stages]
    assert rows == [64, 64, len(inputs[1].rows.index), len(inputs[2].rows.index)]


def test_every_turn_has_all_in_another_order():
    found = list(turns("abcdef", 20, random.Random(0)))
    assert [sorted(order) for order in found] == [list("abcdef")] * 20
    assert len(set(map(tuple, found))) > 10
    assert found == list(turns("abcdef", 20, random.Random(0)))


def timed(net, batches, policy, **options):
    """A measurement in eager torch, in float32."""
    return measure(in_torch(net, batches[0]), batches, policy, **options)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_measurement_has_positive_times(tiny_net, images, policy, batch_size):
    batches = list(images[: 3 * batch_size].split(batch_size))
    timing = timed(tiny_net, batches, policy, repeats=2)
    assert (timing.batch_size, timing.images, timing.repeats) == (batch_size, 3 * batch_size, 2)
    for name in ("plain", "live", "ideal", "no_exit_taken", "without_heads"):
        seconds = getattr(timing, name)
        assert 0 < seconds.p50 <= seconds.p95 <= seconds.total
    assert len(timing.segment_seconds) == 4
    assert min(timing.segment_seconds) > 0
    assert sum(timing.segment_shares) == pytest.approx(1)
    assert 0 < timing.speedup_range[0] <= timing.speedup_range[1]
    assert timing.networks == {}


def test_a_measurement_out_of_time_has_one_batch(tiny_net, images, policy):
    timing = timed(tiny_net, list(images[:32].split(4)), policy, repeats=1, seconds=0)
    assert timing.images == 4


def test_all_exiting_at_once_can_be_measured(tiny_net, images):
    at_once = Policy(exit_names=tiny_net.exit_names, thresholds=(0.0, 0.0, 0.0))
    timing = timed(tiny_net, [images[:4]], at_once, repeats=1)
    assert timing.ideal.total > 0
    assert min(timing.segment_seconds) > 0  # with all rows, whichever exit


def test_patience_can_be_measured(tiny_net, images):
    policy = Policy(
        exit_names=tiny_net.exit_names,
        thresholds=(1.0,) * 3,
        criterion="patience",
        enabled=(True, False, True),
    )
    assert timed(tiny_net, [images[:8]], policy, repeats=1).live.total > 0


class Clock:
    """A clock that one forward of a stage or of the backbone moves on, and nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_times_are_those_of_the_parts_that_ran(tiny_net, images, monkeypatch):
    # stages take 1, 2, 4 and 8 seconds a row, the plain network 10
    clock = Clock()
    monkeypatch.setattr("early_exit.inference.latency.time", clock)
    for seconds, stage in zip((1, 2, 4, 8), tiny_net.stages, strict=True):

        def forward(features, with_logits=True, seconds=seconds, original=stage.forward):
            clock.now += seconds * len(features)
            return original(features, with_logits)

        monkeypatch.setattr(stage, "forward", forward)

    def plain(images, original=tiny_net.backbone.forward):
        clock.now += 10 * len(images)
        return original(images)

    monkeypatch.setattr(tiny_net.backbone, "forward", plain)
    # every row exits at the third exit
    policy = Policy(exit_names=tiny_net.exit_names, thresholds=(NEVER, NEVER, 0.0))
    batches = [images[:50], images[50:100]]
    timing = timed(tiny_net, batches, policy, repeats=3, seconds=1e9)
    # two batches of 50 rows
    assert (timing.plain.p50, timing.plain.total) == (500, 1000)
    assert (timing.live.p50, timing.live.total) == (350, 700)
    assert timing.ideal == timing.live
    assert timing.without_heads == timing.live  # heads take no time here
    assert (timing.no_exit_taken.p50, timing.no_exit_taken.total) == (750, 1500)
    assert timing.segment_seconds == (50, 100, 200, 400)
    assert timing.speedup_range == (10 / 7, 10 / 7)
    assert timing.speedup == 10 / 7
    assert timing.overhead == 0.5
    assert timing.fraction_of_ideal == 1


def test_heads_are_inside_every_time_but_the_one_without_heads(tiny_net, images, monkeypatch):
    """As BranchyNet's public code does: the bodies of the stages that are reached, nothing else."""
    clock = Clock()
    monkeypatch.setattr("early_exit.inference.latency.time", clock)
    for stage in tiny_net.stages:
        for part, seconds in ((stage.body, 10), (stage.head, 1)):
            if part is not None:

                def forward(features, seconds=seconds, original=part.forward):
                    clock.now += seconds * len(features)
                    return original(features)

                monkeypatch.setattr(part, "forward", forward)
    # all rows exit at the third exit; the second one is disabled
    policy = Policy(
        exit_names=tiny_net.exit_names, thresholds=(NEVER, NEVER, 0.0), enabled=(True, False, True)
    )
    timing = timed(tiny_net, [images[:4]], policy, repeats=2, seconds=1e9)
    assert timing.without_heads.total == 4 * 3 * 10
    assert timing.live.total == timing.ideal.total == 4 * (3 * 10 + 2)
    assert timing.no_exit_taken.total == 4 * (4 * 10 + 2)
    # the second stage runs in the segment of the third; a disabled exit has none
    assert timing.segment_seconds == (44, 0, 84, 40)


def test_static_networks_are_timed_on_every_batch(tiny_net, images, policy, monkeypatch):
    class Ticking(Clock):
        """One that is a second later at every look."""

        def perf_counter(self):
            self.now += 1
            return self.now

    clock, rows = Ticking(), []
    monkeypatch.setattr("early_exit.inference.latency.time", clock)

    class Slow(torch.nn.Flatten):
        def forward(self, images):
            clock.now += 3
            rows.append(len(images))
            return super().forward(images)

    batches = list(images[:12].split(6))
    timing = timed(tiny_net, batches, policy, others={"slow": Slow()}, repeats=2, seconds=1e9)
    assert timing.networks == {"slow": BatchSeconds(p50=4, p95=4, total=8)}
    assert rows == [6] * 2 * 2 * 2  # two batches, two repeats, each after a call that is not timed
    assert timing.plain == timing.live == BatchSeconds(p50=1, p95=1, total=2)


def test_the_medians_and_the_range_over_repeats_by_hand():
    """Two batches, three repeats each."""
    plain, live = ((9, 10, 50), (10, 11, 9)), ((5, 4, 10), (5, 6, 90))

    def sample(plain, live):
        ideal = dict.fromkeys(("ideal", "no_exit_taken", "segment 1", "network a"), 1.0)
        return {"plain": plain, "live": live, **ideal}

    samples = [list(map(sample, *turns)) for turns in zip(plain, live, strict=True)]
    policy = Policy(exit_names=("a", "final"), thresholds=(0.5,), enabled=(False,))
    timing = summary(samples, 4, policy, ["a"])
    assert (timing.batch_size, timing.images, timing.repeats) == (4, 8, 3)
    assert timing.plain == BatchSeconds(p50=10, p95=10, total=20)  # the medians are 10 and 10
    assert (timing.live.p50, timing.live.total) == (5.5, 11)  # 5 and 6
    assert timing.live.p95 == pytest.approx(5.95)
    assert timing.speedup == 20 / 11
    # of all batches together, by repeat: 19 / 10, 21 / 10, 59 / 100
    assert timing.speedup_range == (0.59, 2.1)
    assert timing.segment_seconds == (0, 1)
    assert timing.networks == {"a": BatchSeconds(p50=1, p95=1, total=2)}
    assert timing.without_heads is None


class Numpy:
    """A runtime that is not eager torch: it hands numpy arrays on."""

    name, precision, slow_to_build = "numpy", "f32", False

    def array(self, images):
        return images.numpy()

    def segment(self, segment, example: Example):
        def run(features, temperature, state=None):
            found = segment(
                torch.from_numpy(features),
                temperature,
                None if state is None else torch.from_numpy(state),
            )
            return tuple(None if part is None else part.detach().numpy() for part in found)

        return run

    def network(self, network, example):
        return lambda images: network(torch.from_numpy(images)).detach().numpy()

    def context(self):
        return torch.inference_mode()

    def synchronize(self):
        pass


@pytest.mark.parametrize("criterion", ["max_prob", "patience"])
def test_another_runtime_is_measured_without_the_time_without_heads(tiny_net, images, criterion):
    """BranchyNet's way to time is of the stages' bodies, which only eager torch can call."""
    policy = Policy(exit_names=tiny_net.exit_names, thresholds=(1.0,) * 3, criterion=criterion)
    network = RuntimeNetwork(tiny_net, Numpy(), images[:2])
    timing = measure(network, [images[:4]], policy, repeats=1)
    assert timing.without_heads is timing.speedup_without_heads is None
    assert min(timing.segment_seconds) > 0 and timing.live.total > 0
