"""The engine: answers, batches across requests, policies, cancelling, failures, overload, end."""

import math
import statistics
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fake_segments import (
    PATIENCE,
    POLICY,
    Clock,
    Reported,
    expected_rows,
    fake_segments,
    images,
)
from helpers import assert_names

from early_exit.errors import UserError
from early_exit.inference.infer import run_segments
from early_exit.inference.policy import NEVER
from early_exit.serving.engine import Engine, EngineSettings, Overloaded
from early_exit.serving.request import RowAnswer, SegmentFailed


@pytest.fixture
def start():
    """A function that makes an engine with fake segments; held ones are let go and the engine is
    closed at the end of the test."""
    started = []

    def start(max_batch=4, policy=POLICY, clock=None, **settings):
        segments = fake_segments()
        clocks = {} if clock is None else {"clock": clock}
        engine = Engine(segments, policy, EngineSettings(max_batch=max_batch, **settings), **clocks)
        started.append((engine, segments))
        return engine, [segment for _, segment in segments]

    yield start
    for engine, segments in started:
        for _, segment in segments:
            segment.release()
        assert engine.close(PATIENCE)


def block(engine, first):
    """Submits a row, named 1000, that holds the only worker in the first segment."""
    first.is_held = True
    reported = Reported()
    request = engine.submit(images(1000, [0]), reported)
    first.wait_entered()
    return request, reported


class TestAnswers:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("max_batch", [1, 8])
    def test_they_equal_those_of_each_request_alone(self, start, workers, max_batch):
        engine, segments = start(max_batch, workers=workers, max_rows=10**6)
        rng = np.random.default_rng(0)
        sizes = rng.integers(1, 8, size=160).tolist()
        firsts = np.cumsum([0, *sizes]).tolist()
        requests = [
            (images(first, rng.integers(0, 3, size)), Reported())
            for first, size in zip(firsts, sizes)
        ]

        def client(number):
            for part, reported in requests[number::16]:
                engine.submit(part, reported)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert engine.close(PATIENCE)
        for part, reported in requests:
            expected = run_segments(fake_segments(), part, POLICY)
            found = sorted(reported.all, key=lambda answer: answer.row)
            assert [answer.row for answer in found] == list(range(len(part)))
            assert [answer.exit_index for answer in found] == expected.exit_index.tolist()
            assert np.array_equal([answer.logits for answer in found], expected.logits)
        exits = np.concatenate([part[:, 1] for part, _ in requests])
        for index, segment in enumerate(segments):
            assert max(segment.sizes) <= max_batch
            assert sum(segment.sizes) == np.sum(exits >= index)
        state = engine.snapshot()
        assert (state.waiting, state.in_flight) == ((0, 0, 0), 0)
        assert state.answered == tuple(np.bincount(exits.astype(int)).tolist())
        assert state.runs == tuple(len(segment.calls) for segment in segments)
        assert state.rows == tuple(sum(segment.sizes) for segment in segments)

    def test_a_row_is_answered_before_the_rest_of_its_request(self, start):
        engine, segments = start()
        segments[1].is_held = True
        reported = Reported()
        engine.submit(images(0, [0, 2, 0]), reported)
        segments[1].wait_entered()
        assert [answer.row for answer in reported.wait(2)] == [0, 2]
        segments[1].release()
        reported.wait(3)
        assert reported.rows == expected_rows(0, [0, 2, 0])

    def test_times(self, start):
        clock = Clock()
        engine, (first, *_) = start(clock=clock)
        _, blocked = block(engine, first)
        waiting = Reported()
        engine.submit(images(0, [0]), waiting)
        clock.now = 3.0
        assert engine.stalled_for() == 3
        first.release_one()
        first.wait_entered()
        assert engine.stalled_for() == 0
        clock.now = 7.0
        first.release()
        (one,), (other,) = blocked.wait(1), waiting.wait(1)
        assert (one.queued, one.computed) == (0, 3)
        assert (other.queued, other.computed) == (3, 4)
        assert engine.snapshot().seconds == (7, 0, 0)


