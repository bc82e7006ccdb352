"""What classifying an image gives, and what every classifier of images does. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from early_exit.data.decoding import ImageSource
from early_exit.inference.policy import Policy
from early_exit.model.macs import Cost


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    name: str
    """Of the class."""
    class_index: int
    confidence: float
    """Probability of that class at the exit that answered, after temperature scaling."""
    exit: str
    exit_index: int
    macs: int
    """Multiply-adds computed for the image."""
    macs_share: float
    """Of the plain network's; over 1 at the final exit, because the heads are included."""


class ImageClassifier(Protocol):
    """What `early_exit.load` gives: a run's network or a deployed model, and its policy."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""

    @property
    def policy(self) -> Policy:
        """Which image exits where."""

    @property
    def cost(self) -> Cost:
        """Of every stage and head."""

    def read(self, image: ImageSource) -> np.ndarray:
        """One image as the network takes it, (C, H, W) uint8."""

    def predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """The predictions for what `read` gave."""


def classify(
    classifier: ImageClassifier, images: Sequence[ImageSource], batch_size: int
) -> list[Prediction]:
    """The predictions, in the order of the images.

    Raises UserError for a file that cannot be read as an image.
    """
    predictions: list[Prediction] = []
    for start in range(0, len(images), batch_size):
        batch = [classifier.read(image) for image in images[start : start + batch_size]]
        predictions += classifier.predict(batch)
    return predictions


def make_predictions(
    classifier: ImageClassifier,
    class_indices: Sequence[int],
    confidence: Sequence[float],
    exit_indices: Sequence[int],
) -> list[Prediction]:
    """The predictions for a batch, from the class answered, its probability and the exit taken,
    one of each per image."""
    policy, cost = classifier.policy, classifier.cost
    macs, shares = cost.cumulative(policy.enabled), cost.shares(policy.enabled)
    return [
        Prediction(
            classifier.classes[class_index],
            class_index,
            sure,
            policy.exit_names[exit_index],
            exit_index,
            macs[exit_index],
            shares[exit_index],
        )
        for class_index, sure, exit_index in zip(
            class_indices, confidence, exit_indices, strict=True
        )
    ]
