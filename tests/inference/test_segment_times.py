"""Times of segments: which are measured, and what they say a policy costs."""

import itertools

import numpy as np
import pytest
import torch
from helpers import in_torch

from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segment_times import SegmentTimes, all_spans, segment_times
from early_exit.inference.segments import segments_of, spans

# of one image, of a network with exits after the first two of its three stages
ONE = SegmentTimes(
    1,
    (1,),
    {
        (0, 0): (2.0,),
        (0, 1): (4.0,),  # not 2 + 3: a call and a head are saved
        (0, 2): (7.0,),
        (1, 1): (3.0,),
        (1, 2): (6.0,),
        (2, 2): (4.0,),
    },
    plain=6.5,
)


class TestPrice:
    @pytest.mark.parametrize(
        ("enabled", "shares", "seconds"),
        [
            ((True, True), (0.5, 0.3, 0.2), 2 + 0.5 * 3 + 0.2 * 4),
            ((True, False), (0.6, 0.0, 0.4), 2 + 0.4 * 6),
            ((False, True), (0.0, 0.7, 0.3), 4 + 0.3 * 4),
            ((False, False), (0.0, 0.0, 1.0), 7),  # one segment, with the criterion
            ((True, True), (1.0, 0.0, 0.0), 2),
            ((True, True), (0.0, 0.0, 1.0), 2 + 3 + 4),
        ],
    )
    def test_one_image_takes_each_segment_as_often_as_it_is_reached(self, enabled, shares, seconds):
        assert ONE.of(enabled, np.array([shares])) == pytest.approx([seconds])

    def test_merged_segments_are_not_the_sum_of_their_parts(self):
        stay = np.array([[0.0, 0.0, 1.0]])
        assert ONE.of((True, True), stay)[0] == 9
        assert ONE.of((False, True), stay)[0] == ONE.of((True, False), stay)[0] == 8

    def test_a_batch_takes_what_its_remaining_rows_take(self):
        times = SegmentTimes(
            4,
            (1, 2, 4),
            {(0, 0): (1.0, 1.5, 2.0), (1, 1): (10.0, 12.0, 20.0), (0, 1): (9.0, 11.0, 19.0)},
            plain=21.0,
        )
        shares = np.array([[0, 1], [0.5, 0.5], [0.25, 0.75], [0.875, 0.125], [1, 0]])
        # 4, 2, 3 (between 12 and 20), half a row (between none and one) and none
        assert times.of((True,), shares) == pytest.approx([22, 14, 18, 7, 2])
        assert times.of((False,), np.array([[0, 1]])) == pytest.approx([19])

    def test_shares_that_add_up_to_a_little_more_than_one_are_no_negative_rows(self):
        shares = np.array([[0.7, 0.3 + 1e-9, 0.0]])
        assert ONE.of((True, True), shares) == pytest.approx([2 + 0.3 * 3])
        assert ONE.of((True, True), shares)[0] >= 2 + 0.3 * 3

    def test_a_network_without_early_exits_is_one_segment(self):
        times = SegmentTimes(1, (1,), {(0, 0): (3.0,)}, plain=3.0)
        assert times.of((), np.array([[1.0]])) == pytest.approx([3])

    def test_an_exit_that_was_no_candidate_has_no_price(self):
        times = SegmentTimes(1, (1,), dict.fromkeys(all_spans([1], 3), (1.0,)), plain=1.0)
        assert [times.allows(index) for index in range(3)] == [False, True, True]
        with pytest.raises(KeyError):
            times.of((True, False), np.array([[0.0, 0.0, 1.0]]))


class TestAllSpans:
    @pytest.mark.parametrize("early", range(8))
    def test_n_exits_have_n_times_n_plus_one_halves(self, early):
        found = all_spans(range(early), early + 1)
        assert len(set(found)) == len(found) == (early + 1) * (early + 2) // 2

    def test_of_three_exits(self):
        found = all_spans([0, 1], 3)
        assert sorted(found) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]

    def test_stages_between_candidates_are_merged(self):
        """Of five exits the second and the fourth: segments start after them and end at them."""
        found = all_spans([3, 1], 5)
        assert sorted(found) == [(0, 1), (0, 3), (0, 4), (2, 3), (2, 4), (4, 4)]

    def test_every_policy_of_the_candidates_is_made_of_them(self):
        found = set(all_spans([0, 2, 3], 5))
        used = set()
        for a, b, c in itertools.product([True, False], repeat=3):
            used |= set(spans((a, False, b, c)))
        assert used == found


