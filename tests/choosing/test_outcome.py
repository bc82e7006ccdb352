"""What a policy does on a record, worked out by hand."""

import pytest
from helpers import refusal

from early_exit.choosing.outcome import apply_policy, outcome_of
from early_exit.choosing.record import score_record
from early_exit.inference.policy import Policy
from early_exit.model.cost import Cost

COST = Cost(("exit0", "exit1", "final"), (20, 30, 50), (5, 10, 0), 0, (0,) * 3)


@pytest.fixture
def record(make_record):
    """Four images, of which one exits at each early exit and two at the final one."""
    sure, unsure, other = [4.0, 0.0], [0.1, 0.0], [0.0, 4.0]
    return make_record(
        [
            [sure, other, other],
            [unsure, other, sure],
            [unsure, unsure, sure],
            [unsure, unsure, other],
        ],
        [0, 0, 0, 0],
    )


def make_policy(**changes):
    values = {"exit_names": COST.exit_names, "thresholds": (0.9, 0.9), **changes}
    return Policy(**values)


def test_by_hand(record):
    outcome = apply_policy(make_policy(), record, COST)
    assert outcome.exit_index.tolist() == [0, 1, 2, 2]
    assert outcome.answers.tolist() == [0, 1, 0, 1]
    assert outcome.correct.tolist() == [True, False, True, False]
    assert outcome.exit_shares == (0.25, 0.25, 0.5)
    assert outcome.point.accuracy == 0.5
    assert outcome.point.macs_share == pytest.approx((25 + 65 + 2 * 115) / 4 / 100)
    assert outcome.final_accuracy == 0.5
    # the exits are correct for 4, 2 and 2 of 4
    assert outcome.random_exit_accuracy == 0.25 * 1 + 0.25 * 0.5 + 0.5 * 0.5


def test_a_disabled_exit_costs_nothing(record):
    outcome = apply_policy(make_policy(enabled=(False, True)), record, COST)
    assert outcome.exit_shares == (0, 0.5, 0.5)
    assert outcome.point.macs_share == pytest.approx((2 * 60 + 2 * 110) / 4 / 100)


def test_scores_may_be_used_for_other_thresholds(record):
    scored = score_record(record, make_policy())
    policy = make_policy(thresholds=(0.0, 0.0))
    outcome = outcome_of(scored, policy, COST)
    assert outcome.exit_index.tolist() == [0, 0, 0, 0]
    assert outcome.exit_shares == (1, 0, 0)


def test_a_policy_of_other_exits_is_refused(record):
    policy = Policy(exit_names=("a", "b", "final"), thresholds=(0.5, 0.5))
    message = refusal(apply_policy, policy, record, COST)
    assert "a, b, final" in message and "exit0, exit1, final" in message