class TestBatches:
    def test_rows_of_several_requests_run_together(self, start):
        engine, segments = start(max_batch=4)
        block(engine, segments[0])
        reported = [Reported() for _ in range(3)]
        for first, exits, one in zip((0, 2, 3), ([2, 0], [2], [2, 2]), reported):
            engine.submit(images(first, exits), one)
        assert engine.snapshot().waiting == (5, 0, 0)
        segments[0].release()
        for count, one in zip((2, 1, 2), reported):
            one.wait(count)
        assert segments[0].calls == [[1000], [0, 1, 2, 3], [4]]
        assert segments[1].calls == [[0, 2, 3], [4]]  # before row 4 was begun
        assert [one.rows for one in reported] == [
            expected_rows(0, [2, 0]),
            expected_rows(2, [2]),
            expected_rows(3, [2, 2]),
        ]

    @pytest.mark.parametrize("max_wait", [1e6, 1e300, math.inf])
    def test_a_small_batch_is_held_back(self, start, max_wait):
        """Also for longer than a thread can be told to wait."""
        engine, (first, *_) = start(max_batch=4, max_wait=max_wait)
        reported = Reported()
        engine.submit(images(0, [0, 0, 0]), reported)
        engine.submit(images(3, [0]), reported)
        reported.wait(4)
        engine.submit(images(4, [0, 0]), reported)
        assert engine.close(PATIENCE)
        assert first.sizes == [4, 2]

    def test_and_runs_when_it_has_waited(self, start):
        engine, _ = start(max_batch=4, max_wait=0.01)
        reported = Reported()
        engine.submit(images(0, [2]), reported)
        reported.wait(1)
        assert reported.rows == expected_rows(0, [2])


class TestPolicies:
    def test_rows_finish_under_their_own(self, start):
        engine, segments = start()
        block(engine, segments[0])
        never = replace(POLICY, thresholds=(NEVER, NEVER), temperatures=(2.0, 3.0, 4.0))
        old, new, back = Reported(), Reported(), Reported()
        engine.submit(images(0, [0, 1]), old)
        engine.set_policy(never)
        assert engine.policy is never
        engine.submit(images(2, [0, 1]), new)
        engine.set_policy(replace(POLICY))
        engine.submit(images(4, [1]), back)
        segments[0].release()
        assert [len(one.wait(count)) for one, count in ((old, 2), (new, 2), (back, 1))]
        assert old.rows == expected_rows(0, [0, 1])
        assert new.rows == [(0, 2, 2, 2), (1, 3, 2, 2)]
        assert back.rows == expected_rows(4, [1])
        assert segments[0].calls == [[1000], [0, 1, 4], [2, 3]]
        assert segments[0].temperatures == [1, 1, 2]
        assert segments[2].temperatures == [4]

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"exit_names": ("a", "b", "c")}, "exit_names"),
            ({"criterion": "entropy"}, "criterion"),
            ({"enabled": (True, False)}, "enabled"),
        ],
    )
    def test_of_other_segments_are_refused(self, start, changes, name):
        engine, _ = start()
        with pytest.raises(UserError) as caught:
            engine.set_policy(replace(POLICY, **changes))
        assert_names(str(caught.value), name)
        assert engine.policy is POLICY

    def test_that_does_not_fit_the_segments_is_refused(self, start):
        with pytest.raises(UserError):
            start(policy=replace(POLICY, enabled=(True, False)))


