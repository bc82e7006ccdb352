"""Which waiting rows run next."""

from dataclasses import replace

import numpy as np
import pytest
from fake_segments import POLICY
from hypothesis import given
from hypothesis import strategies as st

from early_exit.inference.infer import Rows
from early_exit.serving.load import FADING, Load
from early_exit.serving.queues import Queues, WaitingRows

OTHER = replace(POLICY, thresholds=(0.7, 0.5))


def rows(*numbers):
    """Rows whose features and state are their numbers."""
    index = np.array(numbers)
    return Rows(index, index[:, None] * 1.0, index * 1)


def numbers_of(parts):
    """The numbers of several parts, whose rows are whole."""
    for part in parts:
        assert part.features[:, 0].tolist() == part.state.tolist() == part.index.tolist()
    return [number for part in parts for number in part.index.tolist()]


def queues(max_batch=4, max_wait=0.0, patience=100.0, deadline_of=float):
    return Queues(3, max_batch, max_wait, patience, deadline_of)


@given(
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    order=st.permutations(range(6)),
    takes=st.lists(st.integers(1, 9), max_size=10),
    gone=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_rows_are_taken_in_order_however_they_were_put(owners, order, takes, gone):
    waiting = WaitingRows(POLICY)
    for owner in order:
        part = [number for number, other in enumerate(owners) if other == owner]
        if part:
            waiting.put(rows(*part), now=0)
    discarded = range(min(gone), max(gone))
    left = [number for number in range(len(owners)) if number not in discarded]
    removed = waiting.discard(discarded)
    assert sorted([*removed, *left]) == list(range(len(owners)))
    for count in takes:
        assert len(waiting) == len(left)
        assert numbers_of(waiting.take(count)) == left[:count]
        left = left[count:]


class TestWhatRunsNext:
    def test_the_earliest_deadline(self):
        waiting = queues()
        waiting.put(0, POLICY, rows(3, 4), now=0)
        waiting.put(1, POLICY, rows(5), now=0)
        batches = [waiting.take(0), waiting.take(0)]
        assert [(batch.position, batch.numbers) for batch in batches] == [(0, [3, 4]), (1, [5])]
        assert waiting.take(0) is None

    def test_of_equal_deadlines_the_later_segment(self):
        waiting = queues(deadline_of=lambda _: 7.0)
        waiting.put(0, POLICY, rows(0, 1), now=0)
        waiting.put(1, POLICY, rows(2), now=0)
        assert [waiting.take(0).position for _ in range(2)] == [1, 0]

    def test_at_most_max_batch_rows(self):
        waiting = queues(max_batch=3)
        waiting.put(0, POLICY, rows(0, 1), now=0)
        waiting.put(0, POLICY, rows(2, 3), now=0)
        assert waiting.counts == (4, 0, 0)
        batch = waiting.take(0)
        assert numbers_of(batch.parts) == batch.numbers == [0, 1, 2]
        assert waiting.counts == (1, 0, 0)

    def test_rows_of_one_policy_alone(self):
        waiting = queues()
        waiting.put(0, POLICY, rows(0), now=0)
        waiting.put(0, OTHER, rows(1), now=0)
        waiting.put(0, replace(POLICY), rows(2), now=0)  # equal, not the same object
        batches = [waiting.take(0), waiting.take(0)]
        assert [(batch.policy, batch.numbers) for batch in batches] == [
            (POLICY, [0, 2]),
            (OTHER, [1]),
        ]

    def test_discarded_rows_do_not_run(self):
        waiting = queues()
        waiting.put(0, POLICY, rows(0, 1, 2), now=0)
        waiting.put(1, OTHER, rows(3), now=0)
        assert sorted(waiting.discard(range(1, 4))) == [1, 2, 3]
        assert waiting.counts == (1, 0, 0)
        assert waiting.take(0).numbers == [0]
        assert waiting.take(0) is None


class TestFullBatches:
    def test_the_last_segment_that_has_one(self):
        waiting = queues(max_batch=2)
        for position, numbers in ((0, (5, 6)), (1, (2, 3, 4)), (2, (0,))):
            waiting.put(position, POLICY, rows(*numbers), now=0)
        batches = [waiting.take(0) for _ in range(4)]
        assert [(batch.position, batch.numbers) for batch in batches] == [
            (1, [2, 3]),
            (0, [5, 6]),
            (2, [0]),
            (1, [4]),
        ]

    def test_of_two_policies_that_of_the_earliest_row(self):
        """Its rows are no more after the policy has changed, and would never fill a batch."""
        waiting = queues(max_batch=2)
        waiting.put(0, OTHER, rows(0), now=0)
        waiting.put(0, POLICY, rows(1, 2), now=0)
        assert [waiting.take(0).numbers for _ in range(2)] == [[0], [1, 2]]

    @pytest.mark.parametrize("now, position", [(11.9, 0), (12, 1)])
    def test_rows_of_a_later_segment_wait_for_one_so_long(self, now, position):
        waiting = queues(max_batch=2, patience=2.0)
        waiting.put(1, POLICY, rows(0), now=10)
        waiting.put(0, POLICY, rows(1, 2), now=0)
        assert waiting.take(now).position == position

    def test_the_first_segment_does_not_go_first_because_it_waited(self):
        waiting = queues(patience=2.0)
        waiting.put(0, POLICY, rows(1), now=0)
        waiting.put(1, POLICY, rows(0), now=5)
        assert waiting.take(5).position == 1

    def test_later_batches_of_a_busy_engine_are_full(self):
        """Every second row remains after each segment."""
        waiting, sizes = queues(), [[], [], []]
        for run in range(70):
            first = 4 * run
            waiting.put(0, POLICY, rows(*range(first, first + 4)), now=run)
            while sum(waiting.counts) >= 8:
                batch = waiting.take(run)
                sizes[batch.position].append(len(batch.numbers))
                if batch.position < 2:
                    waiting.put(batch.position + 1, POLICY, rows(*batch.numbers[::2]), now=run)
        assert [set(found) for found in sizes] == [{4}] * 3


class TestHoldingBack:
    def test_until_the_first_row_has_waited(self):
        waiting = queues(max_wait=2.0)
        waiting.put(0, POLICY, rows(0, 1), now=10)
        waiting.put(0, POLICY, rows(2), now=11)
        assert (waiting.take(11.9), waiting.next_due()) == (None, 12)
        assert waiting.take(12).numbers == [0, 1, 2]
        assert waiting.next_due() is None

    def test_until_the_batch_is_full(self):
        waiting = queues(max_wait=2.0, max_batch=3)
        waiting.put(0, POLICY, rows(0, 1), now=10)
        waiting.put(0, POLICY, rows(2, 3), now=10)
        assert waiting.take(10).numbers == [0, 1, 2]
        assert waiting.take(10) is None

    def test_a_full_batch_of_later_deadlines_goes_first(self):
        waiting = queues(max_wait=2.0, max_batch=3)
        waiting.put(1, POLICY, rows(0), now=10)
        waiting.put(0, POLICY, rows(1, 2, 3), now=10)
        assert waiting.take(10).position == 0

    def test_not_at_the_end(self):
        waiting = queues(max_wait=2.0)
        waiting.put(0, POLICY, rows(0), now=10)
        assert waiting.take(10, hold_back=False).numbers == [0]


class TestExpectedWait:
    def test_by_hand(self):
        """Segment 0 takes 0.1 s a row and a quarter remains; segment 1 takes 0.4 s a row. So a row
        that waits for segment 0 takes 0.2 s in all."""
        load = Load(2)
        assert load.expected_wait((3, 5), 1) == 0
        load.add(0, (0.5,), 8, 2, 0.8, 0.8)
        load.add(1, (0.5,), 2, 0, 0.8, 0.8)
        assert load.expected_wait((3, 5), 1) == pytest.approx(3 * 0.2 + 5 * 0.4)
        assert load.expected_wait((3, 5), 2) == pytest.approx(1.3)
        assert (load.runs, load.rows, load.seconds) == ([1, 1], [8, 2], [0.8, 0.8])

    def test_recent_runs_count_more(self):
        load = Load(1)
        load.add(0, (), 1, 0, 1.0, 1.0)
        load.add(0, (), 1, 0, 2.0, 2.0)
        assert load.expected_wait((1,), 1) == pytest.approx((FADING + 2) / (FADING + 1))


class TestLoadState:
    def test_the_seconds_are_those_of_large_batches(self):
        load = Load(2)
        load.add(0, (0.5,), 1, 0, 5.0, 5.0)
        assert load.state({}, 1, 0.0).seconds.tolist() == [5.0, 0.0]
        load.add(0, (0.5,), 8, 0, 16.0, 16.0)
        load.add(0, (0.5,), 1, 0, 5.0, 5.0)
        assert load.state({}, 1, 0.0).seconds.tolist() == [2.0, 0.0]
        assert load.state({}, 4, 0.0).seconds.tolist() == [0.5, 0.0]

    def test_a_run_that_was_held_up_does_not_count(self):
        load = Load(1)
        load.add(0, (), 16, 0, 900.0, 900.0)
        for seconds in (8.0, 80.0, 8.0):
            load.add(0, (), 8, 0, seconds, seconds)
        assert load.state({}, 1, 0.0).seconds.tolist() == [1.0]

    def test_the_rows_that_remained_under_each_policy(self):
        load = Load(2)
        load.add(0, (0.5,), 4, 3, 1.0, 1.0)
        load.add(0, (0.5,), 1, 0, 1.0, 1.0)
        load.add(0, (0.2,), 2, 1, 1.0, 1.0)
        remaining = load.state({}, 1, 0.0).remaining
        assert remaining[0.5,][0] == pytest.approx([4 * FADING + 1, 3 * FADING])
        assert remaining[0.2,].tolist() == [[2, 1], [0, 0]]
