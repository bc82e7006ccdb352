"""What the runtimes that load ONNX models share. Loading and running models needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.inference.infer import Array, RunSegment
from early_exit.inference.runtimes.base import Example, RunNetwork

if TYPE_CHECKING:
    from torch import Tensor, nn

    from early_exit.inference.segments import Segment


class OnnxModels:
    """A runtime that exports segments and loads them. Implements
    `early_exit.inference.runtimes.base.Runtime`, but for `load` and `quantise`."""

    precision: str

    def load(self, model: bytes | Path) -> RunSegment:
        """An ONNX model with the inputs and outputs that `onnx_export` names."""
        raise NotImplementedError

    def quantise(self, model: bytes, example: Example) -> bytes:
        """The model in int8."""
        raise NotImplementedError

    def array(self, images: Tensor) -> np.ndarray:
        """The images, channels first."""
        return images.cpu().contiguous().numpy()

    def segment(self, segment: Segment, example: Example) -> RunSegment:
        """Exports and loads a segment."""
        return self.load(self.model(segment, example))

    def model(self, segment: Segment, example: Example, input_scale: Any = None) -> bytes:
        """A segment as an ONNX model, in int8 if the runtime is.

        example: as for `segment`, of normalised images also where the model normalises them;
        input_scale: as for `early_exit.inference.runtimes.onnx_export.export_segment`.
        """
        from early_exit.inference.runtimes.onnx_export import export_segment

        model = export_segment(segment, example, input_scale)
        if segment.is_first and input_scale is not None:
            images: Any = example.features
            example = Example(pixels_of(images, *input_scale))
        return self._quantised(model, example)

    def network(self, network: nn.Module, example: Tensor) -> RunNetwork:
        """Exports and loads a network without exits."""
        from early_exit.inference.runtimes.onnx_export import export_network

        exported = export_network(network, example)
        model = self.load(self._quantised(exported, Example(example)))
        return lambda images: model(images)[1]

    def _quantised(self, model: bytes, example: Example) -> bytes:
        return self.quantise(model, example) if self.precision == "int8" else model

    def context(self) -> AbstractContextManager:
        """Nothing."""
        return nullcontext()

    def synchronize(self) -> None:
        """Every call waits for its result."""


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pixels (B, C, H, W) uint8 that images were normalised from.

    images: (B, C, H, W) float32; mean, std: of every channel, for pixels in [0, 1].
    """
    offset, scale = (255 * images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images * scale + offset).round().clamp(0, 255).byte()


def by_name(
    names: Sequence[str], values: Sequence[Array]
) -> tuple[Any, Array, Array, Array, Array | None]:
    """The outputs of a model, in the order of a segment's. At the final exit the features are the
    logits."""
    found = dict(zip(names, values, strict=True))
    maps = tuple(value for name, value in found.items() if name.startswith("next_features_"))
    logits = found["logits"]
    features = maps or found.get("next_features", logits)
    return features, logits, found.get("answer"), found.get("score"), found.get("next_state")