class TestCancelling:
    def test_waiting_rows_leave_at_once(self, start):
        engine, segments = start()
        block(engine, segments[0])
        gone, other = Reported(), Reported()
        request = engine.submit(images(0, [0, 1, 2]), gone)
        engine.submit(images(3, [2]), other)
        request.cancel()
        request.cancel()
        state = engine.snapshot()
        assert (state.waiting, state.in_flight) == ((1, 0, 0), 2)
        segments[0].release()
        other.wait(1)
        assert engine.close(PATIENCE)
        assert gone.all == []
        assert segments[0].calls == [[1000], [3]]

    def test_running_rows_leave_when_their_batch_ends(self, start):
        engine, segments = start()
        segments[0].is_held = True
        gone = Reported()
        request = engine.submit(images(0, [0, 2]), gone)
        segments[0].wait_entered()
        request.cancel()
        assert engine.snapshot().in_flight == 2
        segments[0].release()
        assert engine.close(PATIENCE)
        assert gone.all == []
        assert (segments[1].calls, engine.snapshot().answered) == ([], (0, 0, 0))

    def test_from_the_call_with_an_answer(self, start):
        engine, segments = start()
        block(engine, segments[0])
        reported, requests = Reported(), []

        def cancel_at_first(answer):
            reported(answer)
            requests[0].cancel()

        requests.append(engine.submit(images(0, [0, 0, 1]), cancel_at_first))
        segments[0].release()
        assert engine.close(PATIENCE)
        assert reported.rows == expected_rows(0, [0])


class TestFailures:
    def test_of_a_segment_end_the_requests_of_the_batch(self, start, caplog):
        engine, segments = start(max_batch=3, patience=0)
        block(engine, segments[0])
        failing, sharing, other = (Reported() for _ in range(3))
        segments[1].fails_on = 1
        engine.submit(images(0, [0, 1]), failing)
        engine.submit(images(2, [2, 0, 0]), sharing)
        engine.submit(images(5, [2]), other)
        segments[0].release()
        other.wait(1)
        assert engine.close(PATIENCE)
        assert isinstance(failing.all[0], RowAnswer)
        for one, count in ((failing, 2), (sharing, 1)):
            assert len(one.all) == count and isinstance(one.all[-1], SegmentFailed)
            assert_names(str(one.all[-1]), "segment 2 of 3", "ArithmeticError")
        assert other.rows == expected_rows(5, [2])
        assert segments[0].calls == [[1000], [0, 1, 2], [5]]  # rows 3 and 4 left the queue
        assert segments[1].calls == [[1, 2], [5]]
        assert "ArithmeticError" in caplog.text

    def test_of_a_cancelled_request_leave_nothing_in_flight(self, start):
        engine, segments = start()
        segments[0].is_held, segments[0].fails_on = True, 0
        reported = Reported()
        request = engine.submit(images(0, [0]), reported)
        segments[0].wait_entered()
        request.cancel()
        segments[0].release()
        assert engine.close(PATIENCE)
        assert (reported.all, engine.snapshot().in_flight) == ([], 0)

    def test_of_on_answer_hurt_no_one_else(self, start, caplog):
        engine, segments = start()
        block(engine, segments[0])
        reported = Reported()

        def fail(answer):
            raise ArithmeticError("not reported")

        engine.submit(images(0, [0, 1]), fail)
        engine.submit(images(2, [0, 1]), reported)
        segments[0].release()
        reported.wait(2)
        assert reported.rows == expected_rows(2, [0, 1])
        assert engine.close(PATIENCE)
        assert [record.exc_info[0] for record in caplog.records] == [ArithmeticError] * 2


