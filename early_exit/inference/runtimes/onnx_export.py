"""ONNX models of segments and of networks without exits. Needs the packages onnx and onnxscript.

Rows are a dynamic dimension, BatchNorm is folded into convolutions and linear layers, and inputs
and outputs have fixed names:

- inputs: `images` of the first segment, or else `features`, or `features_0`, `features_1`, ... if
  they are a tuple; `temperature`, a float32 scalar; `state`, unless this is the first enabled exit;
- outputs: `next_features`, or `next_features_0`, ... (none at the final exit, where they would be
  the logits), `logits`, `answer`, `score`, and `next_state` if the criterion keeps a state.

A network without exits maps `images` to `logits`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.inference.criteria import apply_criterion
from early_exit.inference.runtimes import onnx_graph
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.quiet import quiet
from early_exit.inference.segments import Segment
from early_exit.model.network import evaluation_mode

OPSET = 20
"""Of the exported models; ONNX Runtime 1.17 and OpenVINO 2024 read it."""
MAX_BYTES = 2**31 - 2**20
"""Of the weights: a file has at most 2 GiB."""


def export_segment(segment: Segment, example: Example, input_scale: Any = None) -> bytes:
    """A segment as an ONNX model.

    example: of the images or features; only its first two rows are used. input_scale: None, or
    `(mean, std)` of pixels in [0, 1]: the first segment then takes images as uint8 and normalises
    them itself, as `early_exit.data.pixels.normalise` does. Raises UserError for a criterion or a
    network that cannot be exported.
    """
    is_tuple = isinstance(example.features, tuple)
    parts: Any = example.features if is_tuple else (example.features,)
    inputs = [part[:2] for part in parts]
    names = [f"features_{index}" for index in range(len(parts))] if is_tuple else ["features"]
    if segment.is_first:
        names = ["images"]
        if input_scale is not None:
            inputs[0] = torch.zeros_like(inputs[0], dtype=torch.uint8)
    inputs.append(torch.tensor(1.0))
    names.append("temperature")
    if example.state is not None:
        inputs.append(example.state[:2])
        names.append("state")
    module = _ExportedSegment(segment, len(parts), is_tuple, input_scale, inputs[0].device)
    _check(module, inputs)
    with evaluation_mode(module), torch.no_grad():
        outputs = module(*inputs)  # tells which there are
    try:
        return _export(module, inputs, names, module.output_names)
    except Exception as error:  # of many types; the criterion is any code
        logits = outputs[module.output_names.index("logits")]
        state = None if example.state is None else example.state[:2]
        raise UserError(_why(segment.criterion, logits, state, error)) from error


def export_network(network: nn.Module, example: Tensor) -> bytes:
    """A network without exits as an ONNX model.

    example: images, of which two are used. Raises UserError for one that cannot be exported.
    """
    _check(network, [example[:2]])
    try:
        return _export(network, [example[:2]], ["images"], ["logits"])
    except Exception as error:  # of many types
        raise UserError(f"the network cannot be exported to ONNX: {_first_line(error)}") from error


class _ExportedSegment(nn.Module):
    """A segment with tensors as positional inputs and outputs."""

    def __init__(
        self,
        segment: Segment,
        num_parts: int,
        is_tuple: bool,
        input_scale: Any,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(segment.stages)  # so that the exporter finds the weights
        self.segment = segment
        self.num_parts, self.is_tuple = num_parts, is_tuple
        self.output_names: list[str] = []
        self.scaled = segment.is_first and input_scale is not None
        if self.scaled:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in input_scale)
            self.register_buffer("offset", mean.mul(255).to(device))
            self.register_buffer("scale", std.mul(255).reciprocal().to(device))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        parts, (temperature, *state) = inputs[: self.num_parts], inputs[self.num_parts :]
        features: Any = parts if self.is_tuple else parts[0]
        if self.scaled:
            features = (features.float() - self.offset) * self.scale
        scalar: Any = temperature
        features, logits, answer, score, new_state = self.segment(
            features, scalar, state[0] if state else None
        )
        outputs: dict[str, Tensor] = {}
        if isinstance(features, tuple):
            outputs |= {f"next_features_{index}": part for index, part in enumerate(features)}
        elif not self.segment.is_last:
            outputs["next_features"] = features
        outputs |= {"logits": logits.float(), "answer": answer, "score": score}
        if new_state is not None:
            outputs["next_state"] = new_state
        self.output_names = list(outputs)
        return tuple(outputs.values())


class _Criterion(nn.Module):
    """A criterion alone: logits and, if there is one, state to what it returns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        logits, *state = inputs
        outputs = apply_criterion(self.name, logits, 1.0, state[0] if state else None)
        return tuple(part for part in outputs if part is not None)


def _check(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raises UserError for what could not be exported or stored."""
    for package in ("onnx", "onnxscript"):  # which the exporter needs
        import_package(package)
    if len(inputs[0]) < 2:
        raise UserError(
            f"an ONNX model is traced with two rows or more, got {len(inputs[0])}; give more images"
        )
    size = sum(part.nbytes for part in (*module.parameters(), *module.buffers()))
    if size > MAX_BYTES:
        raise UserError(
            f"the weights take {size:,} bytes, and one ONNX file holds at most {MAX_BYTES:,};"
            " enable more exits, so that segments are smaller, or run the network in torch"
        )


def _export(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """The ONNX model of a module. All inputs but scalars have rows first.

    Raises the errors of torch.export and torch.onnx.export, which are of several types.
    """
    rows = torch.export.Dim("rows", min=1)
    shapes: Any = tuple({0: rows} if part.ndim else None for part in inputs)
    if isinstance(module, _ExportedSegment | _Criterion):
        shapes = (shapes,)  # they are its variable arguments
    with evaluation_mode(module), quiet():
        # not by torch.onnx.export: if tracing fails it tries other ways, of which some succeed for
        # exactly two rows
        traced = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(names),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx_graph.name_rows(model)
    onnx_graph.fold_batchnorm(model)
    onnx_graph.strip(model)
    return onnx_graph.serialise(model)


def _why(criterion: str, logits: Tensor, state: Tensor | None, error: Exception) -> str:
    """Why a segment cannot be exported: because of its criterion, if that alone cannot be."""
    inputs = [logits] if state is None else [logits, state]
    names = ["logits", "state"][: len(inputs)]
    try:
        _export(_Criterion(criterion), inputs, names, [])
    except Exception as own:
        return (
            f"the criterion {criterion} cannot be exported to ONNX: {_first_line(own)}; write it"
            " with tensor operations (torch.where instead of if), or run it in torch"
        )
    return f"the network cannot be exported to ONNX: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """The first line of what caused an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".:;")
