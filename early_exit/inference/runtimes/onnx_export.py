"""ONNX models of segments and of networks without exits. Needs the packages onnx and onnxscript.

Rows are a dynamic dimension, BatchNorm is folded into convolutions, and inputs and outputs have
fixed names:

- inputs: `images` of the first segment, or else `features`, or `features_0`, `features_1`, ... if
  they are several maps; `temperature`, a float32 scalar; `state`;
- outputs: `next_features` (or `next_features_0`, ...; none at the final exit, where they would be
  the logits), `logits`, `answer`, `score`, `next_state`.

An input that the criterion does not use is missing. A network without exits maps `images` to
`logits`.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.inference.runtimes.base import Example
from early_exit.inference.segments import Segment

OPSET = 20
"""Of the exported models; ONNX Runtime 1.17 and OpenVINO 2024 read it."""


def export_segment(segment: Segment, example: Example, input_scale: Any = None) -> bytes:
    """A segment as an ONNX model.

    example: of the images or features; only its first two rows are used. input_scale: None, or
    `(mean, std)` of pixels in [0, 1]: the first segment then takes images as uint8 and normalises
    them itself.
    """
    several = isinstance(example.features, tuple)
    features: Any = example.features if several else (example.features,)
    inputs = [part[:2] for part in features]
    names = [f"features_{index}" for index in range(len(features))] if several else ["features"]
    if segment.is_first:
        names = ["images"]
        if input_scale is not None:
            inputs = [torch.zeros(inputs[0].shape, dtype=torch.uint8)]
    module = _ExportedSegment(segment, len(features) if several else 0, input_scale)
    inputs.append(torch.tensor(1.0))
    names.append("temperature")
    if example.state is not None:
        inputs.append(example.state[:2])
        names.append("state")
    with torch.no_grad():
        module(*inputs)  # tells which outputs there are
    return _export(module, inputs, names, module.output_names)


def export_network(network: nn.Module, example: Tensor) -> bytes:
    """A network without exits as an ONNX model. example: images, of which two are used."""
    return _export(network.eval(), [example[:2]], ["images"], ["logits"])


class _ExportedSegment(nn.Module):
    """A segment with tensors as positional inputs and outputs."""

    def __init__(self, segment: Segment, num_maps: int, input_scale: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(segment.stages)  # so that the exporter finds the weights
        self.segment = segment
        self.num_maps = num_maps
        self.output_names: list[str] = []
        self.scaled = input_scale is not None
        if self.scaled:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in input_scale)
            self.register_buffer("offset", 255 * mean)
            self.register_buffer("scale", 1 / (255 * std))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = self.num_maps or 1
        features: Any = inputs[:count] if self.num_maps else inputs[0]
        if self.scaled:
            features = (features.float() - self.offset) * self.scale
        temperature: Any = inputs[count]
        state = inputs[count + 1 :]
        features, logits, answer, score, new_state = self.segment(
            features, temperature, state[0] if state else None
        )
        outputs: list[tuple[str, Tensor]] = []
        if not self.segment.is_last:
            if isinstance(features, tuple):
                outputs += [(f"next_features_{index}", part) for index, part in enumerate(features)]
            else:
                outputs.append(("next_features", features))
        outputs += [("logits", logits.float()), ("answer", answer), ("score", score)]
        if new_state is not None:
            outputs.append(("next_state", new_state))
        self.output_names = [name for name, _ in outputs]
        return tuple(part for _, part in outputs)


def _export(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """The ONNX model of a module. All inputs but scalars have rows first."""
    try:
        import onnxscript  # noqa: F401  which the exporter needs
    except ImportError:
        raise UserError(
            "the package onnxscript is missing, which makes ONNX models; install it:"
            ' pip install "early-exit[onnxruntime]"'
        ) from None
    rows = torch.export.Dim("rows", min=1)
    shapes: Any = tuple({0: rows} if part.ndim else None for part in inputs)
    if isinstance(module, _ExportedSegment):
        shapes = (shapes,)  # they are its variable arguments
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    try:
        for log in logs:  # they describe every step
            log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with this machine's directories
    return program.model_proto.SerializeToString()