class TestOverload:
    def test_rows_beyond_max_rows_are_refused(self, start):
        clock = Clock()
        engine, segments = start(max_rows=4, clock=clock)
        _, blocked = block(engine, segments[0])
        clock.now = 2.0
        segments[0].release_one()
        blocked.wait(1)  # a row takes two seconds
        block(engine, segments[0])
        reported = Reported()
        engine.submit(images(0, [0, 0]), reported)
        with pytest.raises(Overloaded) as caught:
            engine.submit(images(2, [0, 0]), reported)
        assert caught.value.retry_after == engine.expected_wait == pytest.approx(4)
        assert_names(str(caught.value), "4")
        engine.submit(images(2, [0]), reported)
        segments[0].release()
        reported.wait(3)
        assert reported.rows == [(0, 0, 0, 0), (0, 2, 0, 0), (1, 1, 0, 0)]
        reported.all.clear()
        engine.submit(images(0, [0] * 4), reported)
        reported.wait(4)

    def test_the_load_counts_what_happens_between_runs_while_rows_wait(self, start):
        clock = Clock()
        engine, (first, *_) = start(max_batch=1, clock=clock)
        clock.now = 50.0
        answered, calls = Reported(), 0

        def report(answer):
            nonlocal calls
            clock.now, calls = clock.now + 3, clock.calls
            answered(answer)

        first.is_held = True
        for name in range(2):
            engine.submit(images(name, [0]), report)
        for seconds in (1, 2):
            first.wait_entered()
            clock.now += seconds
            first.release_one()
        answered.wait(2)
        end = time.monotonic() + PATIENCE
        while clock.calls == calls and time.monotonic() < end:
            time.sleep(0.001)  # until the worker has looked for rows, and found none
        assert engine.snapshot().seconds[0] == 1 + 2
        assert engine.load().seconds[0] == statistics.median([1, 3 + 2])
        clock.now += 100
        engine.submit(images(2, [0]), answered)
        first.wait_entered()
        clock.now += 1
        first.release_one()
        answered.wait(3)
        assert engine.load().seconds[0] == statistics.median([1, 3 + 2, 1])

    def test_the_load_counts_refused_rows_and_those_that_wait(self, start):
        engine, segments = start(max_rows=4)
        block(engine, segments[0])
        engine.submit(images(0, [0, 0]), Reported())
        cheaper = POLICY.with_threshold(0.25)
        engine.set_policy(cheaper)
        engine.submit(images(2, [0]), Reported())
        with pytest.raises(Overloaded):
            engine.submit(images(3, [0, 0]), Reported())
        engine.count_refused(10)
        load = engine.load()
        assert (load.arrived, load.filled) == (16, 1.0)
        expected = {POLICY.thresholds: [2, 0, 0], cheaper.thresholds: [1, 0, 0]}
        assert load.waiting == expected

    def test_the_load_does_not_count_rows_that_are_dropped_while_they_wait(self, start):
        engine, segments = start()
        block(engine, segments[0])
        request = engine.submit(images(0, [0, 0]), Reported())
        request.cancel()
        load = engine.load()
        assert (load.arrived, load.filled) == (1, 1 / 1024)

    @pytest.mark.parametrize("count", [0, 5])
    def test_a_request_that_never_fits_is_refused(self, start, count):
        engine, _ = start(max_rows=4)
        with pytest.raises(UserError) as caught:
            engine.submit(images(0, [0] * count), Reported())
        assert_names(str(caught.value), count, 4)
        assert engine.snapshot().in_flight == 0

    @pytest.mark.parametrize(
        "setting",
        [
            {"max_batch": 0},
            {"workers": 0},
            {"max_rows": 0},
            {"max_wait": -1.0},
            {"target": 0.0},
            {"patience": -1.0},
        ],
        ids=str,
    )
    def test_impossible_settings_are_refused(self, setting):
        with pytest.raises(UserError) as caught:
            EngineSettings(**{"max_batch": 1, **setting})
        assert_names(str(caught.value), *setting)


class TestTheEnd:
    def test_what_is_in_flight_is_answered(self, start):
        engine, segments = start()
        _, blocked = block(engine, segments[0])
        reported, closed = Reported(), []
        engine.submit(images(0, [0, 1, 2]), reported)
        closing = threading.Thread(target=lambda: closed.append(engine.close(PATIENCE)))
        closing.start()
        segments[0].release()
        closing.join()
        assert closed == [True]
        assert reported.rows == expected_rows(0, [0, 1, 2])
        assert len(blocked.all) == 1
        with pytest.raises(RuntimeError):
            engine.submit(images(0, [0]), reported)
        assert engine.close(PATIENCE)

    def test_what_takes_too_long_ends_with_an_error(self, start):
        engine, segments = start()
        _, blocked = block(engine, segments[0])
        reported = Reported()
        engine.submit(images(0, [0, 1]), reported)
        assert not engine.close(timeout=0)
        for one in (blocked, reported):
            (error,) = one.all
            assert isinstance(error, RuntimeError)
        segments[0].release()
        assert engine.close(PATIENCE)
        assert (len(blocked.all), segments[0].calls) == (1, [[1000]])
        assert engine.snapshot().in_flight == 0
