"""Guarantees: the formulas by hand, and whether they hold when calibration is drawn anew."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import refusal

from early_exit.choosing import Goal, choose, ladder
from early_exit.cost import Cost
from early_exit.errors import UserError
from early_exit.guarantees import (
    LOSSES,
    Guarantee,
    as_kept,
    images_needed,
    losses_of,
    on_average,
    tail,
    with_confidence,
)
from early_exit.policy import NEVER, Policy
from early_exit.records import Scores, replay, score_record


@given(st.integers(1, 60), st.data(), st.sampled_from([0.01, 0.05, 0.3, 0.5]))
def test_the_tail_is_the_sum_of_its_terms(images, data, risk):
    losses = data.draw(st.integers(0, images))
    exact = sum(
        math.comb(images, k) * Fraction(risk) ** k * (1 - Fraction(risk)) ** (images - k)
        for k in range(losses + 1)
    )
    assert tail(images, losses, risk) == pytest.approx(float(exact), rel=1e-9)


def test_299_images_without_a_loss_certify_one_percent():
    assert images_needed(0.01, 0.95) == 299
    assert tail(299, 0, 0.01) <= 0.05 < tail(298, 0, 0.01)


class TestLosses:
    # full answers 1; targets 1, 1, 0, 0; the early exit says 1, 0, 0, 2
    SCORED = Scores(
        np.array([[0.9, 0], [0.9, 0], [0.9, 0], [0.9, 0]], np.float32),
        np.array([[1, 1], [0, 1], [0, 1], [2, 1]]),
        np.array([1, 1, 0, 0]),
    )
    LEAVE, STAY = (
        Policy(exit_names=("early", "final"), thresholds=(value,)) for value in (0.5, NEVER)
    )

    def test_wrong_counts_what_the_full_network_would_have_known(self):
        lost = losses_of(self.SCORED, [self.STAY, self.LEAVE], "wrong")
        assert lost.tolist() == [[False] * 4, [False, True, False, False]]

    def test_differs_needs_no_label(self):
        lost = losses_of(self.SCORED, [self.STAY, self.LEAVE], "differs")
        assert lost.tolist() == [[False] * 4, [False, True, True, True]]
        other = dataclasses.replace(self.SCORED, targets=np.array([2, 0, 1, 1]))
        assert np.array_equal(losses_of(other, [self.STAY, self.LEAVE], "differs"), lost)

    @pytest.mark.parametrize(("loss", "kept"), [
        ("wrong", [True, False, True, True]), ("differs", [True, False, False, False])
    ])
    def test_what_is_kept_is_what_is_not_lost(self, loss, kept):
        right = as_kept(self.SCORED, loss).right
        assert right[:, 0].tolist() == kept and right[:, 1].all()

    def test_both_are_no_less_than_the_accuracy_given_up(self, stored):
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.7, 0.7, 0.7))
        scored = score_record(stored, policy)
        said = replay(stored, policy)
        given_up = scored.right[:, -1].mean() - (said.answers == stored.targets).mean()
        for loss in LOSSES:
            assert losses_of(scored, [policy], loss).mean() >= given_up


class TestWithConfidence:
    def lost(self, images: int, *losses: int) -> np.ndarray:
        return np.arange(images) < np.array(losses)[:, None]

    def test_it_goes_to_the_last_policy_before_the_first_that_fails(self):
        # of 1,000 images at 1 %: four losses have a tail of 0.028, five one of 0.066
        assert tail(1000, 4, 0.01) < 0.05 < tail(1000, 5, 0.01)
        assert with_confidence(self.lost(1000, 0, 1, 4), 0.01, 0.95) == 2
        assert with_confidence(self.lost(1000, 0, 4, 5, 6), 0.01, 0.95) == 1

    def test_what_comes_after_a_failure_is_not_looked_at(self):
        assert with_confidence(self.lost(1000, 0, 5, 0, 0), 0.01, 0.95) == 0

    def test_too_few_images_say_how_many_are_needed(self):
        with pytest.raises(UserError, match=r"\b298\b.* 1 %.* 95 %.*\b299\b"):
            with_confidence(self.lost(298, 0), 0.01, 0.95)
        assert with_confidence(self.lost(299, 0), 0.01, 0.95) == 0

    def test_a_list_that_begins_with_a_loss_is_a_mistake_of_the_caller(self):
        with pytest.raises(ValueError) as caught:
            with_confidence(self.lost(299, 1), 0.01, 0.95)
        assert not isinstance(caught.value, UserError)


class TestOnAverage:
    def test_a_loss_that_vanishes_further_down_still_counts(self):
        lost = np.zeros((4, 99), bool)
        lost[1, 0] = lost[2, 1] = True  # one each, of two different images
        assert on_average(lost, 0.02) == 1  # 2 / 100, then 3 / 100 for ever
        assert on_average(lost, 0.03) == 3

    def test_too_few_images_say_how_many_are_needed(self):
        with pytest.raises(UserError, match=r"\b98\b.* 1 %.*\b99\b"):
            on_average(np.zeros((1, 98), bool), 0.01)
        assert on_average(np.zeros((1, 99), bool), 0.01) == 0


def test_a_guarantee_says_its_words():
    words = Guarantee(
        risk=0.01, confidence=0.95, loss="wrong", images=4000, losses=27, data="val 1a2b"
    )
    for part in ("right", "wrong", "1 %", "4,000", "val 1a2b", "95 %"):
        assert part in str(words)
    on_average = str(dataclasses.replace(words, confidence=None))
    assert "average" in on_average and "95 %" not in on_average


# The record is the population, and the risk of every policy on it is known; certifying images are
# drawn from it with replacement.

DRAWS, IMAGES, RISK, CONFIDENCE = 2000, 1000, 0.05, 0.9


@pytest.fixture(scope="module")
def population(stored):
    """Per loss, which images of the record each of 80 policies loses."""
    thresholds = [NEVER, *np.linspace(1, 0.25, 79)]
    policies = [
        Policy(exit_names=stored.info.exit_names, thresholds=(value,) * 3) for value in thresholds
    ]
    scored = score_record(stored, policies[0])
    return {loss: losses_of(scored, policies, loss) for loss in LOSSES}


def risks_of_draws(lost: np.ndarray, certify) -> np.ndarray:
    """The true risk of what `certify` accepts, for every draw."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(lost.shape[1], size=(DRAWS, IMAGES))
    true = lost.mean(axis=1)
    return np.array([true[certify(lost[:, rows])] for rows in drawn])


