"""A policy applied to a record: where each image exits, how accurate that is and what it costs."""

from dataclasses import dataclass

import numpy as np

from early_exit.choosing.record import ExitRecord, Scores, score_record
from early_exit.inference.policy import Policy
from early_exit.model.cost import Cost


@dataclass(frozen=True)
class Point:
    """Accuracy and mean cost of a policy on a sample."""

    accuracy: float
    macs_share: float
    """Of the plain network's multiply-adds."""


@dataclass(frozen=True)
class Outcome:
    """A policy applied to a record.

    exit_index: (images,) the exit each image takes.
    """

    scored: Scores
    policy: Policy
    cost: Cost
    exit_index: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """The class answered, (images,)."""
        return self.scored.answers[np.arange(len(self.exit_index)), self.exit_index]

    @property
    def correct(self) -> np.ndarray:
        """Whether each answer is correct, (images,) bool."""
        return self.answers == self.scored.targets

    @property
    def point(self) -> Point:
        """Accuracy and mean cost."""
        shares = np.asarray(self.cost.shares(self.policy.enabled))
        return Point(float(self.correct.mean()), float(shares[self.exit_index].mean()))

    @property
    def exit_shares(self) -> tuple[float, ...]:
        """The share of the images that exit at each exit."""
        counts = np.bincount(self.exit_index, minlength=self.policy.num_exits)
        return tuple((counts / len(self.exit_index)).tolist())

    @property
    def final_accuracy(self) -> float:
        """The accuracy of the final exit alone."""
        return float(self.scored.correct[:, -1].mean())

    @property
    def random_exit_accuracy(self) -> float:
        """The random-exit baseline: the expected accuracy if as many images exit at each exit, but
        chosen at random."""
        return float(np.asarray(self.exit_shares) @ self.scored.correct.mean(axis=0))


def apply_policy(policy: Policy, record: ExitRecord, cost: Cost) -> Outcome:
    """Applies a policy to a record. Raises UserError for a policy of other exits."""
    return outcome_of(score_record(record, policy), policy, cost)


def outcome_of(scored: Scores, policy: Policy, cost: Cost) -> Outcome:
    """The outcome for scores that were made with the policy's criterion, temperatures and enabled
    exits; its thresholds may differ from those."""
    return Outcome(scored, policy, cost, scored.exit_index(policy))
