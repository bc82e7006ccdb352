"""Overthinking on a record whose answers are known."""

import numpy as np
import pytest

from early_exit.overthinking import analyse, confusion, disagreement, right_answers

SURE = 20.0


def said(*classes: int) -> list[list[float]]:
    """Logits of exits that are sure of these classes out of three."""
    return [[SURE * (index == chosen) for index in range(3)] for chosen in classes]


@pytest.fixture
def record(make_record):
    """Five images of class 0: right all along; late; wrong at the end alone; always wrong; right
    once in between."""
    return make_record(
        [said(0, 0, 0), said(1, 0, 0), said(0, 0, 2), said(1, 1, 1), said(1, 0, 1)], [0] * 5, "test"
    )


def test_who_is_right_where(record):
    expected = [[1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert right_answers(record).astype(int).tolist() == expected


def test_disagreement_adds_up_the_distances(record):
    # two exits that are sure of different classes are 2 apart
    assert disagreement(record) == pytest.approx([0, 2, 4, 0, 2], abs=1e-5)


def test_confusion_is_in_deviations_of_val(record, make_record):
    val = make_record([said(0, 0, 0), said(1, 0, 0), said(0, 0, 2), said(1, 0, 0)], [0] * 4)
    mean, deviation = 2.0, np.sqrt(2)  # of 0, 2, 4, 2
    expected = (np.array([0, 2, 4, 0, 2]) - mean) / deviation
    assert confusion(record, val) == pytest.approx(expected, abs=1e-5)


def test_the_shares(record):
    found = analyse(record, right_answers(record), np.array([0.0, 1.0, 2.0, 0.0, 1.0]))
    assert (found.wasteful, found.destructive, found.wrong) == (0.4, 0.4, 0.6)
    assert (found.confusion_right, found.confusion_wrong) == (0.5, 1.0)
    # of the six pairs: 2 over 0 and 1, a tie of 0 and one loss, 1 over 0 and a tie
    assert found.confusion_auroc == pytest.approx((2 + 0.5 + 1.5) / 6)


def test_a_final_exit_without_mistakes_has_no_confusion_of_wrong_ones(make_record):
    record = make_record([said(0, 0), said(1, 0)], [0, 0])
    found = analyse(record, right_answers(record), np.array([0.0, 1.0]))
    assert (found.wrong, found.destructive, found.wasteful) == (0, 0, 0.5)
    assert found.confusion_wrong is None and found.confusion_auroc is None
    assert found.doubt_auroc is None


def test_doubt_is_the_final_exits(make_record):
    weak = [[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 9.0, 0.0]]]
    record = make_record(weak, [0, 0])
    found = analyse(record, right_answers(record), np.zeros(2))
    assert found.doubt_auroc == 0.0  # the wrong one is sure, the right one is not
