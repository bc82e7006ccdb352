"""Conditional Deep Learning (Panda, Sengupta, Roy, arXiv:1509.08971): which stages are admitted.

A linear classifier after every block of a trained, frozen network is a candidate. From the first to
the last, each is asked about on val: of the images that reach it, how many would it stop? It is
admitted if its gain exceeds epsilon: the operations that those it stops are spared, less those of
the classifier itself for all that reach it. Only images that an admitted stage does not stop go on
to the next candidate. At test an image stops at the first admitted stage that is confident beyond
delta.

The paper's text was not at hand, so this is a reading of its abstract and of summaries:

- Confident means that exactly one class's output exceeds delta. Our outputs are probabilities, so
  for a delta of at least 0.5 no two classes can, and the rule is that of the criterion `max_prob`.
- What an image is spared is the rest of the plain network, whatever is admitted further up.
- Every classifier is trained on all images of train, not on those that reach it. On a frozen
  backbone they are then independent of each other, and training them at once is training them one
  after the other.
- Stages are admitted on val, which no weight has seen, and not on train.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from early_exit.cost import Cost
from early_exit.errors import UserError
from early_exit.records import Scores


@dataclass(frozen=True)
class Candidate:
    """A stage that was asked about on val. MACs are means over all images of val."""

    name: str
    reached: float
    """Share of val that got here, past the stages admitted before."""
    stopped: float
    """Share of val that it stops, or would."""
    saved: float
    """MACs that those it stops are spared."""
    spent: float
    """MACs of its classifier for all that reach it."""
    admitted: bool

    @property
    def gain(self) -> float:
        """MACs that admitting it saves."""
        return self.saved - self.spent


def admit(scored: Scores, cost: Cost, delta: float, epsilon: float) -> tuple[Candidate, ...]:
    """Asks every early exit in turn.

    scored: of val, by `max_prob`, with every exit on; delta: in [0.5, 1), the confidence at which
    an image stops; epsilon: what a gain must exceed, as a fraction of the plain network's MACs.
    """
    if not 0.5 <= delta < 1:
        raise UserError(f"delta is a probability from 0.5 to below 1, got {delta:g}")
    left = np.ones(len(scored.targets), bool)
    candidates, before = [], 0
    for index, name in enumerate(cost.exit_names[:-1]):
        before += cost.stage_macs[index]
        stops = left & (scored.scores[:, index] >= delta)
        saved = float(stops.mean()) * (cost.plain_macs - before)
        spent = float(left.mean()) * cost.head_macs[index]
        admitted = saved - spent > epsilon * cost.plain_macs
        candidates.append(
            Candidate(name, float(left.mean()), float(stops.mean()), saved, spent, admitted)
        )
        if admitted:
            left &= ~stops
    return tuple(candidates)


def enabled(candidates: Sequence[Candidate]) -> tuple[bool, ...]:
    """Which exits are on."""
    return tuple(candidate.admitted for candidate in candidates)
