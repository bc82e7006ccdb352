"""Overthinking (Kaya, Hong, Dumitras, "Shallow-Deep Networks", ICML 2019), on any exit record.

An image is overthought if an early exit answers it correctly: wasteful if the final exit does too,
so that the later stages added nothing, and destructive if the final exit is wrong. The confusion
score says how much the exits disagree with the final one.
"""

from dataclasses import dataclass

import numpy as np
import torch

from early_exit.choosing.record import ExitRecord
from early_exit.metrics import auroc


@dataclass(frozen=True)
class Overthinking:
    """What a record shows with all exits enabled; shares are of all images."""

    wasteful: float
    """Right at an early exit and at the final one."""
    destructive: float
    """Right at an early exit and wrong at the final one."""
    wrong: float
    """Wrong at the final exit."""
    confusion_right: float | None
    """Mean confusion of the images that the final exit answers correctly."""
    confusion_wrong: float | None
    """Mean confusion of the other images."""
    confusion_auroc: float | None
    """AUROC of confusion for "the final exit is wrong"."""
    doubt_auroc: float | None
    """AUROC of the final exit's own doubt, one minus its largest probability, for the same."""


def correct_answers(record: ExitRecord) -> np.ndarray:
    """Whether each exit on its own answers each image correctly, (images, exits) bool."""
    correct = np.empty((len(record), record.logits.shape[1]), bool)
    for rows, logits in record.chunks():
        target = torch.from_numpy(record.targets[rows])
        correct[rows] = (logits.argmax(dim=-1) == target[:, None]).numpy()
    return correct


def disagreement(record: ExitRecord) -> np.ndarray:
    """The sum over the early exits of the L1 distance between the probabilities of that exit and
    of the final one, (images,)."""
    total = np.empty(len(record), np.float32)
    for rows, logits in record.chunks():
        probs = logits.softmax(dim=-1)
        total[rows] = (probs[:, :-1] - probs[:, -1:]).abs().sum(dim=(1, 2)).numpy()
    return total


def confusion(test: ExitRecord, val: ExitRecord) -> np.ndarray:
    """The confusion score of every test image, (images,): its disagreement, in standard deviations
    from the mean of val. (Section 5.2 of the paper uses the training set.)"""
    reference = disagreement(val)
    return (disagreement(test) - reference.mean()) / max(float(reference.std()), 1e-12)


def analyse(test: ExitRecord, correct: np.ndarray, confused: np.ndarray) -> Overthinking:
    """The shares on test, and how well confusion warns of a wrong final answer.

    correct: its `correct_answers`; confused: its `confusion`.
    """
    early, final = correct[:, :-1].any(axis=1), correct[:, -1]
    doubt = np.empty(len(test), np.float32)
    for rows, logits in test.chunks():
        doubt[rows] = 1 - logits[:, -1].softmax(dim=-1).amax(dim=-1).numpy()
    return Overthinking(
        wasteful=float((early & final).mean()),
        destructive=float((early & ~final).mean()),
        wrong=float((~final).mean()),
        confusion_right=float(confused[final].mean()) if final.any() else None,
        confusion_wrong=float(confused[~final].mean()) if not final.all() else None,
        confusion_auroc=auroc(confused, ~final),
        doubt_auroc=auroc(doubt, ~final),
    )