class Clock:
    """A clock that segments move on, and nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("early_exit.inference.latency.time", clock)
    monkeypatch.setattr("early_exit.inference.segment_times.time", clock)
    return clock


def slow_parts(net, clock, monkeypatch, calls):
    """Stages take 1, 10, 100 and 1000 seconds a row and heads 0.5; every call of a stage is noted:
    its index, rows, and whether its head ran."""
    for index, stage in enumerate(net.stages):

        def forward(features, with_logits=True, index=index, original=stage.forward):
            calls.append((index, len(features), with_logits))
            clock.now += len(features) * (10**index + 0.5 * with_logits)
            return original(features, with_logits)

        monkeypatch.setattr(stage, "forward", forward)

    def plain(images, original=net.backbone.forward):
        calls.append(("plain", len(images), True))
        clock.now += 800.0
        return original(images)

    monkeypatch.setattr(net.backbone, "forward", plain)


class TestMeasuring:
    PAIRS = ((0, 0), (0, 2), (1, 2), (3, 3), (0, 3), (1, 3))  # the second exit is no candidate

    @pytest.fixture
    def measured(self, tiny_net, images, clock, monkeypatch):
        """The times of a batch of six, and the calls of one turn."""
        calls = []
        network = in_torch(tiny_net, images[:2])
        for first, last in self.PAIRS:
            network.segment(first, last, "max_prob")  # built beforehand, which calls stages
        slow_parts(tiny_net, clock, monkeypatch, calls)
        times = segment_times(network, images[:6], "max_prob", self.PAIRS, repeats=4, seconds=1e9)
        return times, calls

    def test_they_are_those_of_the_stages_that_ran(self, measured):
        times, _ = measured
        assert (times.batch_size, times.sizes, times.plain) == (6, (1, 2, 4, 6), 800)
        per_row = {
            (0, 0): 1.5,
            (0, 2): 111.5,
            (1, 2): 110.5,
            (3, 3): 1000.5,
            (0, 3): 1111.5,
            (1, 3): 1110.5,
        }
        assert times.seconds == {
            span: tuple(rows * seconds for rows in times.sizes) for span, seconds in per_row.items()
        }

    def test_every_pair_is_measured_on_every_size_and_nothing_else(self, measured):
        _, calls = measured
        turns = 2 * 4  # each call after one that is not timed
        plain = [call for call in calls if call[0] == "plain"]
        assert plain == [("plain", 6, True)] * turns
        expected = []
        for first, last in self.PAIRS:
            for size in (1, 2, 4, 6):
                expected += [(index, size, index == last) for index in range(first, last + 1)]
        inputs = [(0, 6, True), (1, 6, False), (2, 6, True)]  # up to the last candidate, once
        found = [call for call in calls if call[0] != "plain"]
        assert sorted(found) == sorted(expected * turns + inputs)

    def test_segments_take_the_rows_that_reach_them(self, tiny_net, images, monkeypatch):
        """The first rows of what the stages before make of the batch, and their state."""
        taken, net = [], tiny_net.double()
        network = in_torch(net, images[:2].double())
        build = network.segment

        def noting(first, last, criterion):
            segment = build(first, last, criterion)

            def run(features, temperature, state=None):
                taken.append((first, last, features, temperature, state))
                return segment(features, temperature, state)

            return run

        monkeypatch.setattr(network, "segment", noting)
        some = images[:3].double()
        pairs = all_spans([0, 2], 4)
        segment_times(network, some, "patience", pairs, repeats=1, seconds=1e9)
        policy = Policy(
            exit_names=net.exit_names,
            thresholds=(NEVER,) * 3,
            criterion="patience",
            enabled=(True, False, True),
        )
        expected, features, state = {}, some, None
        with torch.inference_mode():
            for (first, _), (_, segment) in zip(
                spans(policy.enabled), segments_of(net, policy), strict=True
            ):
                expected[first] = features, state
                features, _, _, _, state = segment(features, 1.0, state)
        assert {(first, last) for first, last, *_ in taken} == set(pairs)
        for first, _, features, temperature, state in taken:
            rows = len(features)
            assert torch.equal(features, expected[first][0][:rows])
            assert temperature == 1.0
            if first == 0:
                assert state is None
            else:
                assert torch.equal(state, expected[first][1][:rows])

    @pytest.mark.parametrize(("seconds", "turns"), [(0.0, 3), (6 * 800.0, 4), (1e9, 9)])
    def test_out_of_time_three_turns_remain(
        self, tiny_net, images, clock, monkeypatch, seconds, turns
    ):
        """A turn takes twice 800 seconds here."""
        calls = []
        slow_parts(tiny_net, clock, monkeypatch, calls)
        monkeypatch.setattr("early_exit.inference.segment_times.advance", lambda *_: (None, None))
        network = in_torch(tiny_net, images[:2])
        network.segment(0, 3, "max_prob")
        times = segment_times(network, images[:1], "max_prob", [(0, 3)], repeats=9, seconds=seconds)
        assert sum(call[0] == "plain" for call in calls) == 2 * turns
        assert times.plain == 800

    def test_the_median_is_without_the_first_call_of_a_turn(
        self, tiny_net, images, clock, monkeypatch
    ):
        took = iter([1000.0, 3.0, 1000.0, 7.0, 1000.0, 5.0])
        network = in_torch(tiny_net, images[:2])
        monkeypatch.setattr(
            network, "plain", lambda: lambda _: setattr(clock, "now", clock.now + next(took))
        )
        times = segment_times(network, images[:1], "max_prob", [(0, 3)], repeats=3, seconds=1e9)
        assert times.plain == 5
