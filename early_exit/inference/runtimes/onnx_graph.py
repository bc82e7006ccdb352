"""Graphs of ONNX models. Needs the package onnx.

Models are those that `early_exit.inference.runtimes.onnx_export` writes: every node has a name, and
weights are initializers.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from early_exit.inference.runtimes.packages import import_package

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Nodes that multiply by weights."""
ACTIVATIONS = ("Relu", "Clip")
"""Nodes that only cut off the ends of the range of values."""


def parse(model: bytes) -> ModelProto:
    """A serialised model."""
    return import_package("onnx").load_model_from_string(model)


def serialise(model: ModelProto) -> bytes:
    """The bytes of a model: the same for the same graph."""
    return model.SerializeToString(deterministic=True)


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """Each value that a node computes, with that node."""
    return {name: node for node in model.graph.node for name in node.output}


def body_nodes(model: ModelProto) -> list[NodeProto]:
    """The nodes that features or logits depend on, in order: all but those of the criterion."""
    outputs = [item.name for item in model.graph.output]
    made = producers(model)
    pending = [name for name in outputs if name == "logits" or name.startswith("next_features")]
    needed = set()
    while pending:
        node = made.get(pending.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            pending += node.input
    return [node for node in model.graph.node if node.name in needed]


def classifying_nodes(model: ModelProto) -> set[str]:
    """The names of the products that give the logits, without another one in between."""
    made, pending, found = producers(model), ["logits"], set()
    while pending:
        node = made.pop(pending.pop(), None)
        if node is not None and node.op_type in PRODUCTS:
            found.add(node.name)
        elif node is not None:
            pending += node.input
    return found


def integer_nodes(model: ModelProto) -> list[NodeProto]:
    """The nodes that are computed in integers: products with weights, sums of a residual block, and
    the activations that follow these.

    The products that give the logits stay float32: they take next to no time, and BatchNorm that is
    folded into them gives the weights of one class very different sizes, which share one scale.
    With them in integers, a head after layer2.0 of a ResNet-56 lost 16 points of accuracy.
    """
    made, values = producers(model), {item.name for item in model.graph.initializer}
    classifying = classifying_nodes(model)
    chosen: dict[str, NodeProto] = {}
    for node in body_nodes(model):
        sources = [made[name] for name in node.input if name in made]
        if (
            (node.op_type in PRODUCTS and node.input[1] in values and node.name not in classifying)
            # a convolution's output and a map, not statistics in a head
            or (
                node.op_type == "Add"
                and any(source.op_type == "Conv" for source in sources)
                and not any(name in values for name in node.input)
            )
            or (node.op_type in ACTIVATIONS and sources[:1] and sources[0].name in chosen)
        ):
            chosen[node.name] = node
    return list(chosen.values())


def strip(model: ModelProto) -> None:
    """Removes what describes the Python code that a model was exported from: its lines, and the
    paths of its files."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for item in (model, graph, *graph.node, *values):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    del model.functions[:], graph.value_info[:]


def name_rows(model: ModelProto) -> None:
    """Names the rows of inputs and outputs, which the exporter gives a number."""
    for item in (*model.graph.input, *model.graph.output):
        for dim in item.type.tensor_type.shape.dim[:1]:
            if dim.dim_param:
                dim.dim_param = "rows"


def fold_batchnorm(model: ModelProto) -> None:
    """Folds every BatchNorm before a linear layer into the weights of that layer.

    The exporter does so with those that follow a convolution. Others stay: one before a ReLU or
    before a convolution with padding is not a change of weights.
    """
    graph = model.graph
    weights = {item.name: item for item in graph.initializer}
    readers: dict[str, list[NodeProto | None]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    for item in graph.output:
        readers[item.name].append(None)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        (gemm, *others) = readers[norm.output[0]]
        if others or gemm is None or not _is_linear(gemm, norm.output[0], weights):
            continue
        _fold(model, norm, gemm, weights)
        graph.node.remove(norm)
    used = {name for node in graph.node for name in node.input}
    used |= {item.name for item in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _is_linear(node: NodeProto, features: str, weights: dict[str, Any]) -> bool:
    """Whether a node multiplies the features by weights and adds a bias."""
    options = _attributes(node)
    return (
        node.op_type == "Gemm"
        and node.input[0] == features
        and len(node.input) == 3
        and all(name in weights for name in node.input[1:])
        and not options.get("transA", 0)
        and options.get("alpha", 1) == options.get("beta", 1) == 1
    )


def _fold(model: ModelProto, norm: NodeProto, gemm: NodeProto, weights: dict[str, Any]) -> None:
    """Gives a linear layer the weights with which it does the work of the BatchNorm before it."""
    helper = import_package("onnx").numpy_helper
    names = (*norm.input[1:], *gemm.input[1:])
    arrays = [helper.to_array(weights[name]).astype(np.float64) for name in names]
    scale, shift, mean, variance, weight, bias = arrays
    factor = scale / np.sqrt(variance + _attributes(norm).get("epsilon", 1e-5))
    if not _attributes(gemm).get("transB", 0):
        weight = weight.T
    folded = {
        "weight": weight * factor,  # (K, F)
        "bias": bias + weight @ (shift - mean * factor),
    }
    if not _attributes(gemm).get("transB", 0):
        folded["weight"] = folded["weight"].T
    dtype = helper.to_array(weights[gemm.input[1]]).dtype
    for index, (name, array) in enumerate(folded.items(), start=1):
        # new ones: another node may use the old
        new = np.ascontiguousarray(array.astype(dtype))
        model.graph.initializer.append(helper.from_array(new, f"{norm.name}.folded_{name}"))
        gemm.input[index] = f"{norm.name}.folded_{name}"
    gemm.input[0] = norm.input[0]


def _attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node that it sets."""
    get = import_package("onnx").helper.get_attribute_value
    return {item.name: get(item) for item in node.attribute}
