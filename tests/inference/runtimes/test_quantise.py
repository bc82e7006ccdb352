"""Int8: near the float32 model, with the criterion in float32."""

import logging
import os

import numpy as np
import pytest
import torch
from helpers import assert_names

from early_exit.errors import UserError
from early_exit.inference.criteria import apply_criterion
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes import onnx_graph, quantise
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.onnx_export import export_segment
from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
from early_exit.inference.runtimes.openvino import OpenVINORuntime
from early_exit.inference.runtimes.threads import sharing_threads
from early_exit.inference.segments import segment_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

RUNTIMES = [
    pytest.param(OnnxRuntime, marks=pytest.mark.slow, id="onnxruntime"),
    pytest.param(OpenVINORuntime, marks=pytest.mark.slow, id="openvino"),
]
TEMPERATURE = 1.5


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request):
    """A runtime in int8."""
    if request.param is OpenVINORuntime:
        pytest.importorskip("openvino")
        pytest.importorskip("nncf")
    return request.param(precision="int8", threads=1)


@pytest.fixture(scope="module")
def float_model(trained_net, images):
    """The stages up to the exit after layer2, in float32."""
    segment = segment_of(trained_net, 0, 2, "max_prob")
    return export_segment(segment, Example(images[:2]))


@pytest.fixture(scope="module")
def model(runtime, float_model, images):
    """The same in the runtime's int8."""
    of = {
        "onnxruntime": quantise.quantise_for_onnxruntime,
        "openvino": quantise.quantise_for_openvino,
    }[runtime.name]
    return of(float_model, Example(images[:256]), threads=1)


@pytest.fixture(scope="module")
def call(runtime, model):
    return runtime.load(model)


def assert_mostly(same, share=0.9):
    """That nearly all are the same.

    Maps have 255 steps and weights 127, so with some twenty roundings on the way a logit is off by
    a few percent of the largest. Few images have two classes that near to each other.
    """
    assert np.mean(same) >= share


def test_classes_are_those_of_float32(runtime, call, float_model, images):
    test = images[1024:].numpy()
    expected, found = OnnxRuntime(threads=1).load(float_model)(test)[1], call(test)[1]
    assert found.dtype == np.float32 and not np.array_equal(found, expected)
    assert_mostly(found.argmax(axis=1) == expected.argmax(axis=1))


def test_the_score_is_the_criterion_of_the_logits(call, images):
    _, logits, answer, score, _ = call(images[1024:].numpy(), TEMPERATURE)
    assert score.dtype == np.float32
    own = apply_criterion("max_prob", torch.from_numpy(logits), TEMPERATURE, None)
    eps = np.finfo(np.float32).eps
    # a division; a softmax of four classes, whose largest entry is at least a quarter
    np.testing.assert_allclose(answer, own[0].numpy(), rtol=2 * eps)
    np.testing.assert_allclose(score, own[1].numpy(), rtol=40 * eps)


def test_products_are_integers_and_the_criterion_is_not(model, float_model):
    graph = onnx_graph.parse(model)
    made = onnx_graph.producers(graph)
    *products, last = [node for node in graph.graph.node if node.op_type in onnx_graph.PRODUCTS]
    # a stem, two blocks of two convolutions and one of the next stage
    assert len(products) == 1 + 2 + 2
    for node in products:
        sources = [made[name] for name in node.input[:2]]
        while sources[0].op_type in quantise.MOVES:
            sources[0] = made[sources[0].input[0]]
        assert [source.op_type for source in sources] == ["DequantizeLinear"] * 2
    # the linear layer that gives the logits stays float32
    assert last.op_type == "Gemm" and list(last.output) == ["logits"]
    assert last.input[1] not in made
    body = {node.name for node in onnx_graph.body_nodes(graph)}
    criterion = [node.op_type for node in graph.graph.node if node.name not in body]
    plain = onnx_graph.parse(float_model)
    body = {node.name for node in onnx_graph.body_nodes(plain)}
    assert criterion == [node.op_type for node in plain.graph.node if node.name not in body]


def test_an_image_alone_is_as_in_a_batch(call, images):
    batch = images[1024:1073].numpy()
    alone = np.concatenate([call(batch[index : index + 1])[1] for index in range(49)])
    sevens = np.concatenate([call(batch[index : index + 7])[1] for index in range(0, 49, 7)])
    # sums of integers are exact; a float that another kernel rounds may become another integer
    tolerance = 100 * np.finfo(np.float32).eps * np.abs(alone).max()
    assert_mostly((np.abs(alone - sevens) <= tolerance).all(axis=1))
    assert_mostly(alone.argmax(axis=1) == sevens.argmax(axis=1))


