"""Numbers about answers."""

import math

import numpy as np
import pytest
import torch
from helpers import bound
from hypothesis import given
from hypothesis import strategies as st

from early_exit import metrics
from early_exit.metrics import auroc, mean_std, reliability, top1

# Logarithms of odds and their softmax of two classes, in float32.
ROUNDED = bound(torch.float32, 32)


def expected_calibration_error(*arguments, **options):
    """Of logits and targets."""
    return metrics.expected_calibration_error(reliability(*arguments, **options))


def confident(confidences):
    """Logits (B, 2) that give class 0 these probabilities."""
    return torch.tensor([[math.log(c / (1 - c)), 0.0] for c in confidences])


def test_top1_counts_correct_answers_on_the_device():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])  # answers 1, 0, 1
    count = top1(logits, torch.tensor([1, 1, 1]))
    assert isinstance(count, torch.Tensor)
    assert count.item() == 2


def test_mean_and_sample_deviation_by_hand():
    mean, std = mean_std([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert std == pytest.approx(math.sqrt(5 / 3))  # (2.25 + 0.25 + 0.25 + 2.25) / 3


def test_one_value_has_no_deviation():
    assert mean_std([0.9]) == (0.9, 0.0)


def test_calibration_error_by_hand():
    # ten bins, one image each: 0.55 correct, 0.65 wrong, 0.95 correct: gaps 0.45, 0.65 and 0.05
    error = expected_calibration_error(
        confident([0.55, 0.65, 0.95]), torch.tensor([0, 1, 0]), bins=10
    )
    assert error == pytest.approx((0.45 + 0.65 + 0.05) / 3, abs=ROUNDED)


def test_gaps_within_a_bin_are_averaged_before_they_count():
    # one bin: mean confidence 0.75, one of two correct: a gap of 0.25, not (0.28 + 0.78) / 2
    error = expected_calibration_error(confident([0.72, 0.78]), torch.tensor([0, 1]), bins=5)
    assert error == pytest.approx(0.25, abs=ROUNDED)


def test_calibration_error_of_certain_and_correct_answers_is_zero():
    logits = torch.tensor([[100.0, 0.0]] * 3)  # confidence 1 belongs to the last bin
    assert expected_calibration_error(logits, torch.tensor([0, 0, 0])) == 0


def test_calibration_error_of_certain_and_wrong_answers_is_one():
    logits = torch.tensor([[100.0, 0.0]] * 3)
    assert expected_calibration_error(logits, torch.tensor([1, 1, 1])) == 1


# Not at the edge of one of 15 bins, where rounding decides which one it is.
CONFIDENCES = st.floats(0.5, 0.999).filter(lambda value: 0.01 < 15 * value % 1 < 0.99)


@given(st.lists(st.tuples(CONFIDENCES, st.booleans()), min_size=1, max_size=30))
def test_calibration_error_equals_a_slow_sum_over_bins(cases):
    logits = confident([confidence for confidence, _ in cases])
    target = torch.tensor([0 if right else 1 for _, right in cases])
    confidences = logits.softmax(dim=-1)[:, 0].tolist()
    # at even odds class 0 is still the answer: it comes first
    bins = {}
    for confidence, (_, right) in zip(confidences, cases, strict=True):
        bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, right))
    slow = sum(
        len(inside)
        / len(cases)
        * abs(sum(c for c, _ in inside) / len(inside) - sum(r for _, r in inside) / len(inside))
        for inside in bins.values()
    )
    assert expected_calibration_error(logits, target) == pytest.approx(slow, abs=ROUNDED)


def test_reliability_by_hand():
    # bins of a tenth: 0.55 right and wrong, 0.95 right
    bins = reliability(confident([0.55, 0.55, 0.95]), torch.tensor([0, 1, 0]), bins=10)
    expected = [(0.55, 0.5, 2 / 3), (0.95, 1.0, 1 / 3)]
    assert [pytest.approx(row, abs=ROUNDED) for row in bins] == expected


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auroc_equals_a_slow_count_of_pairs(cases):
    scores, positive = np.array([c[0] for c in cases], float), np.array([c[1] for c in cases])
    others = scores[~positive].tolist()
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive].tolist() for b in others]
    expected = pytest.approx(sum(pairs) / len(pairs)) if pairs else None
    assert auroc(scores, positive) == expected
