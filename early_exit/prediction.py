"""What classifying an image gives, and what every classifier of images does. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from PIL.Image import Image

from early_exit.data.decoding import ImageSource
from early_exit.errors import UserError
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


@dataclass(frozen=True)
class ImageClassifier:
    """What `early_exit.load` gives: a run's network or a deployed model, and its policy."""

    classes: tuple[str, ...]
    """The names of the classes, in the order of the logits."""
    policy: Policy
    """Which image exits where."""
    cost: Cost
    """Of every stage and head."""

    def __call__(self, images: Sequence[ImageSource], batch_size: int = 64) -> list[Prediction]:
        """The predictions, in the order of the images.

        batch_size: images per forward pass. Raises UserError for a file that cannot be read as an
        image, for one image instead of a sequence, and for a batch size below 1.
        """
        if isinstance(images, (str, bytes, PathLike, Image)):
            raise UserError(
                f"expected a sequence of images, got one {type(images).__name__}; put it in a list"
            )
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            batch = [self.read(image) for image in images[start : start + batch_size]]
            predictions += self.predict(batch)
        return predictions

    def read(self, image: ImageSource) -> np.ndarray:
        """One image as the network takes it, (C, H, W) uint8: decoded, cropped and resized as in an
        evaluation.

        Raises UserError for a file that cannot be read as an image.
        """
        raise NotImplementedError

    def predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """The predictions for what `read` gave."""
        raise NotImplementedError

    def predictions(
        self, classes: Sequence[int], confidence: Sequence[float], exit_index: Sequence[int]
    ) -> list[Prediction]:
        """The predictions for a batch, from the class answered, its probability and the exit taken,
        one of each per image."""
        policy, cost = self.policy, self.cost
        macs, shares = cost.cumulative(policy.enabled), cost.shares(policy.enabled)
        return [
            Prediction(
                self.classes[class_index],
                class_index,
                sure,
                policy.exit_names[index],
                index,
                macs[index],
                shares[index],
            )
            for class_index, sure, index in zip(classes, confidence, exit_index, strict=True)
        ]


def check_bytes(images: Any, shape: tuple[int, ...]) -> None:
    """Raises UserError unless `images` is an array or tensor (B, *shape) uint8, B at least 1."""
    kind = str(images.dtype).removeprefix("torch.")
    if kind != "uint8" or tuple(images.shape[1:]) != shape or not len(images):
        raise UserError(
            f"the images are {kind} {tuple(images.shape)}; expected uint8 of (B,"
            f" {', '.join(map(str, shape))}), B at least 1"
        )
