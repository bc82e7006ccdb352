"""Eight-bit integers: from an ONNX model of `onnx_export` to one that computes in int8.

Integers are the products with weights, the sums of residual blocks and the activations between them
(`onnx_graph.integer_nodes`): weights with a scale per output channel, maps with one scale, from the
range of their values on the examples. The layer that gives the logits and the criterion stay
float32, so a score is the criterion of the returned logits without an error of its own. Weights use
seven bits, because without VNNI instructions sums of 8-bit products overflow: the same model then
gives the same answers on any processor.

Each model is for one runtime: OpenVINO computes wrong logits from the one for ONNX Runtime.

Segments. Features and states between segments stay float32, so an int8 model fits wherever the
float32 one does; but a map that the next segment multiplies by weights is rounded to 8 bits there,
and ONNX Runtime's is already rounded where it leaves a segment. Merging segments does not remove
the rounding: inside the merged segment the map has nearly the same scale. It is not exactly the
same, because each segment's scales come from examples that ran through other parts of the network,
in torch or in ONNX Runtime, and NNCF averages over runs and shares scales within a model. A scale
that differs in its last digit moves a value halfway between two integers by a whole step. So the
record of all exits (one segment a stage) and live inference with merged segments are equal up to
such steps and not, as in float32, up to rounding: more scores near a threshold, and more near-ties,
are decided differently. Count them, or compare with a record of the merged segments.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from early_exit.errors import UserError
from early_exit.inference.runtimes import onnx_graph
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.quiet import quiet
from early_exit.inference.runtimes.threads import sharing_threads

if TYPE_CHECKING:
    from onnx import ModelProto

RULES = 2
"""The version of what is done here: with another one, records of 8-bit integers are made anew. In 2
the layer that gives the logits stays float32."""
ROWS = 32
"""Run at a time to find the ranges. NNCF averages the extremes of several runs."""
MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Slice", "Pad", "Concat", "Identity")
"""Nodes whose outputs are some of their inputs' values, which a scale can be moved across."""


def quantise_for_onnxruntime(model: bytes, example: Example, threads: int | None = None) -> bytes:
    """A model in int8 for ONNX Runtime, by its static quantisation.

    example: what the model takes, a few hundred rows; of images as the model takes them, uint8 or
    normalised. threads: of ONNX Runtime; None: one per processor.
    """
    quantisation = import_package("onnxruntime.quantization")
    prepare = import_package("onnxruntime.quantization.shape_inference").quant_pre_process
    graph = onnx_graph.parse(model)
    options = {
        "op_types_to_quantize": [*onnx_graph.PRODUCTS, "Add", *onnx_graph.ACTIVATIONS],
        "nodes_to_quantize": [node.name for node in onnx_graph.integer_nodes(graph)],
        "per_channel": True,
        "reduce_range": True,  # seven bits
        "activation_type": quantisation.QuantType.QUInt8,
        "weight_type": quantisation.QuantType.QInt8,
        # logits, and what attention and normalisation read
        "extra_options": {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    }
    with tempfile.TemporaryDirectory() as folder, sharing_threads(threads), quiet():
        source, prepared, target = (Path(folder, f"{name}.onnx") for name in "abc")
        source.write_bytes(model)
        prepare(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantisation.quantize_static(prepared, target, _Feeds(feeds(graph, example)), **options)
        quantised = onnx_graph.parse(target.read_bytes())
    onnx_graph.strip(quantised)
    return onnx_graph.serialise(quantised)


def quantise_for_openvino(model: bytes, example: Example, threads: int | None = None) -> bytes:
    """A model in int8 for OpenVINO, by NNCF, which runs it in ONNX Runtime.

    Arguments as of `quantise_for_onnxruntime`.
    """
    nncf = _import_nncf()
    graph = import_package("onnx").shape_inference.infer_shapes(onnx_graph.parse(model))
    movable = {node.name for node in onnx_graph.body_nodes(graph) if node.op_type in MOVES}
    integer = {node.name for node in onnx_graph.integer_nodes(graph)}
    others = [node.name for node in graph.graph.node if node.name not in movable | integer]
    rows = list(feeds(graph, example))
    with sharing_threads(threads), quiet():
        quantised = nncf.quantize(
            graph,
            nncf.Dataset(rows),
            subset_size=len(rows),
            target_device=nncf.TargetDevice.CPU,
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE,  # seven bits
                # it doubled the error of a ResNet-20's logits, and depends on where a model ends
                disable_bias_correction=True,
            ),
        )
    onnx_graph.strip(quantised)
    return onnx_graph.serialise(quantised)


def feeds(model: ModelProto, example: Example) -> Iterator[dict[str, np.ndarray]]:
    """The inputs of a model by name, a few rows at a time, at a temperature of 1.

    Raises UserError for an example of another type than the model takes.
    """
    dtype_of = import_package("onnx").helper.tensor_dtype_to_np_dtype
    types = {item.name: dtype_of(item.type.tensor_type.elem_type) for item in model.graph.input}
    parts = example.features if isinstance(example.features, tuple) else (example.features,)
    tensors = dict(zip(types, parts, strict=False))
    if "state" in types and example.state is not None:
        tensors["state"] = example.state
    arrays = {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype != types[name]:
            raise UserError(
                f"the model takes {name} as {types[name]}, the example has {array.dtype}; give"
                f" {types[name]} to find the ranges of values"
            )
    for start in range(0, len(parts[0]), ROWS):
        rows = {name: array[start : start + ROWS] for name, array in arrays.items()}
        if "temperature" in types:
            rows["temperature"] = np.array(1.0, np.float32)
        yield rows


class _Feeds:
    """The inputs as ONNX Runtime's calibration takes them."""

    def __init__(self, rows: Iterator[dict[str, np.ndarray]]) -> None:
        self.rows = rows

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def _import_nncf() -> ModuleType:
    """NNCF, which changes the class of all later loggers and sends statistics of its use to its
    makers: without either."""
    switch, loggers = os.environ.get("NNCF_CI"), logging.getLoggerClass()
    os.environ["NNCF_CI"] = "1"
    try:
        with quiet():
            return import_package("nncf")
    finally:
        logging.setLoggerClass(loggers)
        if switch is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = switch
