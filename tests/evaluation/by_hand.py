"""Evaluations of tiny runs, and their numbers worked out image after image, in plain Python."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from helpers import CPU, few_digits, tiny_network, tiny_run

from cifar10 import data
from early_exit.choosing.goals import (
    Budget,
    ConditionalDeepLearning,
    FixedThresholds,
    Goal,
    MaxDrop,
    Risk,
)
from early_exit.config import DataConfig, OptimConfig
from early_exit.evaluation.evaluate import evaluate
from early_exit.task import Task

NAMES = ("layer1", "layer2", "final")


# Of a logit in float32, relative to the largest: some thousand products on a path from the image
ROUNDING = 3000 * np.finfo(np.float32).eps


CLOSE = 1e-6  # a threshold is a float32 score, some epsilons away from the same score in float64


def some_digits(settings: DataConfig) -> data.Data:
    """320 train, 100 val and 120 test images."""
    return few_digits(settings.split_seed, 320, 100, 120)


TASK = Task(tiny_network, some_digits)


def train_run(directory: Path, split_seed: int = 0, epochs: int = 8, **settings) -> Path:
    """A run of `TASK` in `directory`. settings: exits, backbone, regime."""
    optim = OptimConfig(epochs=epochs, batch_size=16, lr=0.05, schedule="cosine")
    return tiny_run(directory, TASK, optim, split_seed, **settings)


def made_logits(targets: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Logits of three exits, (images, 3, 10), the same on every machine: noise of which the exits
    share a part, and the later the exit and the easier the image, the more of the target."""
    generator, rows = np.random.default_rng(seed), np.arange(len(targets))
    shared, own = (
        generator.integers(-1000, 1001, (len(targets), exits, 10)) / 1000 for exits in (1, 3)
    )
    ease = generator.integers(0, 1001, len(targets)) / 1000
    logits = 2 * shared + 2 * own
    for index, strength in enumerate((4.0, 6.0, 8.0)):
        logits[rows, index, targets] += strength * ease
    return logits.astype(np.float32)


def quickly(directory: Path, goal: Goal, **options) -> tuple[dict, dict]:
    """The report and the policy of an evaluation without timing and plots, as written."""
    options = {"overrides": CPU, "live": False, "draw": False, **options}
    _, written = evaluate(directory, TASK, goal, **options)
    report = json.loads((written / "report.json").read_text())
    return report, yaml.safe_load((written / "policy.yaml").read_text())


def stored(directory: Path, split: str) -> tuple[list, list]:
    """Logits (images, exits, classes) and targets of a record, as lists."""
    where = directory / "records" / f"{split}-off"
    return np.load(where / "logits.npy").tolist(), np.load(where / "targets.npy").tolist()


def probabilities(logits: list[float], temperature: float) -> list[float]:
    """Softmax of one image's logits at one exit."""
    powers = [math.exp((value - max(logits)) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def slow_scores(exits: list[list[float]], criterion: str, temperatures: list[float]) -> list[float]:
    """The score of one image at each exit."""
    scores, answers = [], []
    for logits, temperature in zip(exits, temperatures, strict=True):
        probs = probabilities(logits, temperature)
        ranked = sorted(probs, reverse=True)
        answers.append(logits.index(max(logits)))
        if criterion == "max_prob":
            scores.append(ranked[0])
        elif criterion == "margin":
            scores.append(ranked[0] - ranked[1])
        elif criterion == "entropy":
            scores.append(sum(p * math.log(p) for p in probs if p > 0))
        else:
            agree = 0
            while agree + 1 < len(answers) and answers[-1] == answers[-2 - agree]:
                agree += 1
            scores.append(agree)
    return scores


def slow_exit(
    scores: list[float], thresholds: list[float], enabled: Sequence[bool] = (True, True)
) -> int:
    """The exit that one image takes."""
    for index, threshold in enumerate(thresholds):
        if enabled[index] and scores[index] >= threshold - CLOSE:
            return index
    return len(thresholds)


# 16x16 images, one block a stage of widths 16, 32, 64; heads: a 3x3 convolution of stride 2
STEM_AND_LAYER1 = 3 * 16 * 9 * 16**2 + 2 * 16 * 16 * 9 * 16**2


LAYER2 = 16 * 32 * 9 * 8**2 + 32 * 32 * 9 * 8**2


LAYER3 = 32 * 64 * 9 * 4**2 + 64 * 64 * 9 * 4**2 + 64 * 10


HEADS = (16 * 16 * 9 * 8**2 + 16 * 10, 32 * 32 * 9 * 4**2 + 32 * 10)


PLAIN = STEM_AND_LAYER1 + LAYER2 + LAYER3


MACS = (STEM_AND_LAYER1 + HEADS[0], STEM_AND_LAYER1 + LAYER2 + sum(HEADS), PLAIN + sum(HEADS))


def macs_with(enabled: Sequence[bool]) -> list[int]:
    """What an image costs that exits at each exit, without the heads of the disabled exits."""
    unused = [0 if is_enabled else head for head, is_enabled in zip(HEADS, enabled, strict=True)]
    return [whole - sum(unused[: index + 1]) for index, whole in enumerate(MACS)]


def slow_outcome(directory: Path, split: str, policy: dict) -> dict:
    """Accuracy and mean share of MACs; of every image its exit, and whether it is correct."""
    exit_index, correct = [], []
    for exits, target in zip(*stored(directory, split), strict=True):
        scores = slow_scores(exits, policy["criterion"], policy["temperatures"])
        index = slow_exit(scores, policy["thresholds"], policy["enabled"])
        exit_index.append(index)
        correct.append(exits[index].index(max(exits[index])) == target)
    macs = macs_with(policy["enabled"])
    return {
        "exit_index": exit_index,
        "correct": correct,
        "accuracy": sum(correct) / len(correct),
        "macs_share": sum(macs[index] for index in exit_index) / len(exit_index) / PLAIN,
    }


GOALS = {
    "drop 0": MaxDrop(0.0),
    "drop 5": MaxDrop(0.05),
    "budget 70": Budget(0.7),
    "one threshold": FixedThresholds((0.6,)),
    "a threshold each": FixedThresholds((0.9, 0.3)),
    "uncalibrated": MaxDrop(0.02, calibrate=False),
    "entropy": MaxDrop(0.02, criterion="entropy"),
    "margin": Budget(0.8, criterion="margin"),
    "patience": FixedThresholds((1,), criterion="patience"),
    "a guarantee": Risk(0.15, confidence=0.9),
    "delta": ConditionalDeepLearning(0.6),
    "delta, and a gain to exceed": ConditionalDeepLearning(0.6, epsilon=0.3),
}
