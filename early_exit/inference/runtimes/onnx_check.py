"""Whether exported segments compute what the network does.

Logits of the same images by torch and by the exported files differ by rounding only. A logit is the
end of a chain of sums; of n terms each is off by at most n epsilon relative to the largest number
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The tolerance is therefore

    epsilon of float32 x the terms along one path to the exit x the exit's largest logit

where a layer has as many terms as weights per output, and each module a few for what it computes
element by element. Scores are compared on the same logits, so only the criterion's own rounding is
between them: they agree in half of float32's digits, also for a criterion that cancels.

In 8-bit integers the files are compared with the segments that the runtime builds itself, as in an
evaluation. Sums of integers are exact, but a value halfway between two integers may be rounded to
either, and that changes it by a whole step, not by an epsilon. What all steps together do is
measured: by how much the runtime's own logits differ from torch's in float32. Files that were
rounded independently of it would be off by about the square root of two times that; half of it is
allowed.

Segments are traced with a few rows and run with any number, down to a single one, so all exits are
compared on all images, on seven and on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.inference.infer import Array, RunSegment, run_segments
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import RuntimeNetwork, to_numpy
from early_exit.inference.segments import segments_of, spans
from early_exit.model.network import MultiExitNetwork

EPSILON = float(np.finfo(np.float32).eps)
ELEMENTWISE = 4  # operations of a module on each element, such as those of BatchNorm
ROOT_EPSILON = EPSILON**0.5
FEW = (1, 7)  # images with which the exits are compared too
OF_INTEGERS = 0.5  # of the difference between integers and float32

Segments = Sequence[tuple[int, RunSegment]]
"""Segments, each with the exit it ends at."""


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
    from_float: float | None
    """In 8-bit integers, the largest difference of the reference's logits from those in float32."""


@dataclass(frozen=True)
class _Exit:
    """An exit on all images, none of which exited before: logits (B, K), score (B,)."""

    logits: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class _Limit:
    """How far an exit's logits may be off, relative to the largest one."""

    tolerance: float
    largest: float


def check_segments(
    reference: RuntimeNetwork,
    policy: Policy,
    segments: Segments,
    normalised: Tensor,
    images: Array,
) -> Agreement:
    """Compares exported segments with those of the network in a runtime, on the CPU.

    reference: eager torch in float32 or, for segments in 8-bit integers, their own runtime.
    normalised: images as the network takes them; images: the same as the first exported segment
    takes them. The exits taken are compared for the policy and for the medians of the scores as
    thresholds, with which images exit everywhere.

    Raises UserError if a segment fails, or if logits, scores or exits differ by more than the
    tolerance.
    """
    runs = [
        (
            _own_exits(reference, policy, normalised[:rows]),
            _all_exits(segments, policy, images[:rows]),
        )
        for rows in (len(images), *FEW)
    ]
    expected, _ = runs[0]
    limits, from_float = _limits(reference, policy, normalised, expected)
    largest, tolerance = max(
        (difference, limit.tolerance)
        for run in runs
        for difference, limit in zip(
            _differences(reference.runtime.name, policy, segments, run, limits), limits, strict=True
        )
    )
    at_medians = list(policy.thresholds)
    for (index, _), values in list(zip(segments, expected, strict=True))[:-1]:
        at_medians[index] = float(np.median(values.score))
    other = 0
    for tried in (replace(policy, thresholds=tuple(at_medians), guarantee=None), policy):
        other = _count_other_exits(reference, tried, segments, normalised, images, runs[0])
    return Agreement(len(images), largest, tolerance, other, from_float)


def _own_exits(reference: RuntimeNetwork, policy: Policy, normalised: Tensor) -> list[_Exit]:
    """Every enabled exit on all images, by the reference."""
    with reference.runtime.context():
        images = reference.runtime.array(normalised)
        return _all_exits(reference.segments(policy), policy, images)


