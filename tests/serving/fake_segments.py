"""Segments in numpy whose exits and answers are written in their images, and the answers of a
request as they come."""

import threading
from threading import Semaphore

import numpy as np

from early_exit.inference.policy import Policy
from early_exit.serving.request import RowAnswer

PATIENCE = 60  # seconds, of a test that waits for what should come at once
NAMES = ("exit0", "exit1", "final")
POLICY = Policy(exit_names=NAMES, thresholds=(0.5, 0.5))


class FakeSegment:
    """A segment on features (B, 2): the row's name, a small integer, and the exit where it exits.

    The score is 1 there and 0 elsewhere, divided by the temperature; the answer is the name and
    the exit's index; the state is the name. So results are exact, whatever rows run together.
    """

    def __init__(self, exit_index):
        self.exit_index = exit_index
        self.calls = []
        """The names of the rows, one list a call."""
        self.temperatures = []
        self.fails_on = None
        """The name of a row with which it raises an error."""
        self.is_held = False
        """Whether a call waits for `release`."""
        self._entered, self._released = Semaphore(0), Semaphore(0)

    def __call__(self, features, temperature, state):
        names = features[:, 0].tolist()
        assert state is None or state.tolist() == names
        self.calls.append(names)
        self.temperatures.append(temperature)
        if self.is_held:
            self._entered.release()
            assert self._released.acquire(timeout=PATIENCE)
        if self.fails_on in names:
            raise ArithmeticError(self.fails_on)
        answer = np.stack([features[:, 0], np.full(len(names), self.exit_index, np.float32)], 1)
        score = (features[:, 1] == self.exit_index) / np.float32(temperature)
        return features, answer, answer, score, features[:, 0]

    @property
    def sizes(self):
        """The rows of each call."""
        return [len(call) for call in self.calls]

    def wait_entered(self):
        """Waits until a call is held."""
        assert self._entered.acquire(timeout=PATIENCE)

    def release_one(self):
        """Lets one held call go on."""
        self._released.release()

    def release(self):
        """Lets all calls go on, later ones too."""
        self.is_held = False
        self._released.release(PATIENCE)  # more than are held


def fake_segments():
    """One for each of three exits, as `run_segments` takes them."""
    return [(index, FakeSegment(index)) for index in range(3)]


def images(first, exits):
    """Images (B, 2) named `first` and on, that exit at the given exits."""
    names = np.arange(first, first + len(exits))
    return np.stack([names, exits], axis=1).astype(np.float32)


class Reported:
    """What is reported to a request; use it as `on_answer`."""

    def __init__(self):
        self.all = []
        self._changed = threading.Condition()

    def __call__(self, answer):
        with self._changed:
            self.all.append(answer)
            self._changed.notify_all()

    def wait(self, count):
        """Waits until `count` things were reported, and returns them all."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all) >= count, PATIENCE)
            return list(self.all)

    @property
    def rows(self):
        """What was answered: row, name, the exit that the answer is of, and the exit index."""
        assert all(isinstance(answer, RowAnswer) for answer in self.all)
        return sorted((one.row, *one.logits.tolist(), one.exit_index) for one in self.all)


def expected_rows(first, exits):
    """`Reported.rows` of `images`."""
    return [(row, first + row, end, end) for row, end in enumerate(exits)]


class Clock:
    """Seconds that a test sets, and how often they were asked for."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        self.calls += 1
        return self.now
