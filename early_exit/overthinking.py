"""Overthinking (Kaya, Hong, Dumitras, "Shallow-Deep Networks", ICML 2019), on any exit record.

An image is overthought if an early exit answers it rightly: wasteful if the final exit does too, so
that the rest was for nothing, and destructive if the final exit is wrong. The confusion score says
how much the exits disagree with the final one.
"""

from dataclasses import dataclass

import numpy as np
import torch

from early_exit.metrics import auroc
from early_exit.records import ExitRecord


@dataclass(frozen=True)
class Overthinking:
    """What a record shows, all exits on; shares are of all images."""

    wasteful: float
    """Right at an early exit, and at the end."""
    destructive: float
    """Right at an early exit, and wrong at the end."""
    wrong: float
    """Wrong at the end."""
    confusion_right: float | None
    """Mean confusion of the images that the final exit answers rightly."""
    confusion_wrong: float | None
    """Of the others."""
    confusion_auroc: float | None
    """How often an image that is wrong at the end is more confused than one that is right."""
    doubt_auroc: float | None
    """The same of the final exit's own doubt: one minus its largest probability."""


def right_answers(record: ExitRecord) -> np.ndarray:
    """Whether each exit on its own answers each image rightly, (images, exits) bool."""
    right = np.empty((len(record), record.logits.shape[1]), bool)
    for rows, logits in record.chunks():
        target = torch.from_numpy(record.targets[rows])
        right[rows] = (logits.argmax(dim=-1) == target[:, None]).numpy()
    return right


def disagreement(record: ExitRecord) -> np.ndarray:
    """The sum over the early exits of the L1 distance between the probabilities of that exit and
    of the final one, (images,)."""
    total = np.empty(len(record), np.float32)
    for rows, logits in record.chunks():
        probs = logits.softmax(dim=-1)
        total[rows] = (probs[:, :-1] - probs[:, -1:]).abs().sum(dim=(1, 2)).numpy()
    return total


def confusion(test: ExitRecord, val: ExitRecord) -> np.ndarray:
    """The confusion score of every image of test: its disagreement, in deviations from the mean of
    val (section 5.2 of the paper takes mean and deviation from the training set)."""
    known = disagreement(val)
    return (disagreement(test) - known.mean()) / max(float(known.std()), 1e-12)


def analyse(test: ExitRecord, right: np.ndarray, confused: np.ndarray) -> Overthinking:
    """The shares and how well confusion warns. right: `right_answers` of test; confused: (images,),
    its `confusion`."""
    early, final = right[:, :-1].any(axis=1), right[:, -1]
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
