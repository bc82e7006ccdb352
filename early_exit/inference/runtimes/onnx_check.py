"""Whether exported segments compute what the network does.

Logits of the same images by torch and by the exported files differ by rounding only. A logit is the
end of a chain of sums; of n terms each is off by at most n epsilon relative to the largest number
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The tolerance is therefore

    epsilon of float32 x the terms along one path to the exit x the exit's largest logit

where a layer has as many terms as weights per output, and each module a few for what it computes
element by element. Scores are compared on the same logits, so only the criterion's own rounding is
between them: they agree in half of float32's digits, also for a criterion that cancels.

Segments are traced with a few rows and run with any number, down to a single one, so all exits are
compared on all images, on seven and on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.inference.infer import Array, RunSegment, infer, run_segments
from early_exit.inference.policy import Policy
from early_exit.inference.segments import segments_of
from early_exit.model.features import Features
from early_exit.model.network import MultiExitNetwork

EPSILON = float(np.finfo(np.float32).eps)
ELEMENTWISE = 4  # operations of a module on each element, such as those of BatchNorm
ROOT_EPSILON = EPSILON**0.5
FEW = (1, 7)  # images with which the exits are compared too


@dataclass(frozen=True)
class Agreement:
    """What a comparison found; logits relative to the largest of their exit."""

    images: int
    largest_difference: float
    """Of logits, over all exits."""
    tolerance: float
    """At the exit of the largest difference."""
    other_exits: int
    """Images that took another exit, because a score is within rounding of its threshold."""


@dataclass(frozen=True)
class _Exit:
    """An exit on all images, none of which exited before: logits (B, K), scores (B,)."""

    expected: np.ndarray
    found: np.ndarray
    expected_score: np.ndarray
    found_score: np.ndarray
    own_score: np.ndarray
    """Torch's criterion on the logits that the files give."""


def check_segments(
    network: MultiExitNetwork,
    policy: Policy,
    segments: Sequence[tuple[int, RunSegment]],
    normalised: Tensor,
    images: Array,
) -> Agreement:
    """Compares exported segments with the network's own, on the CPU in float32.

    segments: each with the exit it ends at. normalised: images as the network takes them; images:
    the same as the first exported segment takes them. The exits taken are compared for the policy
    and for the medians of the scores as thresholds, with which images exit everywhere.

    Raises UserError if a segment fails, or if logits, scores or exits differ by more than rounding.
    """
    exits, *few = (
        _all_exits(network, policy, segments, normalised[:rows], images[:rows])
        for rows in (len(images), *FEW)
    )
    largest, tolerance = 0.0, 0.0
    for place, (index, _) in enumerate(segments):
        allowed = EPSILON * work(network, index)
        scale = float(np.abs(exits[place].expected).max()) or 1.0
        for values in (exits[place], *(part[place] for part in few)):
            difference = _compare(values, policy, index, scale, allowed)
            if difference >= largest:
                largest, tolerance = difference, allowed
    medians = [float(np.median(values.expected_score)) for values in exits]
    at_medians = list(policy.thresholds)
    for (index, _), median in list(zip(segments, medians, strict=True))[:-1]:
        at_medians[index] = median
    other = 0
    for tried in (replace(policy, thresholds=tuple(at_medians), guarantee=None), policy):
        other = _count_other_exits(network, tried, segments, normalised, images, exits)
    return Agreement(len(images), largest, tolerance, other)


def _compare(values: _Exit, policy: Policy, index: int, scale: float, allowed: float) -> float:
    """The largest difference of an exit's logits, relative to `scale`.

    Raises UserError if it is more than allowed, or if the scores differ.
    """
    where = f"at {policy.exit_names[index]} with {_images(len(values.expected))}"
    difference = float(np.abs(values.found - values.expected).max()) / scale
    if not difference <= allowed:  # nor if it is nan
        raise UserError(
            f"the exported segments differ from torch: the logits {where} by {difference:.1e} of"
            f" the largest one, more than rounding allows ({allowed:.1e})"
        )
    scores = np.abs(values.found_score - values.own_score)
    if not (scores <= ROOT_EPSILON * np.maximum(1, np.abs(values.own_score))).all():
        raise UserError(
            f"the exported segments differ from torch: the scores of {policy.criterion} {where} by"
            f" {scores.max():.1e} on the same logits"
        )
    return difference


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def work(network: MultiExitNetwork, last: int) -> int:
    """The terms along one path from an image to the exit at stage `last`."""
    parts: list[nn.Module] = [stage.body for stage in network.stages[: last + 1]]
    head = network.stages[last].head
    modules = [module for part in [*parts, *([head] if head else [])] for module in part.modules()]
    weights = (
        weight[0].numel()
        for module in modules
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1
    )
    return sum(weights) + ELEMENTWISE * len(modules)


def _all_exits(
    network: MultiExitNetwork,
    policy: Policy,
    segments: Sequence[tuple[int, RunSegment]],
    normalised: Tensor,
    images: Array,
) -> list[_Exit]:
    """Every enabled exit on all images, by torch and by the exported segments.

    Raises UserError if an exported segment fails or gives another number of rows.
    """
    features: Features = normalised
    exported_features: Any = images
    state, exported_state, own_state, values = None, None, None, []
    with torch.no_grad():
        for (index, segment), (_, exported) in zip(
            segments_of(network, policy), segments, strict=True
        ):
            temperature = policy.temperatures[index]
            features, logits, _, score, state = segment(features, temperature, state)
            try:
                exported_features, found, _, found_score, exported_state = exported(
                    exported_features, temperature, exported_state
                )
                if found.shape != logits.shape:
                    raise ValueError(f"logits {found.shape}, expected {tuple(logits.shape)}")
            except Exception as error:  # the packages have error types of their own
                reason = " ".join(str(error).split())
                raise UserError(
                    f"the exported segment of {policy.exit_names[index]} fails with"
                    f" {_images(len(images))} ({reason[:300]})"
                ) from error
            _, own_score, own_state = policy.score(index, torch.from_numpy(found), own_state)
            values.append(
                _Exit(logits.numpy(), found, score.numpy(), found_score, own_score.numpy())
            )
    return values


def _count_other_exits(
    network: MultiExitNetwork,
    policy: Policy,
    segments: Sequence[tuple[int, RunSegment]],
    normalised: Tensor,
    images: Array,
    exits: Sequence[_Exit],
) -> int:
    """How many images take another exit in the exported segments than in torch.

    Raises UserError for one whose scores are not within rounding of their thresholds: twice the
    largest difference of the exit's scores, because kernels differ with the number of rows too.
    """
    expected = infer(network, normalised, policy).exit_index.numpy()
    found = run_segments(segments, images, policy).exit_index
    near = np.zeros(len(expected), bool)
    for (index, _), values in list(zip(segments, exits, strict=True))[:-1]:
        rounding = 2 * np.abs(values.found_score - values.expected_score).max()
        near |= np.abs(values.expected_score - policy.thresholds[index]) <= rounding
    other = expected != found
    if (other & ~near).any():
        raise UserError(
            f"the exported segments differ from torch: {(other & ~near).sum()} of {len(near)}"
            " images take another exit"
        )
    return int(other.sum())
