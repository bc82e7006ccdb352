"""Criteria, each against its formula written out slowly."""

import math

import pytest
import torch
from helpers import assert_names, bound, refusal
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from early_exit.inference.criteria import (
    CRITERIA,
    check_threshold,
    entropy,
    get_criterion,
    margin,
    max_prob,
    patience,
)

ROW = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6)
BATCH = arrays("float32", (5, 3), elements=st.floats(-20, 20, width=32)).map(torch.from_numpy)
# A softmax of at most six classes and what is made of it, in float32: six exponentials, their sum,
# a quotient or a logarithm, a sum of six products. Scores are at most about 2 in size.
ROUNDED = bound(torch.float32, 32)


def slow_probs(row):
    """The softmax of a list, in float64."""
    terms = [math.exp(logit - max(row)) for logit in row]
    return [term / sum(terms) for term in terms]


def slow_max_prob(row):
    return max(slow_probs(row))


def slow_entropy(row):
    return sum(p * math.log(p) for p in slow_probs(row) if p > 0)


def slow_margin(row):
    best, second = sorted(slow_probs(row), reverse=True)[:2]
    return best - second


SLOW = {"max_prob": slow_max_prob, "entropy": slow_entropy, "margin": slow_margin}


def test_every_criterion_is_covered_here():
    assert set(CRITERIA) == {*SLOW, "patience"}


@pytest.mark.parametrize("name", SLOW)
@given(row=ROW)
def test_score_equals_the_formula(name, row):
    _, score, _ = CRITERIA[name](torch.tensor([row]), None)
    assert score.shape == (1,)
    assert score.item() == pytest.approx(SLOW[name](row), abs=2 * ROUNDED)


@pytest.mark.parametrize(
    "name, low, high", [("max_prob", 1 / 3, 1), ("entropy", -math.log(3), 0), ("margin", 0, 1)]
)
@given(logits=BATCH)
def test_score_stays_in_its_range(name, low, high, logits):
    _, score, _ = CRITERIA[name](logits, None)
    assert (score >= low - ROUNDED).all()
    assert (score <= high + ROUNDED).all()


@pytest.mark.parametrize("name", SLOW)
def test_the_answer_is_the_exits_logits_and_there_is_no_state(name):
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    answer, _, state = CRITERIA[name](logits, None)
    assert answer is logits
    assert state is None


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_give_finite_scores(name, size):
    logits = torch.tensor([[size, 0.0, -size], [size, size, size], [-size, -size, 0.0]])
    _, score, _ = CRITERIA[name](logits, None)
    # certain, undecided between three, certain
    expected = {"max_prob": [1, 1 / 3, 1], "entropy": [0, -math.log(3), 0], "margin": [1, 0, 1]}[
        name
    ]
    assert score.tolist() == pytest.approx(expected, abs=2 * ROUNDED)


def test_max_prob_of_two_classes_by_hand():
    _, score, _ = max_prob(torch.tensor([[math.log(3), 0.0]]))
    assert score.item() == pytest.approx(0.75, abs=ROUNDED)


def test_margin_of_three_classes_by_hand():
    # odds 5 : 3 : 2
    _, score, _ = margin(torch.tensor([[math.log(3), math.log(5), math.log(2)]]))
    assert score.item() == pytest.approx(0.2, abs=ROUNDED)


def test_entropy_of_certainty_among_k_classes_is_minus_ln_k_at_the_worst():
    _, score, _ = entropy(torch.zeros(1, 10))
    assert score.item() == pytest.approx(-math.log(10), abs=2 * ROUNDED)


@pytest.mark.parametrize("branchynet_t, exits", [(0.4, True), (0.3, False)])
def test_entropy_has_branchynets_thresholds(branchynet_t, exits):
    # 9 : 1 odds: 0.9 ln 10/9 + 0.1 ln 10 = 0.0948 + 0.2303 = 0.3251 nats; it exits below T
    _, score, _ = entropy(torch.tensor([[math.log(9), 0.0]]))
    assert score.item() == pytest.approx(-0.3251, abs=1e-4)
    assert (score.item() >= -branchynet_t) is exits


def logits_of(classes):
    """Logits (B, 3) whose best classes are these."""
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_patience_counts_agreements_in_a_row():
    classes_of_exits = [
        [0, 0, 1],
        [0, 1, 1],
        [0, 1, 2],
        [1, 1, 2],
        [1, 0, 2],
    ]  # five exits, three images
    scores, state = [], None
    for classes in classes_of_exits:
        answer, score, state = patience(logits_of(classes), state)
        assert torch.equal(answer, logits_of(classes))
        scores.append(score.tolist())
    # image 0: 0 0 0 1 1; image 1: 0 1 1 1 0; image 2: 1 1 2 2 2
    assert scores == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [0, 2, 1], [1, 0, 2]]


def test_patience_has_one_row_of_state_per_image():
    _, _, state = patience(logits_of([2, 0]), None)
    _, _, state = patience(logits_of([2, 1]), state)
    assert state.tolist() == [[2, 1], [1, 0]]  # the last class and the count


@pytest.mark.parametrize("name", CRITERIA)
@given(first=BATCH, second=BATCH, rows=st.permutations(range(5)), count=st.integers(1, 5))
def test_a_rows_score_does_not_depend_on_other_rows(name, first, second, rows, count):
    criterion, rows = CRITERIA[name], list(rows)[:count]
    _, score, state = criterion(first, None)
    _, later, _ = criterion(second, state)
    _, some, some_state = criterion(first[rows], None)
    _, some_later, _ = criterion(second[rows], some_state)
    assert (some - score[rows]).abs().max() <= 2 * ROUNDED
    assert (some_later - later[rows]).abs().max() <= 2 * ROUNDED


def test_criteria_are_found_by_name():
    assert get_criterion("margin") is margin


def test_unknown_criterion_is_refused_with_the_known_ones_named():
    message = refusal(get_criterion, "confidence")
    assert "'confidence'" in message and all(name in message for name in CRITERIA)


def test_a_count_is_not_taken_for_a_percentage():
    message = refusal(check_threshold, "patience", 2, "--thresholds", 10, 2)
    assert_names(message, "--thresholds", 2, "0 to 1")
    assert "try" not in message


def test_a_hint_is_a_threshold_that_is_accepted():
    message = refusal(check_threshold, "entropy", 0.5, "--thresholds", 10)
    assert "try --thresholds=-0.5" in message
    check_threshold("entropy", -0.5, "--thresholds", 10)
    assert "try" not in refusal(check_threshold, "entropy", -5.0, "--thresholds", 10)
