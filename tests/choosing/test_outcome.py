"""What a policy does on a record, worked out by hand, and where live inference differs from it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import refusal, replay, replayed_live

from early_exit.choosing import record as records
from early_exit.choosing.outcome import ROUNDING, Live, apply_policy, disagreements, outcome_of
from early_exit.choosing.record import score_record
from early_exit.inference.criteria import CRITERIA, declare
from early_exit.inference.policy import NEVER, Policy
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


def test_replay_disagrees_with_itself_nowhere(record):
    policy = make_policy()
    found = disagreements(record, policy, replayed_live(record, policy))
    assert not found.differs.any()
    assert not found.unexplained.any()
    assert found.rounding == ROUNDING


@pytest.mark.parametrize("kind", ["answers", "exit_index"])
def test_planted_mistakes_are_found_and_not_explained(record, kind):
    live = replayed_live(record, make_policy())
    planted = getattr(live, kind).copy()
    planted[[0, 2]] = [1, 1]
    found = disagreements(record, make_policy(), dataclasses.replace(live, **{kind: planted}))
    assert found.differs.tolist() == [True, False, True, False]
    assert found.unexplained.tolist() == [True, False, True, False]


def probability(first):
    """Logits of two classes that give the first one this probability."""
    return [math.log(first), math.log(1 - first)]


def in_precision(record, precision):
    """The record as if it were of another precision."""
    return dataclasses.replace(record, info=dataclasses.replace(record.info, precision=precision))


def live_with(record, policy, **changes):
    """What inference gives if nothing is rounded, but for these fields."""
    changes = {name: np.array(value) for name, value in changes.items()}
    return dataclasses.replace(replayed_live(record, policy), **changes)


class TestRounding:
    """Which differences of live inference from the record it explains."""

    def test_an_image_at_the_threshold_may_exit_or_remain(self, make_record):
        stored = make_record([[probability(p), probability(0.9)] for p in (0.8, 0.8001)], [0, 0])
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.8 - 1e-6,))
        assert replayed_live(stored, policy).exit_index.tolist() == [0, 0]
        found = disagreements(stored, policy, live_with(stored, policy, exit_index=[1, 1]))
        assert found.differs.tolist() == [True, True]
        assert found.unexplained.tolist() == [False, True]  # 1e-6 is rounding, 1e-4 is not

    def test_a_tie_may_be_answered_either_way(self, make_record):
        tie, clear = [0.5, 0.5 - 1e-6], [0.5, 0.5 - 1e-3]
        stored = make_record([[tie, tie], [clear, clear]], [0, 0])
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(NEVER,))
        found = disagreements(stored, policy, live_with(stored, policy, answers=[1, 1]))
        assert found.differs.tolist() == [True, True]
        assert found.unexplained.tolist() == [False, True]

    def test_a_disabled_exit_explains_nothing(self, make_record):
        tie = [0.0, 0.0]
        stored = make_record([[tie, probability(0.9), probability(0.9)]], [0])
        policy = Policy(
            exit_names=stored.info.exit_names, thresholds=(0.5, 0.5), enabled=(False, True)
        )
        found = disagreements(stored, policy, live_with(stored, policy, answers=[1]))
        assert found.unexplained.tolist() == [True]

    def test_an_exit_that_was_not_reached_explains_nothing(self, make_record):
        stored = make_record([[probability(0.9), [0.0, 0.0], probability(0.9)]], [0])
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.7, 0.5))
        found = disagreements(stored, policy, live_with(stored, policy, answers=[1]))
        assert found.unexplained.tolist() == [True]

    def test_a_count_is_exact_so_it_explains_no_exit_of_patience(self, make_record):
        # every exit clearly answers class 0: the count is 1 at the second exit, where it exits
        stored = make_record([[probability(0.9)] * 4], [0])
        policy = Policy(
            exit_names=stored.info.exit_names, thresholds=(1.0, 1.0, 1.0), criterion="patience"
        )
        assert replayed_live(stored, policy).exit_index.tolist() == [1]
        found = disagreements(stored, policy, live_with(stored, policy, exit_index=[3]))
        assert found.differs.tolist() == [True]
        assert found.unexplained.tolist() == [True]

    def test_other_counts_of_images_that_agree_are_no_rounding(self, make_record):
        """A tie before the final exit may change a count there, which decides nothing."""
        stored = make_record([[probability(0.9)] * 3], [0])
        policy = Policy(
            exit_names=stored.info.exit_names, thresholds=(2.0, 2.0), criterion="patience"
        )
        found = disagreements(stored, policy, live_with(stored, policy, score=[0.0]))
        assert found.rounding == ROUNDING and not found.differs.any()


class TestMeasuredRounding:
    """In reduced precision scores differ more: twice as much as on the images that agree, up to a
    limit."""

    @pytest.fixture
    def gaps(self, make_record):
        """Five images whose probabilities at the first exit are 0.3, 0.07, 0.09, 0.05 and 0.11
        above the threshold of 0.6, in bfloat16."""
        above = (0.3, 0.07, 0.09, 0.05, 0.11)
        stored = make_record(
            [[probability(0.6 + gap), probability(0.99)] for gap in above], [0] * 5
        )
        stored = in_precision(stored, "bf16")
        return stored, Policy(exit_names=stored.info.exit_names, thresholds=(0.6,))

    def shifted(self, gaps, shift, agree):
        """Live inference with scores lower by `shift`, where only the images `agree` exit."""
        stored, policy = gaps
        live = replayed_live(stored, policy)
        exits = np.where(np.isin(np.arange(5), agree), 0, 1)
        return dataclasses.replace(live, exit_index=exits, score=live.score - np.float32(shift))

    def test_twice_the_shift_of_the_scores_explains_a_difference(self, gaps):
        found = disagreements(*gaps, self.shifted(gaps, 0.04, agree=[0]))
        assert found.rounding == pytest.approx(0.08, rel=1e-5)
        assert found.differs.tolist() == [False, True, True, True, True]
        assert found.unexplained.tolist() == [False, False, True, False, True]

    def test_images_that_differ_measure_nothing(self, gaps):
        """A wrong exit must not excuse itself by its own score."""
        stored, policy = gaps
        live = self.shifted(gaps, 0.0, agree=[0, 1, 2, 3])
        live = dataclasses.replace(live, score=live.score - np.float32([0, 0, 0, 0, 0.5]))
        found = disagreements(stored, policy, live)
        assert found.rounding == ROUNDING
        assert found.unexplained.tolist() == [False] * 4 + [True]

    def test_no_image_agrees(self, gaps):
        found = disagreements(*gaps, self.shifted(gaps, 0.5, agree=[]))
        assert found.rounding == ROUNDING and found.unexplained.all()

    def test_logits_explain_a_tie_and_no_threshold(self, make_record):
        """The best logit is off by 0.5 / 4 where answers agree: two logits may swap if they are at
        most 4 times that apart, both divided by the temperature."""
        final = [[9.0, 0.0], [1.0, 0.49], [1.0, 0.51]]
        stored = make_record([[[1.0, -1.0], logits] for logits in final], [0] * 3)
        stored = in_precision(stored, "bf16")
        policy = Policy(
            exit_names=stored.info.exit_names, thresholds=(0.95,), temperatures=(1.0, 2.0)
        )
        live = replayed_live(stored, policy)
        best = live.best + np.float32([0.125 / 2, 0, 0])
        live = dataclasses.replace(live, best=best, answers=np.array([0, 1, 1]))
        found = disagreements(stored, policy, live)
        assert found.rounding == ROUNDING  # of scores
        assert found.differs.tolist() == [False, True, True]
        assert found.unexplained.tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("precision", "limit"),
        [("off", 1e-3), ("f32", 1e-3), ("fp16", 1e-2), ("bf16", 0.1), ("int8", 0.1)],
    )
    def test_scores_that_are_far_off_explain_nothing(self, gaps, precision, limit):
        """As if the rows were out of order: all scores are off by more than rounding can be."""
        stored, policy = gaps
        stored = in_precision(stored, precision)
        found = disagreements(stored, policy, self.shifted(gaps, 0.3, agree=[0]))
        assert found.rounding == limit
        expected = [gap > limit for gap in (0.07, 0.09, 0.05, 0.11)]
        assert found.unexplained.tolist() == [False, *expected]

    @pytest.mark.parametrize(
        ("temperature", "explained"), [(1.0, False), (1.025, True), (3.0, True)]
    )
    def test_a_wrong_temperature_explains_no_clear_answer(
        self, make_record, temperature, explained
    ):
        """A tenth of the largest logit is the most that bfloat16 explains: here 0.9."""
        final = [[9.0, 0.0], [1.0, 0.3], [1.0, 0.0]]
        stored = make_record([[[1.0, -1.0], logits] for logits in final], [0] * 3)
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.95,))
        live = replayed_live(stored, policy)
        live = dataclasses.replace(
            live, best=live.best / np.float32(temperature), answers=np.array([0, 1, 1])
        )
        found = disagreements(in_precision(stored, "bf16"), policy, live)
        assert found.unexplained.tolist() == [False, not explained, True]

    def test_rows_of_a_mapped_record(self, gaps, tmp_path, monkeypatch):
        stored, policy = gaps
        stored.save(tmp_path / "all")
        monkeypatch.setattr(records, "MAPPED_BYTES", -1)
        rows = np.array([2, 0, 1])
        some = records.ExitRecord.load(tmp_path / "all").subset(rows, "test", "some")
        live = self.shifted(gaps, 0.04, agree=[0])
        live = Live(*(getattr(live, name)[rows] for name in vars(live)))
        found = disagreements(some, policy, live)
        assert found.rounding == pytest.approx(0.08, rel=1e-5)
        assert found.unexplained.tolist() == [True, False, False]


def test_an_answer_that_is_not_of_the_exit_alone_is_compared_as_a_whole(make_record, monkeypatch):
    """The mean of the logits so far: ties are those of the mean, and of the final exit alone the
    best logit is 1 where the mean's is 5."""

    @declare(keeps_state=True)
    def mean(logits, state=None):
        seen = logits[:, None] if state is None else torch.cat([state, logits[:, None]], dim=1)
        return seen.mean(1), seen.mean(1).softmax(-1).amax(-1), seen

    monkeypatch.setitem(CRITERIA, "mean", mean)
    stored = make_record(
        [[[9.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 0.0]]], [0] * 3
    )
    policy = Policy(exit_names=stored.info.exit_names, thresholds=(NEVER,), criterion="mean")
    scores = replay(stored, policy).scored.scores[:, 1]
    live = Live(np.array([0, 1, 1]), np.array([1, 1, 1]), scores, np.float32([5, 1, 2]))
    found = disagreements(stored, policy, live)
    assert found.differs.tolist() == [False, True, True]
    assert found.unexplained.tolist() == [False, False, True]