def too_many(violations: int, share: float) -> bool:
    """Whether so many violations are too many for a share that is allowed, at one in a thousand."""
    return 1 - tail(DRAWS, violations - 1, share) < 0.001 if violations else False


@pytest.mark.parametrize("loss", LOSSES)
def test_with_confidence_holds(population, loss):
    risks = risks_of_draws(
        population[loss], lambda lost: with_confidence(lost, RISK, CONFIDENCE)
    )
    assert not too_many(int((risks > RISK).sum()), 1 - CONFIDENCE)
    assert risks.mean() > 0.5 * RISK  # and gives something for it


@pytest.mark.parametrize("loss", LOSSES)
def test_on_average_holds(population, loss):
    risks = risks_of_draws(population[loss], lambda lost: on_average(lost, RISK))
    assert risks.mean() <= RISK + 3 * risks.std() / DRAWS**0.5
    assert risks.mean() > 0.7 * RISK


@pytest.mark.parametrize("per_exit", [False, True])
def test_a_ladder_that_was_fitted_on_other_images_holds_too(stored, per_exit):
    """With exits that do not pay switched off, and with a threshold for each."""
    names = stored.info.exit_names
    cost = Cost(names, (10, 10, 10, 30), (1, 9, 1, 0), 0, (0,) * 4)
    fit = stored.subset(np.arange(400), "val", "fit")
    rest = stored.subset(np.arange(400, len(stored)), "test", "rest")
    policies = ladder(fit, Goal(risk=RISK, confidence=CONFIDENCE, per_exit=per_exit), cost)
    assert len(policies) > 10 and policies[0].thresholds == (NEVER,) * 3
    lost = losses_of(score_record(rest, policies[0]), policies, "wrong")
    risks = risks_of_draws(lost, lambda drawn: with_confidence(drawn, RISK, CONFIDENCE))
    assert not too_many(int((risks > RISK).sum()), 1 - CONFIDENCE)
    assert risks.max() > 0  # it accepts more than the first


def test_a_method_without_a_guarantee_is_found_out(population):
    # as many as are allowed on the certifying images: wrong in about half of the draws
    def naive(lost):
        return int((np.maximum.accumulate(lost.mean(axis=1)) <= RISK).sum()) - 1

    risks = risks_of_draws(population["wrong"], naive)
    assert too_many(int((risks > RISK).sum()), 1 - CONFIDENCE)


@pytest.mark.parametrize("per_exit", [False, True])
def test_labels_play_no_part_where_answers_must_not_differ(stored, per_exit):
    """Not even in which exits are switched off, which some of these prices bring about."""
    shuffled = np.random.default_rng(0).permutation(stored.targets)
    blind = dataclasses.replace(stored, targets=shuffled)
    goal = Goal(risk=0.1, confidence=0.9, loss="differs", calibrate=False, per_exit=per_exit)
    switched = set()
    for dear in range(3):
        heads = [1, 1, 1, 0]
        heads[dear] = 40
        cost = dataclasses.replace(stored.cost, stage_macs=(100,) * 4, head_macs=tuple(heads))
        policies = [
            dataclasses.replace(choose(record, goal, cost), guarantee=None)
            for record in (stored, blind)
        ]
        assert policies[0] == policies[1]
        switched.add(policies[0].enabled)
    assert len(switched) > 1


def test_two_images_certify_nothing(stored):
    few = stored.subset(np.arange(2), "val", "two")
    said = refusal(choose, few, Goal(risk=0.1), few.cost)
    assert "1 certifying" in said and "10 %" in said
