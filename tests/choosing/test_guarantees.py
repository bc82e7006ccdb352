"""Guarantees: the formulas by hand, and whether they hold when calibration is drawn anew."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from helpers import refusal, replay
from hypothesis import given
from hypothesis import strategies as st

from early_exit.choosing.choice import candidates, choose, fit_and_certify
from early_exit.choosing.goals import Risk
from early_exit.choosing.guarantees import (
    LOSSES,
    Guarantee,
    binomial_cdf,
    images_needed,
    losses_of,
    on_average,
    with_confidence,
    with_losses_as_errors,
)
from early_exit.choosing.outcome import apply_policy
from early_exit.choosing.record import Scores, score_record
from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA, declare
from early_exit.inference.policy import NEVER, Policy
from early_exit.model.cost import Cost


@given(st.integers(1, 60), st.data(), st.sampled_from([0.01, 0.05, 0.3, 0.5]))
def test_the_distribution_is_the_sum_of_its_terms(images, data, risk):
    losses = data.draw(st.integers(0, images))
    exact = sum(
        math.comb(images, k) * Fraction(risk) ** k * (1 - Fraction(risk)) ** (images - k)
        for k in range(losses + 1)
    )
    assert binomial_cdf(images, losses, risk) == pytest.approx(float(exact), rel=1e-9)


def test_299_images_without_a_loss_certify_one_percent():
    assert images_needed(0.01, 0.95) == 299
    assert binomial_cdf(299, 0, 0.01) <= 0.05 < binomial_cdf(298, 0, 0.01)


class TestLosses:
    # full answers 1; targets 1, 1, 0, 0; the early exit answers 1, 0, 0, 2
    SCORED = Scores(
        np.array([[0.9, 0], [0.9, 0], [0.9, 0], [0.9, 0]], np.float32),
        np.array([[1, 1], [0, 1], [0, 1], [2, 1]]),
        np.array([1, 1, 0, 0]),
    )
    EXIT, REMAIN = (
        Policy(exit_names=("early", "final"), thresholds=(value,)) for value in (0.5, NEVER)
    )

    def test_wrong_counts_what_the_full_network_answers_correctly(self):
        lost = losses_of(self.SCORED, [self.REMAIN, self.EXIT], "wrong")
        assert lost.tolist() == [[False] * 4, [False, True, False, False]]

    def test_differs_needs_no_label(self):
        lost = losses_of(self.SCORED, [self.REMAIN, self.EXIT], "differs")
        assert lost.tolist() == [[False] * 4, [False, True, True, True]]
        other = dataclasses.replace(self.SCORED, targets=np.array([2, 0, 1, 1]))
        assert np.array_equal(losses_of(other, [self.REMAIN, self.EXIT], "differs"), lost)

    @pytest.mark.parametrize(
        ("loss", "correct"),
        [("wrong", [True, False, True, True]), ("differs", [True, False, False, False])],
    )
    def test_an_exit_counts_as_correct_for_what_it_does_not_lose(self, loss, correct):
        found = with_losses_as_errors(self.SCORED, loss).correct
        assert found[:, 0].tolist() == correct and found[:, 1].all()

    def test_both_are_no_less_than_the_accuracy_given_up(self, stored):
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.7, 0.7, 0.7))
        scored = score_record(stored, policy)
        replayed = replay(stored, policy)
        given_up = scored.correct[:, -1].mean() - (replayed.answers == stored.targets).mean()
        for loss in LOSSES:
            assert losses_of(scored, [policy], loss).mean() >= given_up


class TestWithConfidence:
    def lost(self, images: int, *losses: int) -> np.ndarray:
        return np.arange(images) < np.array(losses)[:, None]

    def test_the_last_policy_before_the_first_that_fails(self):
        # of 1,000 images at 1 %: at most four losses have a probability of 0.028, five 0.066
        assert binomial_cdf(1000, 4, 0.01) < 0.05 < binomial_cdf(1000, 5, 0.01)
        assert with_confidence(self.lost(1000, 0, 1, 4), 0.01, 0.95) == 2
        assert with_confidence(self.lost(1000, 0, 4, 5, 6), 0.01, 0.95) == 1

    def test_policies_after_a_failure_do_not_count(self):
        assert with_confidence(self.lost(1000, 0, 5, 0, 0), 0.01, 0.95) == 0

    def test_too_few_images_name_how_many_are_needed(self):
        with pytest.raises(UserError, match=r"\b298\b.* 1 %.* 95 %.*\b299\b"):
            with_confidence(self.lost(298, 0), 0.01, 0.95)
        assert with_confidence(self.lost(299, 0), 0.01, 0.95) == 0

    def test_a_list_that_begins_with_a_loss_is_a_mistake_of_the_caller(self):
        with pytest.raises(ValueError) as caught:
            with_confidence(self.lost(299, 1), 0.01, 0.95)
        assert not isinstance(caught.value, UserError)


class TestOnAverage:
    def test_a_loss_that_vanishes_later_still_counts(self):
        lost = np.zeros((4, 99), bool)
        lost[1, 0] = lost[2, 1] = True  # one each, of two different images
        assert on_average(lost, 0.02) == 1  # 2 / 100, then 3 / 100 to the end
        assert on_average(lost, 0.03) == 3

    def test_too_few_images_name_how_many_are_needed(self):
        with pytest.raises(UserError, match=r"\b98\b.* 1 %.*\b99\b"):
            on_average(np.zeros((1, 98), bool), 0.01)
        assert on_average(np.zeros((1, 99), bool), 0.01) == 0


def test_a_guarantee_in_words():
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
    return 1 - binomial_cdf(DRAWS, violations - 1, share) < 0.001 if violations else False


@pytest.mark.parametrize("loss", LOSSES)
def test_with_confidence_holds(population, loss):
    risks = risks_of_draws(population[loss], lambda lost: with_confidence(lost, RISK, CONFIDENCE))
    assert not too_many(int((risks > RISK).sum()), 1 - CONFIDENCE)
    assert risks.mean() > 0.5 * RISK  # and gives something for it


@pytest.mark.parametrize("loss", LOSSES)
def test_on_average_holds(population, loss):
    risks = risks_of_draws(population[loss], lambda lost: on_average(lost, RISK))
    assert risks.mean() <= RISK + 3 * risks.std() / DRAWS**0.5
    assert risks.mean() > 0.7 * RISK


def test_candidates_that_were_fitted_on_other_images_hold_too(stored):
    """With the exits disabled that do not pay."""
    names = stored.info.exit_names
    cost = Cost(names, (10, 10, 10, 30), (1, 9, 1, 0), 0, (0,) * 4)
    fit = stored.subset(np.arange(400), "val", "fit")
    rest = stored.subset(np.arange(400, len(stored)), "test", "rest")
    policies = candidates(fit, Risk(RISK, confidence=CONFIDENCE), cost)
    assert not all(policies[0].enabled)
    assert len(policies) > 10 and policies[0].thresholds == (NEVER,) * 3
    lost = losses_of(score_record(rest, policies[0]), policies, "wrong")
    risks = risks_of_draws(lost, lambda drawn: with_confidence(drawn, RISK, CONFIDENCE))
    assert not too_many(int((risks > RISK).sum()), 1 - CONFIDENCE)
    assert risks.max() > 0  # it accepts more than the first


def test_a_method_without_a_guarantee_is_found(population):
    # as many as are allowed on the certifying images: wrong in about half of the draws
    def naive(lost):
        return int((np.maximum.accumulate(lost.mean(axis=1)) <= RISK).sum()) - 1

    risks = risks_of_draws(population["wrong"], naive)
    assert too_many(int((risks > RISK).sum()), 1 - CONFIDENCE)


def test_labels_have_no_effect_if_the_loss_is_a_different_answer(stored):
    """Not even on which exits are disabled, as some are at each of these costs."""
    shuffled = np.random.default_rng(0).permutation(stored.targets)
    blind = dataclasses.replace(stored, targets=shuffled)
    goal = Risk(0.1, confidence=0.9, loss="differs", calibrate=False)
    disabled = set()
    for expensive in range(3):
        heads = [1, 1, 1, 0]
        heads[expensive] = 40
        cost = dataclasses.replace(stored.cost, stage_macs=(100,) * 4, head_macs=tuple(heads))
        policies = [
            dataclasses.replace(choose(record, goal, cost), guarantee=None)
            for record in (stored, blind)
        ]
        assert policies[0] == policies[1]
        disabled.add(policies[0].enabled)
    assert len(disabled) > 1


@pytest.mark.parametrize(("surest_is_wrong", "enabled"), [(False, True), (True, False)])
def test_an_exit_that_no_image_may_take_is_disabled(make_record, surest_is_wrong, enabled):
    """One of 500 images is lost at the early exit; none of those that fit the temperature."""
    targets = np.zeros(500, np.int64)
    logits = np.zeros((500, 2, 2), np.float32)
    logits[:, 0, 0] = np.linspace(5, 50, 500)
    logits[:, 1, 0] = 60
    _, certify = fit_and_certify(make_record(logits, targets))
    logits[certify[0], 0] = [0, 80 if surest_is_wrong else 5]
    record = make_record(logits, targets)
    policy = choose(record, Risk(0.004, confidence=0.75), record.cost)
    assert policy.enabled == (enabled,)
    outcome = apply_policy(policy, record, record.cost)
    assert (outcome.point.macs_share < 1) == enabled
    assert outcome.point.macs_share <= 1


def test_an_answer_made_of_several_exits_keeps_those_that_no_image_may_take(
    make_record, monkeypatch
):
    """The final answer, the mean of the logits, needs them. The early exit gets the surest of 500
    images wrong by 10, so in the end 12 - 10 are left."""

    @declare(keeps_state=True)
    def mean(logits, state=None):
        total = logits if state is None else state + logits
        mean = total / (1 if state is None else 2)
        return mean, mean.softmax(-1).amax(-1), total

    monkeypatch.setitem(CRITERIA, "mean", mean)
    targets = np.zeros(500, np.int64)
    logits = np.zeros((500, 2, 2), np.float32)
    logits[:, 0, 0] = np.linspace(1, 8, 500)
    logits[:, 1, 0] = 12
    _, certify = fit_and_certify(make_record(logits, targets))
    logits[certify[0], 0] = [0, 10]
    record = make_record(logits, targets)
    goal = Risk(0.004, confidence=0.75, criterion="mean", calibrate=False)
    policy = choose(record, goal, record.cost)
    outcome = apply_policy(policy, record, record.cost)
    assert policy.enabled == (True,)
    assert set(outcome.exit_index) == {1} and outcome.point.accuracy == 1
    assert outcome.scored.scores[certify[0], 1] == pytest.approx(1 / (1 + math.exp(-1)))


def test_two_images_certify_nothing(stored):
    few = stored.subset(np.arange(2), "val", "two")
    message = refusal(choose, few, Risk(0.1), few.cost)
    assert "1 certifying" in message and "10 %" in message
