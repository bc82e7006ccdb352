"""The Open Inference Protocol: bytes to arrays and back."""

import json

import numpy as np
import pytest
from helpers import assert_names

from early_exit.deployed import confidence_of
from early_exit.serving import protocol
from early_exit.serving.refused import Refused

MODEL = protocol.Signature("mine", "onnxruntime_onnx", (3, 2, 2), 4)
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
LOGITS = np.array([[0, 1, 2.5, 1], [4, 0, 0, 0]], np.float32)
EXITS = np.array([1, 0])


def tensor(**changes: object) -> dict:
    """The input of a good request, with some entries changed; None: without the entry."""
    good = {
        "name": "images",
        "datatype": "UINT8",
        "shape": [2, 3, 2, 2],
        "data": IMAGES.ravel().tolist(),
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def read(values: object, binary: bytes = b"", length: str | None = None, max_images: int = 8):
    """What a request with this JSON is read as."""
    text = json.dumps(values).encode()
    if binary and length is None:
        length = str(len(text))
    return protocol.read_request(text + binary, length, MODEL, max_images)


class TestReading:
    def test_numbers_in_one_list(self):
        found = read({"inputs": [tensor()]})
        assert found.images.dtype == np.uint8
        assert np.array_equal(found.images, IMAGES)
        assert found.id is None
        assert found.outputs == dict.fromkeys(("logits", "class", "confidence", "exit"), False)

    def test_nested_lists(self):
        assert np.array_equal(read({"inputs": [tensor(data=IMAGES.tolist())]}).images, IMAGES)

    def test_binary_data(self):
        one = tensor(data=None, parameters={"binary_data_size": 24})
        found = read({"inputs": [one], "id": "7"}, IMAGES.tobytes())
        assert np.array_equal(found.images, IMAGES)
        assert found.images.flags.writeable
        assert found.id == "7"

    def test_the_outputs_that_are_named(self):
        outputs = [{"name": "exit"}, {"name": "class", "parameters": {"binary_data": True}}]
        assert read({"inputs": [tensor()], "outputs": outputs}).outputs == {
            "exit": False,
            "class": True,
        }

    def test_binary_data_for_all_outputs(self):
        values = {"inputs": [tensor()], "parameters": {"binary_data_output": True}}
        assert set(read(values).outputs.values()) == {True}
        values["outputs"] = [{"name": "exit", "parameters": {"binary_data": False}}]
        assert read(values).outputs == {"exit": False}


BINARY = tensor(data=None, parameters={"binary_data_size": 24})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], "object"),
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [tensor(), tensor()]}, "inputs"),
        ({"inputs": [1]}, "object"),
        ({"inputs": [tensor()], "id": 7}, "id"),
        ({"inputs": [tensor(name="pixels")]}, "pixels"),
        ({"inputs": [tensor(datatype="FP32")]}, "FP32"),
        ({"inputs": [tensor(shape=None)]}, "shape"),
        ({"inputs": [tensor(shape=[2, 3, 2])]}, "[B, 3, 2, 2]"),
        ({"inputs": [tensor(shape=[0, 3, 2, 2], data=[])]}, "[B, 3, 2, 2]"),
        ({"inputs": [tensor(shape=[-2, 3, 2, 2])]}, "[B, 3, 2, 2]"),
        ({"inputs": [tensor(shape=[True, 3, 2, 2])]}, "[B, 3, 2, 2]"),
        ({"inputs": [tensor(shape=[2.0, 3, 2, 2])]}, "[B, 3, 2, 2]"),
        ({"inputs": [tensor(data=None)]}, 24),
        ({"inputs": [tensor(data=24)]}, 24),
        ({"inputs": [tensor(data="abc")]}, 24),
        ({"inputs": [tensor(data=[0] * 23)]}, 24),
        ({"inputs": [tensor(data=[256] * 24)]}, 255),
        ({"inputs": [tensor(data=[-1] * 24)]}, 255),
        ({"inputs": [tensor(data=[10**30] * 24)]}, 255),
        ({"inputs": [tensor(data=[1.5] * 24)]}, 24),
        ({"inputs": [tensor(data=["1"] * 24)]}, 24),
        ({"inputs": [tensor(data=[[0] * 24])]}, 24),
        ({"inputs": [tensor(data=IMAGES.swapaxes(0, 1).tolist())]}, 24),
        ({"inputs": [tensor(data=[[[[0, 1], 2]]])]}, 24),
        ({"inputs": [BINARY]}, 24),
        ({"inputs": [{**BINARY, "data": []}]}, "binary_data_size"),
        ({"inputs": [tensor(parameters=3)]}, "parameters"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "x"})]}, "shared_memory_region"),
        ({"inputs": [tensor()], "outputs": {}}, "outputs"),
        ({"inputs": [tensor()], "outputs": [{"name": "softmax"}]}, "softmax"),
        ({"inputs": [tensor()], "outputs": [{"name": ["exit"]}]}, "exit"),
        ({"inputs": [tensor()], "outputs": [{"name": "exit"}] * 2}, "exit"),
        (
            {"inputs": [tensor()], "outputs": [{"name": "exit", "parameters": {"binary_data": 1}}]},
            "binary_data",
        ),
        (
            {
                "inputs": [tensor()],
                "outputs": [{"name": "class", "parameters": {"classification": 3}}],
            },
            "classification",
        ),
    ],
)
def test_another_request_is_refused(values, named):
    with pytest.raises(Refused) as caught:
        read(values)
    assert caught.value.status == 400
    assert_names(str(caught.value), named)


