"""A multi-exit network in a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from early_exit.inference.criteria import apply_criterion
from early_exit.inference.infer import (
    Answers,
    Array,
    RunSegment,
    check_eval_mode,
    run_segments,
)
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.base import Example, RunNetwork, Runtime
from early_exit.inference.segments import segment_of, spans
from early_exit.inference.stream import stream_segments
from early_exit.model.features import Features, concatenate
from early_exit.model.network import MultiExitNetwork

EXAMPLE_ROWS = 32
"""Rows of an example that run through the stages at a time."""


class RuntimeNetwork:
    """A network's segments and its plain network in a runtime, built when they are first used.

    network: in eval mode; runtime: where it runs; example: images (B, C, H, W), normalised, on the
    network's device: two or more to trace with and, for integers, enough to find the ranges of
    values.
    """

    def __init__(self, network: MultiExitNetwork, runtime: Runtime, example: Tensor) -> None:
        check_eval_mode(network)
        self.network, self.runtime = network, runtime
        self.example = example if runtime.precision == "int8" else example[:2]
        self._segments: dict[tuple[int, int, str], RunSegment] = {}
        self._networks: dict[nn.Module, RunNetwork] = {}

    def segment(self, first: int, last: int, criterion: str) -> RunSegment:
        """The segment from stage `first` to the exit at stage `last`."""
        key = first, last, criterion
        if key not in self._segments:
            segment = segment_of(self.network, first, last, criterion)
            with plain_tensors():
                example = self.example_of(first, criterion)
                self._segments[key] = self.runtime.segment(segment, example)
        return self._segments[key]

    def example_of(self, first: int, criterion: str) -> Example:
        """What a segment from stage `first` on takes of the example."""
        return Example(self._stage_inputs[first], self._state(first, criterion))

    def segments(self, policy: Policy) -> list[tuple[int, RunSegment]]:
        """The segments under a policy's enabled exits, each with the exit it ends at."""
        policy.check_exits(self.network.exit_names, "the network")
        return [
            (last, self.segment(first, last, policy.criterion))
            for first, last in spans(policy.enabled)
        ]

    def plain(self, network: nn.Module | None = None) -> RunNetwork:
        """A network without exits that takes the same images; default: the backbone."""
        network = self.network.backbone if network is None else network
        if network not in self._networks:
            with plain_tensors():
                self._networks[network] = self.runtime.network(network, self.example.clone())
        return self._networks[network]

    def infer(self, images: Tensor, policy: Policy) -> Answers:
        """Answers every image at the first exit that is sure enough, as
        `early_exit.inference.infer.infer` does."""
        segments = self.segments(policy)
        with self.runtime.context():
            return run_segments(segments, self.runtime.array(images), policy)

    def infer_stream(
        self, batches: Iterable[Tensor], policy: Policy, **options: Any
    ) -> Iterator[Answers]:
        """The answers for each batch of a stream, in order; options:
        `early_exit.inference.stream.stream_segments`."""
        arrays, context = map(self.runtime.array, batches), self.runtime.context
        return stream_segments(self.segments(policy), arrays, policy, context=context, **options)

    @property
    def num_exits(self) -> int:
        """The number of exits, the final classifier included."""
        return self.network.num_exits

    @property
    def num_classes(self) -> int:
        """The number of logits of an exit."""
        return self.network.num_classes

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The logits of every exit, N tensors (B, K), as the network gives them."""
        features, logits = self.runtime.array(images), []
        with self.runtime.context():
            for index in range(self.num_exits):
                segment = self.segment(index, index, "max_prob")
                features, exit_logits, *_ = segment(features, 1.0, None)
                logits.append(torch.as_tensor(exit_logits))
        return logits

    @cached_property
    def _stage_inputs(self) -> list[Features]:
        """The features that each stage takes, of the example."""
        inputs: list[list[Features]] = [[] for _ in self.network.stages]
        for images in self.example.clone().split(EXAMPLE_ROWS):
            features: Features = images
            inputs[0].append(features)
            for stage, parts in zip(self.network.stages[:-1], inputs[1:], strict=True):
                features, _ = stage(features, with_logits=False)
                parts.append(features)
        return [concatenate(parts, torch.cat) for parts in inputs]

    def _state(self, first: int, criterion: str) -> Tensor | None:
        """The state that the criterion has before stage `first`."""
        if first == 0:
            return None
        logits = torch.zeros(
            len(self.example), self.network.num_classes, device=self.example.device
        )
        return apply_criterion(criterion, logits, 1.0, None)[2]


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No gradients, and no tensors of inference mode: exporters and compilers refuse these."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def to_numpy(array: Array) -> np.ndarray:
    """An array of a runtime in numpy."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach()
    return (array.float() if array.is_floating_point() else array).cpu().numpy()
