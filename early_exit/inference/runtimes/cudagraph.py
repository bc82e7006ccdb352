"""CUDA graphs: each segment captured once for each bucket of rows, replayed with one launch.

A graph has fixed shapes and fixed addresses. Rows are copied into a graph's inputs, those that fill
up its bucket are ignored, and results are copied out of its outputs, so no buffer of a graph is
handed out. A replay does not wait for the device.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.inference.infer import RunSegment
from early_exit.inference.runtimes.base import Example, RunNetwork
from early_exit.inference.runtimes.torch_runtime import TorchRuntime
from early_exit.inference.segments import Segment
from early_exit.model.features import Features, num_rows, select_rows
from early_exit.system.device import DTYPES

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]
"""Captures a function without arguments: a function that runs it again, and the results, which that
overwrites."""

WARM_UP = 3
"""Runs before a capture: libraries allocate and choose kernels in the first ones."""


@dataclass(frozen=True)
class CudaGraphRuntime(TorchRuntime):
    """CUDA graphs on a GPU. Implements `early_exit.inference.runtimes.base.Runtime`."""

    def segment(self, segment: Segment, _example: Example) -> RunSegment:
        """A copy of a segment, captured when it first runs at a number of rows."""
        stages = tuple(self._convert(nn.ModuleList(segment.stages)))
        return GraphRows(dataclasses.replace(segment, stages=stages), self._capture)

    def network(self, network: nn.Module, _example: Tensor) -> RunNetwork:
        """A copy of a network without exits, captured when it first runs at a number of rows, which
        are those of a whole batch: none are added."""
        network = self._convert(network)
        return GraphRows(lambda images, *_: network(images), self._capture, bucket=int)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Inference mode, and autocast without its cache, whose memory ends before the graphs."""
        dtype = DTYPES.get(self.precision)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            yield

    def _convert(self, network: Any) -> Any:
        """A copy of a network. Weights of convolutions and linear layers are in the precision that
        autocast would otherwise convert them to in every replay."""
        network = copy.deepcopy(network).eval()
        for module in network.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                module.to(DTYPES.get(self.precision))
        return network

    @cached_property
    def _pool(self) -> Any:
        """The memory that all graphs share: they run one after the other."""
        return torch.cuda.graph_pool_handle()

    def _capture(self, function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """A CUDA graph of a function, as `Capture` describes."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # another thread, such as one that pins memory, may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = function()
        return graph.replay, results


class GraphRows:
    """A function `features, temperature, state -> anything with rows first`, captured for each
    bucket of rows; called as a segment. bucket: that of a number of rows; default: `bucket_of`."""

    def __init__(
        self,
        function: Callable[..., Any],
        capture: Capture,
        bucket: Callable[[int], int] | None = None,
    ) -> None:
        self.function, self.capture, self.bucket = function, capture, bucket or bucket_of
        self.graphs: dict[int, _Graph] = {}
        """By bucket."""

    def __call__(
        self, features: Features, temperature: float = 1.0, state: Tensor | None = None
    ) -> Any:
        rows = num_rows(features)
        bucket = self.bucket(rows)
        if bucket not in self.graphs:
            self.graphs[bucket] = self._graph(features, state, bucket)
        graph = self.graphs[bucket]
        graph.temperature.fill_(temperature)
        inputs = features if isinstance(features, tuple) else (features,)
        inputs += () if state is None else (state,)
        for buffer, values in zip(graph.inputs, inputs, strict=True):
            buffer[:rows].copy_(values)
        graph.replay()
        return _copies(graph.results, rows)

    def _graph(self, features: Features, state: Tensor | None, bucket: int) -> "_Graph":
        """Captures the function for a bucket. Rows are repeated to fill it."""
        first = features[0] if isinstance(features, tuple) else features
        rows = torch.arange(bucket, device=first.device) % len(first)
        features = select_rows(features, rows)  # new memory, in the same layout
        state = None if state is None else state[rows]
        temperature = torch.ones((), device=first.device)
        replay, results = self.capture(lambda: self.function(features, temperature, state))
        inputs = features if isinstance(features, tuple) else (features,)
        return _Graph(replay, (*inputs, *(() if state is None else (state,))), temperature, results)


@dataclass(frozen=True)
class _Graph:
    """A captured function, the tensors it reads and those it writes."""

    replay: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    temperature: Tensor
    results: Any


def bucket_of(rows: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`: less than a third
    of a bucket is padding."""
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return between if rows <= between else power


def _copies(results: Any, rows: int) -> Any:
    """Copies of the first rows of results."""
    if isinstance(results, tuple):
        return tuple(_copies(part, rows) for part in results)
    return None if results is None else results[:rows].clone()