def test_live_inference_is_as_the_record(runtime, trained_net, images):
    network = RuntimeNetwork(trained_net, runtime, images[:256])
    test = images[1024:]
    record = torch.stack(network(test), dim=1).numpy()  # a segment a stage
    probs = torch.from_numpy(record[:, 1]).softmax(dim=-1).amax(dim=-1)
    policy = Policy(
        exit_names=trained_net.exit_names,
        thresholds=(1.0, float(probs.median()), 1.0),
        enabled=(False, True, False),
    )
    live = network.infer(test, policy)  # two merged ones
    exits = np.where(probs.numpy() >= policy.thresholds[1], 1, 3)
    assert_mostly(live.exit_index == exits)
    rows = np.arange(len(test))
    assert_mostly(live.classes == record[rows, live.exit_index].argmax(axis=1))


def test_a_later_segment_is_calibrated_with_its_state(runtime, trained_net, images):
    network = RuntimeNetwork(trained_net, runtime, images[:64])
    features, *_, state = network.segment(0, 0, "patience")(images[:7].numpy(), 1.0, None)
    _, logits, _, score, found = network.segment(1, 1, "patience")(features, 1.0, state)
    expected = np.where(logits.argmax(axis=1) == state[:, 0], 1, 0)
    assert score.tolist() == expected.tolist()
    assert found.tolist() == np.stack([logits.argmax(axis=1), expected], axis=1).tolist()


def test_the_plain_network_is_an_integer_model_too(runtime, trained_net, images):
    network = RuntimeNetwork(trained_net, runtime, images[:256])
    logits = network.plain()(images[1024:].numpy())
    with torch.no_grad():
        expected = trained_net.backbone(images[1024:])
    assert_mostly(logits.argmax(axis=1) == expected.argmax(dim=1).numpy())


def test_nothing_is_printed_and_no_setting_changes(runtime, float_model, images, capfd):
    before = os.environ.get("NNCF_CI"), logging.getLoggerClass(), onnxruntime.InferenceSession
    handlers = list(logging.root.handlers)
    if runtime.name == "openvino":
        quantise.quantise_for_openvino(float_model, Example(images[:64]), threads=1)
    else:
        quantise.quantise_for_onnxruntime(float_model, Example(images[:64]), threads=1)
    after = os.environ.get("NNCF_CI"), logging.getLoggerClass(), onnxruntime.InferenceSession
    assert after == before and logging.root.handlers == handlers
    assert capfd.readouterr() == ("", "")


def graph_with(**inputs):
    """A graph of inputs alone, each with its type."""
    values = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    return onnx.helper.make_model(onnx.helper.make_graph([], "inputs", values, []))


def test_every_input_is_fed():
    kinds = onnx.TensorProto
    graph = graph_with(
        features_0=kinds.FLOAT, features_1=kinds.FLOAT, temperature=kinds.FLOAT, state=kinds.INT64
    )
    rows = quantise.ROWS + 1
    maps = torch.rand(rows, 2, 4, 4), torch.rand(rows, 2, 2, 2)
    state = torch.arange(rows)
    first, second = quantise.feeds(graph, Example(maps, state))
    assert len(first["features_0"]) == quantise.ROWS and len(second["features_0"]) == 1
    for name, tensor in (("features_0", maps[0]), ("features_1", maps[1]), ("state", state)):
        assert np.array_equal(np.concatenate([first[name], second[name]]), tensor.numpy())
    assert first["temperature"].shape == () and first["temperature"].dtype == np.float32


def test_bytes_are_not_taken_for_normalised_images():
    graph = graph_with(images=onnx.TensorProto.UINT8)
    with pytest.raises(UserError) as caught:
        list(quantise.feeds(graph, Example(torch.rand(2, 3, 4, 4))))
    assert_names(str(caught.value), "images", "uint8", "float32")


@pytest.mark.parametrize("make", [OnnxRuntime, OpenVINORuntime])
def test_another_precision_is_refused(make):
    with pytest.raises(UserError) as caught:
        make(precision="int4")
    assert_names(str(caught.value), "int4", "f32", "int8")


def test_sessions_are_restored_after_an_error():
    before = onnxruntime.InferenceSession
    with pytest.raises(ZeroDivisionError), sharing_threads(1):
        assert onnxruntime.InferenceSession is not before
        _ = 1 / 0
    assert onnxruntime.InferenceSession is before
