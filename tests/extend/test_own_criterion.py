"""A user's own criterion: its declaration, on stored logits, live, in an evaluation."""

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import TASK, quick_report, refusal, replay
from torch import Tensor

from early_exit.choosing.choice import choose
from early_exit.choosing.goals import Budget, MaxDrop
from early_exit.choosing.outcome import apply_policy
from early_exit.choosing.record import score_record
from early_exit.classifier import load
from early_exit.inference.criteria import CRITERIA, declare
from early_exit.inference.infer import infer
from early_exit.inference.policy import Policy


def logit_energy(logits: Tensor, state: None = None) -> tuple[Tensor, Tensor, None]:
    """log sum exp of the logits (Liu et al., arXiv:2010.03759)."""
    return logits, logits.logsumexp(dim=-1), None


@declare(lowest=1, keeps_state=True, counts=True)
def votes(logits: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """How many exits so far gave this answer. state: (B, K), votes for each class."""
    best = logits.argmax(dim=-1, keepdim=True)
    state = torch.zeros_like(logits) if state is None else state
    state = state.scatter_add(1, best, torch.ones_like(best, dtype=logits.dtype))
    return logits, state.gather(1, best).squeeze(1), state


@pytest.fixture
def own_criteria(monkeypatch) -> Iterator[None]:
    """`logit_energy` and `votes`, known by their names."""
    for criterion in (logit_energy, votes):
        monkeypatch.setitem(CRITERIA, criterion.__name__, criterion)


@pytest.mark.usefixtures("own_criteria")
class TestCriterion:
    @pytest.mark.parametrize(
        "made",
        [
            lambda logits, state: (logits, logits.amax(1, keepdim=True), None),
            lambda logits, state: (logits, logits.amax(), None),
            lambda logits, state: (logits.argmax(1), logits.amax(1), None),
        ],
    )
    def test_answers_and_scores_of_another_shape_are_refused(self, monkeypatch, stored, made):
        monkeypatch.setitem(CRITERIA, "odd", made)
        policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.5,) * 3, criterion="odd")
        message = refusal(replay, stored, policy)
        answer, score, _ = made(torch.zeros(2048, 4), None)
        assert "odd" in message and str(tuple(answer.shape)) in message
        assert str(tuple(score.shape)) in message

    @pytest.mark.parametrize("criterion", ["logit_energy", "votes"])
    def test_live_equals_replay(self, exact_net, exact_images, exact_stored, criterion):
        early = Policy(
            exit_names=exact_net.exit_names, thresholds=(2.0, 2.0, 2.0), criterion=criterion
        )
        scores = score_record(exact_stored, early).scores[:, :3]
        if criterion == "logit_energy":
            # halfway between two images: none lies within float32's rounding of it
            low, high = np.sort(scores, axis=0)[300:302]
            assert (high - low > 100 * torch.finfo(torch.float32).eps * high).all()
            early = dataclasses.replace(early, thresholds=tuple(((low + high) / 2).tolist()))
        answers, replayed = infer(exact_net, exact_images, early), replay(exact_stored, early)
        assert len({*replayed.exit_index}) > 1
        assert (answers.exit_index.numpy() == replayed.exit_index).all()

    def test_a_state_that_is_not_declared_is_refused(self, monkeypatch, stored):
        monkeypatch.setitem(CRITERIA, "silent", lambda logits, state=None: votes(logits, state))
        policy = Policy(
            exit_names=stored.info.exit_names, thresholds=(2.0,) * 3, criterion="silent"
        )
        message = refusal(replay, stored, policy)
        assert "silent" in message and "keeps_state=True" in message

    @pytest.mark.parametrize("criterion", ["patience", "votes"])
    @pytest.mark.parametrize(("goal", "value"), [(Budget, 0.8), (MaxDrop, 0.02)])
    def test_no_exit_is_disabled_under_one_that_keeps_a_state(self, stored, criterion, goal, value):
        """With fewer exits the scores would not be those that thresholds were chosen from."""
        cost = dataclasses.replace(
            stored.cost, stage_macs=(100, 100, 100, 100), head_macs=(1, 90, 1, 0)
        )
        assert not all(choose(stored, goal(value), cost).enabled)  # the test can fail
        policy = choose(stored, goal(value, criterion=criterion), cost)
        assert all(policy.enabled)
        outcome = apply_policy(policy, stored, cost)
        if goal is Budget:
            assert outcome.point.macs_share <= 0.8 + 1e-9
        else:
            assert outcome.point.accuracy >= outcome.final_accuracy - 0.02 - 1e-9

    def test_it_reaches_evaluation_and_classifier(self, run_copy):
        quick_report(run_copy, goal=MaxDrop(0.05, criterion="logit_energy"), name="mine")
        assert load(run_copy, "mine", task=TASK, device="cpu").policy.criterion == "logit_energy"

    def test_an_unknown_one_is_refused_with_the_known_ones_named(self):
        message = refusal(Budget, 0.5, criterion="vote")
        assert "'vote'" in message and "votes" in message


def test_a_tasks_module_may_bring_the_criterion(run_copy, monkeypatch, tmp_path):
    monkeypatch.setitem(CRITERIA, "brought", logit_energy)
    task = dataclasses.replace(TASK, name="brings_a_criterion:TASK")
    quick_report(run_copy, task, MaxDrop(0.05, criterion="brought"), name="mine")
    del CRITERIA["brought"]
    (tmp_path / "brings_a_criterion.py").write_text(
        "from early_exit.inference.criteria import CRITERIA\nfrom helpers import TASK\n"
        "CRITERIA['brought'] = lambda logits, state: (logits, logits.logsumexp(dim=-1), None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        # the report names the module, which is not imported for that
        message = refusal(load, run_copy, "mine", device="cpu")
        assert "brings_a_criterion:TASK" in message and "--task" in message
        assert "brings_a_criterion" not in sys.modules
        classify = load(run_copy, "mine", task="brings_a_criterion:TASK", device="cpu")
        assert classify.policy.criterion == "brought"
    finally:
        sys.modules.pop("brings_a_criterion", None)
        CRITERIA.pop("brought", None)