def _all_exits(segments: Segments, policy: Policy, images: Array) -> list[_Exit]:
    """Every enabled exit on all images. Raises UserError if a segment fails."""
    features, state, exits = images, None, []
    for index, segment in segments:
        try:
            features, logits, _, score, state = segment(features, policy.temperatures[index], state)
        except Exception as error:  # the packages have error types of their own
            reason = " ".join(str(error).split())
            raise UserError(
                f"the segment that ends at {policy.exit_names[index]} fails with"
                f" {_images(len(images))} ({reason[:300]})"
            ) from error
        exits.append(_Exit(to_numpy(logits), to_numpy(score)))
    return exits


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _limits(
    reference: RuntimeNetwork, policy: Policy, normalised: Tensor, expected: Sequence[_Exit]
) -> tuple[list[_Limit], float | None]:
    """How far the logits of each enabled exit may be off and, in 8-bit integers, the largest
    difference of the expected ones from those of eager torch in float32."""
    network, steps = reference.network, [0.0] * len(expected)
    largest = [float(np.abs(values.logits).max()) or 1.0 for values in expected]
    ends = [last for _, last in spans(policy.enabled)]
    if is_int8 := reference.runtime.precision == "int8":
        with torch.inference_mode():
            exact = _all_exits(segments_of(network, policy), policy, normalised)
        steps = list(map(_difference, exact, expected, largest))
    tolerances = [
        max(EPSILON * work(network, index), OF_INTEGERS * step)
        for index, step in zip(ends, steps, strict=True)
    ]
    return list(map(_Limit, tolerances, largest)), max(steps) if is_int8 else None


def _difference(found: _Exit, expected: _Exit, largest: float) -> float:
    """The largest difference of the logits, relative to `largest`."""
    return float(np.abs(found.logits - expected.logits).max()) / largest


def _differences(
    reference: str,
    policy: Policy,
    segments: Segments,
    run: tuple[Sequence[_Exit], Sequence[_Exit]],
    limits: Sequence[_Limit],
) -> list[float]:
    """How far the logits of each enabled exit are off, relative to the largest one.

    run: the expected exits and those found. Raises UserError if logits or scores differ by more
    than is allowed.
    """
    differences, state = [], None
    for (index, _), expected, found, limit in zip(segments, *run, limits, strict=True):
        where = f"at {policy.exit_names[index]} with {_images(len(expected.logits))}"
        wrong = f"the exported segments differ from {reference}: the"
        if found.logits.shape != expected.logits.shape:
            raise UserError(
                f"{wrong} logits {where} are {found.logits.shape}, expected {expected.logits.shape}"
            )
        differences.append(_difference(found, expected, limit.largest))
        if not differences[-1] <= limit.tolerance:  # nor if it is nan
            raise UserError(
                f"{wrong} logits {where} by {differences[-1]:.1e} of the largest one, more than is"
                f" allowed for rounding ({limit.tolerance:.1e})"
            )
        _, score, state = policy.score(index, torch.from_numpy(found.logits), state)
        own = score.numpy()
        off = np.abs(found.score - own)
        if not (off <= ROOT_EPSILON * np.maximum(1, np.abs(own))).all():
            raise UserError(
                f"{wrong} scores of {policy.criterion} {where} by {off.max():.1e} on the same"
                " logits"
            )
    return differences


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


def _count_other_exits(
    reference: RuntimeNetwork,
    policy: Policy,
    segments: Segments,
    normalised: Tensor,
    images: Array,
    run: tuple[Sequence[_Exit], Sequence[_Exit]],
) -> int:
    """How many images take another exit in the exported segments than in the reference.

    run: every exit on all images, expected and found. Raises UserError for an image whose scores
    are not within rounding of their thresholds: twice the largest difference of the exit's scores,
    because kernels differ with the number of rows too.
    """
    expected = to_numpy(reference.infer(normalised, policy).exit_index)
    found = run_segments(segments, images, policy).exit_index
    near = np.zeros(len(expected), bool)
    for (index, _), wanted, given in list(zip(segments, *run, strict=True))[:-1]:
        rounding = 2 * np.abs(given.score - wanted.score).max()
        near |= np.abs(wanted.score - policy.thresholds[index]) <= rounding
    other = expected != found
    if (other & ~near).any():
        raise UserError(
            f"the exported segments differ from {reference.runtime.name}:"
            f" {(other & ~near).sum()} of {len(near)} images take another exit"
        )
    return int(other.sum())
