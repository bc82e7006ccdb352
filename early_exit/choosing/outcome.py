"""A policy applied to a record: where each image exits, how accurate that is and what it costs."""

from dataclasses import dataclass

import numpy as np

from early_exit.choosing.record import ExitRecord, Scores, score_record
from early_exit.inference.criteria import get_traits
from early_exit.inference.policy import Policy
from early_exit.model.cost import Cost

ROUNDING = 1e-5  # of float32; live inference may decide otherwise if a decision is this close
MOST_ROUNDING = {"off": 1e-3, "f32": 1e-3, "fp16": 1e-2, "bf16": 0.1, "int8": 0.1}
"""By a record's precision: how far live inference may be off at most, as a share of the largest
score or logit, to be called rounding. Otherwise a wrong temperature, or rows out of order, would
explain itself: all images would be far off."""


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
        """The accuracy of the criterion's answers at the final exit, if all images exited there."""
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


@dataclass(frozen=True)
class Live:
    """What inference with exits taken gave; each field: (images,).

    answers: the classes; score: of the exit that was taken; best: the highest value of the answer
    there, of most criteria a logit divided by the temperature.
    """

    answers: np.ndarray
    exit_index: np.ndarray
    score: np.ndarray
    best: np.ndarray


@dataclass(frozen=True)
class Disagreements:
    """Live inference compared with the policy applied to the record.

    differs, unexplained: (images,) masks of the images whose answer or exit differs, and of those
    that rounding does not explain; rounding: how far scores may differ, which depends on the
    precision.
    """

    differs: np.ndarray
    unexplained: np.ndarray
    rounding: float


def disagreements(record: ExitRecord, policy: Policy, live: Live) -> Disagreements:
    """Compares live inference with the policy applied to the record.

    Rounding explains a difference if, at an exit that the image reached, the score is as close to
    the threshold, or the two best classes of the answer to each other, as live inference and the
    record differ on the images on which they agree, or as `ROUNDING`; up to `MOST_ROUNDING`.
    """
    outcome = apply_policy(policy, record, record.cost)
    differs = (outcome.answers != live.answers) | (outcome.exit_index != live.exit_index)
    best, ahead = _best_values(record, policy)
    most = MOST_ROUNDING[record.info.precision]
    score_rounding, answer_rounding = _rounding(outcome, best, live, ~differs, most)
    unexplained = np.zeros_like(differs)
    for image in np.flatnonzero(differs).tolist():
        last = max(outcome.exit_index[image], live.exit_index[image])
        reached = [index for index in range(last + 1) if policy.is_enabled(index)]
        near_threshold = [
            gap <= score_rounding
            for gap in _threshold_gaps(outcome.scored.scores[image], policy, reached)
        ]
        near_tie = ahead[image, reached] <= answer_rounding
        unexplained[image] = not any([*near_threshold, *near_tie])
    return Disagreements(differs, unexplained, score_rounding)


def _rounding(
    outcome: Outcome, best: np.ndarray, live: Live, same: np.ndarray, most: float
) -> tuple[float, float]:
    """How far scores, and differences of two values of an answer, of live inference and the record
    may differ: twice as far as they do on the images (images,) on which both agree, and `ROUNDING`
    at least.

    best: (images, exits), of the answers; most: a value of `MOST_ROUNDING`.
    """
    images = np.flatnonzero(same)
    exits = outcome.exit_index[images]
    counts = get_traits(outcome.policy.criterion).counts  # exact, or changed by a tie of classes
    scores = outcome.scored.scores[images, exits] * (not counts)
    answers = best[images, exits]
    return (
        _tolerance(scores, live.score[images] * (not counts), 2, most),
        _tolerance(answers, live.best[images], 4, most),
    )


def _tolerance(recorded: np.ndarray, live: np.ndarray, times: int, most: float) -> float:
    """`times` the largest difference of two arrays, at least `ROUNDING`, and at most the share
    `most` of the largest value, or of 1."""
    difference = float(np.abs(recorded - live).max(initial=0.0))
    limit = most * float(np.abs(recorded).max(initial=1.0))
    return max(ROUNDING, min(times * difference, limit))


def _threshold_gaps(scores: np.ndarray, policy: Policy, reached: list[int]) -> list[float]:
    """The distances of an image's scores (exits,) from the thresholds of the early exits reached;
    none if scores are counts, which are exact."""
    if get_traits(policy.criterion).counts:
        return []
    early = [index for index in reached if index < policy.num_exits - 1]
    return [abs(scores[index] - policy.thresholds[index]) for index in early]


def _best_values(record: ExitRecord, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """The highest value of each exit's answer, and how far it is above the second, (images, exits)
    each; 0 at a disabled exit."""
    best, ahead = np.zeros((2, len(record), policy.num_exits), np.float32)
    for rows, logits in record.chunks():
        state = None
        for index in range(policy.num_exits):
            if policy.is_enabled(index):
                answer, _, state = policy.score(index, logits[:, index], state)
                highest, second = answer.topk(2, dim=-1).values.unbind(dim=-1)
                best[rows, index] = highest.numpy()
                ahead[rows, index] = (highest - second).numpy()
    return best, ahead
