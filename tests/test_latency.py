"""The clock: what is timed, never how fast it is."""

import contextlib

import numpy as np
import pytest
import torch
from tolerance import assert_close

from early_exit import latency
from early_exit.inference import advance
from early_exit.latency import (
    Spread,
    StageTimes,
    Timing,
    measure,
    stage_inputs,
    stage_times,
)
from early_exit.policy import NEVER, Policy
from early_exit.records import replay, score_record


@pytest.fixture
def policy(stored):
    """Half of the images are sure enough at every exit."""
    never = Policy(exit_names=stored.info.exit_names, thresholds=(NEVER,) * 3)
    scores = np.sort(score_record(stored, never).scores[:, :-1], axis=0)
    middle = scores[1023:1025].mean(axis=0)  # of 2,048: between two images
    return Policy(exit_names=stored.info.exit_names, thresholds=tuple(middle.tolist()))


def spread(total):
    """A sample's total, in batches of one second."""
    return Spread(p50=1.0, p95=1.0, total=total)


HAND = Timing(
    batch_size=2, images=8, repeats=3, plain=spread(12.0), live=spread(8.0), promise=spread(6.0),
    full=spread(15.0), trunk=spread(4.0), stage_seconds=(1.0, 2.0, 5.0),
)


def test_speedup_is_over_the_plain_network():
    assert HAND.speedup == 1.5


def test_kept_is_the_share_of_what_stages_promise():
    assert HAND.kept == 0.75


def test_the_trunk_alone_looks_faster():
    assert HAND.trunk_speedup == 3.0


def test_overhead_is_what_exits_cost_when_nobody_leaves():
    assert HAND.overhead == 0.25


def test_stage_shares_are_of_all_stages():
    assert HAND.stage_shares == (0.125, 0.25, 0.625)


def test_stages_are_given_the_survivors_features(tiny_net, images, stored, policy):
    net, some = tiny_net.double(), images[:256].double()
    with torch.inference_mode():
        given = stage_inputs(net, some, policy)
        features, everybody = some, []
        for stage in net.stages:
            everybody.append(features)
            features, _ = stage(features)
    taken = replay(stored, policy).exit_index[:256]
    assert [index for index, _ in given] == [0, 1, 2, 3]
    for index, rows in given:
        survivors = torch.from_numpy(np.flatnonzero(taken >= index))
        # the stem and four convolutions of at most 32 channels
        assert_close(rows, everybody[index][survivors], terms=4 * 32 * 9 + 3 * 9)
    assert 0 < len(given[-1][1]) < 256


def test_a_stage_that_nobody_reaches_is_given_nothing(tiny_net, images):
    at_once = Policy(exit_names=tiny_net.exit_names, thresholds=(0.0, 0.0, 0.0))
    with torch.inference_mode():
        ((index, features),) = stage_inputs(tiny_net, images[:4], at_once)
    assert index == 0
    assert features.shape == (4, 3, 16, 16)


def timed(net, batches, policy, **options):
    """A measurement in float32."""
    return measure(net, batches, policy, autocast=contextlib.nullcontext, **options)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_measurement_has_positive_times(tiny_net, images, policy, batch_size):
    batches = list(images[: 3 * batch_size].split(batch_size))
    timing = timed(tiny_net, batches, policy, repeats=2)
    assert (timing.batch_size, timing.images, timing.repeats) == (batch_size, 3 * batch_size, 2)
    for spread in (timing.plain, timing.live, timing.promise, timing.full, timing.trunk):
        assert 0 < spread.p50 <= spread.p95 <= spread.total
    assert len(timing.stage_seconds) == 4
    assert min(timing.stage_seconds) > 0
    assert sum(timing.stage_shares) == pytest.approx(1)


def test_no_head_is_inside_the_trunk(tiny_net, images, policy, monkeypatch):
    """BranchyNet's clock: as many bodies as stages are reached, and nothing else."""
    asked = []
    original = latency._time_stage

    def spy(timed, network, chosen, exit_index, features):
        asked.append((chosen.enabled, exit_index, len(features)))
        return original(timed, network, chosen, exit_index, features)

    monkeypatch.setattr(latency, "_time_stage", spy)
    timed(tiny_net, [images[:8]], policy, repeats=1)
    with torch.inference_mode():
        rows = [(index, len(features)) for index, features in stage_inputs(
            tiny_net, images[:8], policy
        )]
    bare = [(index, count) for enabled, index, count in asked if not any(enabled)]
    assert bare == 2 * rows  # once to warm up


