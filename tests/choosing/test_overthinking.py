"""Overthinking on a record whose answers are known."""

import numpy as np
import pytest

from early_exit.choosing.overthinking import analyse, confusion, correct_answers, disagreement

LARGE = 20.0


def logits_of(*classes: int) -> list[list[float]]:
    """Logits of exits that answer these classes, of three, with certainty."""
    return [[LARGE * (index == chosen) for index in range(3)] for chosen in classes]


@pytest.fixture
def record(make_record):
    """Five images of class 0: correct at every exit; at the later two; at all but the final one;
    at none; at the second alone."""
    return make_record(
        [
            logits_of(0, 0, 0),
            logits_of(1, 0, 0),
            logits_of(0, 0, 2),
            logits_of(1, 1, 1),
            logits_of(1, 0, 1),
        ],
        [0] * 5,
        "test",
    )


def test_which_exits_are_correct(record):
    expected = [[1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert correct_answers(record).astype(int).tolist() == expected


def test_disagreement_adds_up_the_distances(record):
    # two exits that are certain of different classes are 2 apart
    assert disagreement(record) == pytest.approx([0, 2, 4, 0, 2], abs=1e-5)


@pytest.fixture
def val(make_record):
    """Four images that disagree by 0, 2, 4 and 2."""
    answers = [(0, 0, 0), (1, 0, 0), (0, 0, 2), (1, 0, 0)]
    return make_record([logits_of(*classes) for classes in answers], [0] * 4)


def test_confusion_is_in_deviations_of_val(record, val):
    mean, deviation = 2.0, np.sqrt(2)  # of 0, 2, 4, 2
    expected = (np.array([0, 2, 4, 0, 2]) - mean) / deviation
    assert confusion(record, val) == pytest.approx(expected, abs=1e-5)


def test_the_shares(record, val):
    found = analyse(record, correct_answers(record), confusion(record, val))
    assert (found.wasteful, found.destructive, found.wrong) == (0.4, 0.4, 0.6)
    # the final exit is correct for the first two, which are -sqrt(2) and 0 deviations from the mean
    # of val; the others are sqrt(2), -sqrt(2) and 0
    assert found.confusion_right == pytest.approx(-np.sqrt(0.5), abs=1e-5)
    assert found.confusion_wrong == pytest.approx(0, abs=1e-5)
    # of the six pairs the wrong one is more confused in 3, as confused in 2, less in 1
    assert found.confusion_auroc == pytest.approx((3 + 2 * 0.5) / 6)


def test_a_final_exit_without_mistakes_has_no_confusion_of_wrong_ones(make_record):
    record = make_record([logits_of(0, 0), logits_of(1, 0)], [0, 0])
    found = analyse(record, correct_answers(record), confusion(record, record))
    assert (found.wrong, found.destructive, found.wasteful) == (0, 0, 0.5)
    assert found.confusion_wrong is None and found.confusion_auroc is None
    assert found.doubt_auroc is None


def test_doubt_is_the_final_exits(make_record):
    weak = [[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 9.0, 0.0]]]
    record = make_record(weak, [0, 0])
    assert (
        analyse(record, correct_answers(record), confusion(record, record)).doubt_auroc == 0.0
    )  # the wrong answer is the more certain one
