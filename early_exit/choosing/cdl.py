"""Conditional Deep Learning (Panda, Sengupta, Roy, arXiv:1509.08971): which stages are admitted.

Every block of a trained, frozen network is followed by a linear classifier, which is a candidate
for an exit. The candidates are considered in order, on val. A candidate is admitted if its gain
exceeds epsilon: the multiply-adds saved for the images that exit there, minus those of the
classifier for all images that reach it. Only images that do not exit at an admitted stage reach the
next candidate. At test time an image exits at the first admitted stage whose confidence is at least
delta.

The paper's full text was not available, so this follows its abstract and summaries:

- Confident means that exactly one class's output exceeds delta. The outputs here are probabilities,
  so for a delta of at least 0.5 no two classes can exceed it, and the rule is that of the criterion
  `max_prob`.
- An image that exits is spared the rest of the plain network, whichever later stages are admitted.
- Every classifier is trained on all images of train, not only on those that reach it. On a frozen
  backbone the classifiers are then independent of each other, so training them at once gives the
  same as training them one after the other.
- Stages are admitted on val, which no weight has seen, and not on train.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.choosing.record import Scores
from early_exit.model.cost import Cost


@dataclass(frozen=True)
class Candidate:
    """A stage that was considered on val. MACs are means over all images of val."""

    name: str
    reached: float
    """Share of val that reaches it, after the stages admitted before."""
    stopped: float
    """Share of val that exits here, or would if it were admitted."""
    saved: float
    """MACs that the images which exit here are spared."""
    spent: float
    """MACs of its classifier for all images that reach it."""
    admitted: bool

    @property
    def gain(self) -> float:
        """MACs saved by admitting it."""
        return self.saved - self.spent


def admit(scored: Scores, cost: Cost, delta: float, epsilon: float) -> tuple[Candidate, ...]:
    """Considers every early exit in order.

    scored: of val, by `max_prob`, with every exit enabled; delta: the confidence at which an image
    exits, in [0.5, 1), as `early_exit.choosing.goals.ConditionalDeepLearning` checks; epsilon: a
    gain must exceed this fraction of the plain network's MACs.
    """
    remaining = np.ones(len(scored.targets), bool)
    candidates, macs_so_far = [], 0
    for index, name in enumerate(cost.exit_names[:-1]):
        macs_so_far += cost.stage_macs[index]
        exits = remaining & (scored.scores[:, index] >= delta)
        reached, stopped = float(remaining.mean()), float(exits.mean())
        saved = stopped * (cost.plain_macs - macs_so_far)
        spent = reached * cost.head_macs[index]
        admitted = saved - spent > epsilon * cost.plain_macs
        candidates.append(Candidate(name, reached, stopped, saved, spent, admitted))
        if admitted:
            remaining &= ~exits
    return tuple(candidates)


def enabled(candidates: Sequence[Candidate]) -> tuple[bool, ...]:
    """Which early exits are enabled: the admitted stages."""
    return tuple(candidate.admitted for candidate in candidates)
