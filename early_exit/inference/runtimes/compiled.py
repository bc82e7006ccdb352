"""torch.compile: segments compiled by inductor.

Inductor's freezing makes the weights constants of the graph. On a CPU it then folds BatchNorm into
the convolutions, stores their weights in oneDNN's own layout (cast to bfloat16 once, with bf16) and
appends ReLU and residual additions to them: one kernel each. `torch.nn.utils.fusion.
fuse_conv_bn_eval` would fold BatchNorm alone, and would have to be told which BatchNorm follows
which convolution. Since weights are constants, later changes of the network have no effect.

Rows are a dynamic dimension, because a graph takes seconds to compile. torch compiles one graph for
1 row, and may compile others for few rows and for many (its choice of convolution depends on them),
so each segment runs at several numbers of rows when it is built. Whatever else could lead to
another graph is kept the same: maps are channels last, features between segments are in the
runtime's precision, and no tensor is an inference tensor.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.inference.infer import RunSegment
from early_exit.inference.runtimes.base import Example, RunNetwork
from early_exit.inference.runtimes.torch_runtime import TorchRuntime
from early_exit.inference.segments import Segment
from early_exit.model.features import Features, num_rows, select_rows
from early_exit.system.device import DTYPES, autocast_context

log = logging.getLogger(__name__)

WARM_ROWS = (1, 2, 16, 32)
"""Numbers of rows that a segment runs at when it is built. torch 2.14 compiles graphs for 1, for 2
to 15 and for 16 or more."""


@dataclass(frozen=True)
class CompiledRuntime(TorchRuntime):
    """torch.compile on a device. Implements `early_exit.inference.runtimes.base.Runtime`."""

    slow_to_build: bool = True

    def array(self, images: Tensor) -> Tensor:
        """The images on the device, channels last."""
        with self.context():
            images = channels_last(images.to(self.device))
            return images.clone() if images.is_inference() else images

    def segment(self, segment: Segment, example: Example) -> RunSegment:
        """Compiles a copy of a segment, which takes seconds to minutes; the log states it."""
        segment = dataclasses.replace(segment, stages=copy.deepcopy(segment.stages))
        dtype = None if segment.is_first else DTYPES.get(self.precision)
        return self._compile(CompiledRows(segment, self.device, dtype), example, "a segment")

    def network(self, network: nn.Module, example: Tensor) -> RunNetwork:
        """Compiles a copy of a network without exits."""
        network = copy.deepcopy(network).eval()
        run = CompiledRows(lambda images, *_: network(images), self.device)
        return self._compile(run, Example(example), "a network without exits")

    @contextmanager
    def context(self) -> Iterator[None]:
        """No gradients, and autocast. Not inference mode: its tensors are of another kind, and
        torch would compile a second graph for images that were made outside it."""
        amp = "off" if self.precision == "f32" else self.precision
        with torch.inference_mode(False), torch.no_grad(), autocast_context(amp, self.device):
            yield

    def _compile(self, run: "CompiledRows", example: Example, name: str) -> "CompiledRows":
        """Runs at every one of `WARM_ROWS`, so that no later call compiles."""
        import torch._inductor.config as inductor  # takes a second

        start = time.perf_counter()
        # set here, because as an option of torch.compile it has no effect on weights
        with self.context(), inductor.patch(freezing=True):
            for count in WARM_ROWS:
                rows = torch.arange(count, device=self.device) % num_rows(example.features)
                state = None if example.state is None else example.state[rows]
                run(select_rows(example.features, rows), 1.0, state)
        self.synchronize()
        run.compile_seconds = time.perf_counter() - start
        log.info("%s: compiled %s in %.1f s", self.name, name, run.compile_seconds)
        return run


class CompiledRows:
    """A compiled function `features, temperature, state -> anything`, called as a segment.

    dtype: of features; None: any.
    """

    compile_seconds = 0.0
    """How long building it took."""

    def __init__(
        self, function: Callable[..., Any], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        def run(features: Features, temperature: Tensor, state: Tensor | None) -> Any:
            return function(features, temperature, state)

        # torch limits the number of graphs of each code object, and all segments would share this
        # one: past the limit they would run uncompiled, silently
        run.__code__ = run.__code__.replace()
        # nobody else has the modules, so no call needs to check that they are the same
        unchecked = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        self.run = torch.compile(run, dynamic=True, options={"guard_filter_fn": unchecked})
        self.device, self.dtype = device, dtype

    def __call__(
        self, features: Features, temperature: float = 1.0, state: Tensor | None = None
    ) -> Any:
        if isinstance(features, tuple):
            features = tuple(map(self._as_compiled, features))
        else:
            features = self._as_compiled(features)
        # a tensor, because torch compiles anew for another number
        return self.run(features, torch.full((), temperature, device=self.device), state)

    def _as_compiled(self, features: Tensor) -> Tensor:
        """Features in the type and layout that the graph is compiled for: no other graph."""
        if self.dtype is not None and features.is_floating_point():
            features = features.to(self.dtype)
        return channels_last(features)


def channels_last(features: Tensor) -> Tensor:
    """Maps (B, C, H, W) in the memory format channels_last; anything else contiguous."""
    return features.contiguous(
        memory_format=torch.channels_last if features.ndim == 4 else torch.contiguous_format
    )