def test_a_measurement_without_time_left_has_one_batch(tiny_net, images, policy):
    timing = timed(tiny_net, list(images[:32].split(4)), policy, repeats=1, seconds=0)
    assert timing.images == 4


def test_all_leaving_at_once_can_be_measured(tiny_net, images):
    at_once = Policy(exit_names=tiny_net.exit_names, thresholds=(0.0, 0.0, 0.0))
    timing = timed(tiny_net, [images[:4]], at_once, repeats=1)
    assert timing.promise.total > 0
    assert len(timing.stage_seconds) == 4  # with all rows, whoever leaves


def test_patience_can_be_measured(tiny_net, images):
    policy = Policy(
        exit_names=tiny_net.exit_names, thresholds=(1.0,) * 3, criterion="patience",
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
    # stages take 1, 2, 4 and 8 seconds for 100 rows, the plain network 10
    clock = Clock()
    monkeypatch.setattr("early_exit.latency.time", clock)
    for seconds, stage in zip((1, 2, 4, 8), tiny_net.stages, strict=True):
        def forward(features, with_logits=True, seconds=seconds, original=stage.forward):
            clock.now += seconds * len(features) / 100
            return original(features, with_logits)
        monkeypatch.setattr(stage, "forward", forward)

    def plain(images, original=tiny_net.backbone.forward):
        clock.now += 10 * len(images) / 100
        return original(images)

    monkeypatch.setattr(tiny_net.backbone, "forward", plain)
    # everybody leaves at the third exit
    policy = Policy(exit_names=tiny_net.exit_names, thresholds=(NEVER, NEVER, 0.0))
    batches = [images[:50], images[50:100]]
    timing = timed(tiny_net, batches, policy, repeats=3, seconds=1e9)
    # two batches of half of 100 rows: stages take 0.5, 1, 2 and 4 seconds, the plain network 5
    assert (timing.plain.p50, timing.plain.total) == (5, 10)
    assert (timing.live.p50, timing.live.total) == (3.5, 7)
    assert timing.promise == timing.live
    assert (timing.full.p50, timing.full.total) == (7.5, 15)
    assert timing.stage_seconds == (0.5, 1, 2, 4)
    assert timing.speedup == 10 / 7
    assert timing.overhead == 0.5
    assert timing.kept == 1


class TestStageTimes:
    def test_a_batch_takes_what_its_survivors_take(self):
        # two stages; of a batch of 4 the first always sees 4 rows
        seconds, bare = ((1.0, 1.5, 2.0), (10.0, 12.0, 20.0)), ((0.8, 1.2, 1.6), (10.0, 12.0, 20.0))
        times = StageTimes(4, (1, 2, 4), seconds, bare, plain=21.0)
        shares = np.array([[0, 1], [0.5, 0.5], [0.25, 0.75], [1, 0]])
        # 4, 2 and 3 rows in the second stage (between 12 and 20), and none
        assert times.of((True,), shares) == pytest.approx([22, 14, 18, 2])

    def test_one_image_takes_each_stage_as_often_as_it_is_reached(self):
        times = StageTimes(1, (1,), ((1.0,), (10.0,)), ((0.5,), (10.0,)), plain=10.5)
        assert times.of((True,), np.array([[0.7, 0.3]])) == pytest.approx([1 + 0.3 * 10])
        assert times.of((False,), np.array([[0.0, 1.0]])) == pytest.approx([0.5 + 10])

    def test_every_stage_is_timed_on_the_rows_it_gets(self, tiny_net, images, monkeypatch):
        seen = []

        def spy(stage, rows, policy, exit_index):
            seen.append((exit_index, len(rows.features)))
            return advance(stage, rows, policy, exit_index)

        monkeypatch.setattr(latency, "advance", spy)
        times = stage_times(
            tiny_net, images[:6], "entropy", autocast=contextlib.nullcontext, repeats=1
        )
        assert times.sizes == (1, 2, 4, 6)
        assert set(seen) >= {(index, size) for index in range(4) for size in times.sizes}
        assert np.array(times.seconds).shape == (4, 4) and times.plain > 0
