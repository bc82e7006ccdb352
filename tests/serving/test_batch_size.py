"""The batch size by throughput, with seconds that are known beforehand."""

import numpy as np
import pytest
from fake_segments import POLICY, Clock, images

from early_exit.serving.batch_size import LIMIT, pick_max_batch


class Timed:
    """Segments that take `once` seconds a run and `each` a row."""

    def __init__(self, once, each):
        self.once, self.each, self.clock, self.sizes = once, each, Clock(), []

    def __call__(self, features, temperature, state):
        self.sizes.append(len(features))
        self.clock.now += self.once + self.each * len(features)
        return features, features, features, np.ones(len(features), np.float32), None


@pytest.mark.parametrize(
    ("once", "each", "size"),
    [
        (0.0, 1.0, 1),  # a row takes as long in any batch
        (1.0, 0.0, 64),
        (0.25, 1.0, 8),  # 1.031 s a row, 1.004 at 64, 1.063 at 4
        (2.0, 1.0, 32),  # 1.063 s a row, 1.031 at 64, 1.125 at 16
    ],
)
def test_the_smallest_size_within_5_percent_of_the_best(once, each, size):
    """Seconds are a hundredth, so that the limit is not reached."""
    segment = Timed(once / 100, each / 100)
    segments = [(index, segment) for index in range(3)]
    found = pick_max_batch(segments, images(0, [0, 0, 0]), POLICY, clock=segment.clock)
    assert found == size


def test_all_rows_go_to_the_final_exit():
    segment = Timed(0.0, 0.01)
    segments = [(index, segment) for index in range(3)]
    pick_max_batch(segments, images(0, [0]), POLICY, sizes=(2,), clock=segment.clock)
    assert set(segment.sizes) == {2} and len(segment.sizes) % 3 == 0


def test_no_size_begins_after_the_limit():
    segment = Timed(LIMIT, 0.0)
    segments = [(index, segment) for index in range(3)]
    assert pick_max_batch(segments, images(0, [0]), POLICY, clock=segment.clock) == 1
    assert segment.sizes == [1] * 6  # the run that is not counted, and one that is