@pytest.mark.parametrize("declared", [23, 25, -24, 24.0, "24", True])
def test_another_size_of_the_binary_data(declared):
    one = {**BINARY, "parameters": {"binary_data_size": declared}}
    with pytest.raises(Refused) as caught:
        read({"inputs": [one]}, IMAGES.tobytes())
    assert_names(str(caught.value), 24, "binary_data_size")


@pytest.mark.parametrize("length", ["", "x", "-1", "1e2", "999999", "9" * 5000, "²"])
def test_another_length_of_the_json(length):
    with pytest.raises(Refused) as caught:
        read({"inputs": [BINARY]}, IMAGES.tobytes(), length)
    assert_names(str(caught.value), protocol.HEADER_LENGTH)


def test_bytes_that_belong_to_no_tensor():
    with pytest.raises(Refused) as caught:
        read({"inputs": [tensor()]}, b"abc")
    assert_names(str(caught.value), 3)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"id": NaN}', b"9" * 5000, b'{"id": 1}{}'],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_not_json(text):
    with pytest.raises(Refused) as caught:
        protocol.read_request(text, None, MODEL, 8)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


def test_too_many_images():
    with pytest.raises(Refused) as caught:
        read({"inputs": [tensor(shape=[10**12, 3, 2, 2])]})
    assert caught.value.status == 413
    assert_names(str(caught.value), 10**12, 8)


class TestWriting:
    def request(self, **outputs: bool) -> protocol.InferRequest:
        return protocol.InferRequest(IMAGES, outputs, "7")

    def test_numbers(self):
        every = self.request(**dict.fromkeys(protocol.OUTPUTS, False))
        body, length = protocol.write_response(every, MODEL, LOGITS, EXITS)
        assert length is None
        values = json.loads(body)
        confidence = confidence_of(LOGITS).tolist()
        assert values == {
            "model_name": "mine",
            "id": "7",
            "outputs": [
                {
                    "name": "logits",
                    "datatype": "FP32",
                    "shape": [2, 4],
                    "data": [0, 1, 2.5, 1, 4, 0, 0, 0],
                },
                {"name": "class", "datatype": "INT64", "shape": [2], "data": [2, 0]},
                {"name": "confidence", "datatype": "FP32", "shape": [2], "data": confidence},
                {"name": "exit", "datatype": "INT64", "shape": [2], "data": [1, 0]},
            ],
        }

    def test_binary_data_follow_the_json_in_the_order_of_the_outputs(self):
        some = self.request(exit=True, logits=True)
        body, length = protocol.write_response(some, MODEL, LOGITS, EXITS)
        values = json.loads(body[:length])
        assert [one["parameters"]["binary_data_size"] for one in values["outputs"]] == [16, 32]
        assert np.array_equal(np.frombuffer(body[length:][:16], "<i8"), EXITS)
        assert np.array_equal(np.frombuffer(body[length:][16:], "<f4").reshape(2, 4), LOGITS)

    def test_what_json_cannot_say_is_an_error(self):
        with pytest.raises(ValueError):
            protocol.write_response(self.request(logits=False), MODEL, LOGITS * np.nan, EXITS)


def test_the_metadata():
    assert protocol.server_metadata()["extensions"] == ["binary_tensor_data"]
    found = protocol.model_metadata(MODEL)
    assert found["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 3, 2, 2]}]
    assert [one["shape"] for one in found["outputs"]] == [[-1, 4], [-1], [-1], [-1]]
