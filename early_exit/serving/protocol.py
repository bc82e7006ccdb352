"""The Open Inference Protocol (KServe v2) over HTTP, with the extension for binary tensors, which
Triton's clients use. Pure functions from bytes to arrays and back.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np

import early_exit
from early_exit.deployed import confidence_of
from early_exit.serving.refused import Refused
from early_exit.system.text import shortened

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The header with the length of the JSON, after which the binary tensors follow."""
BINARY = "application/octet-stream"
INPUT = "images"
OUTPUTS = {
    "logits": ("FP32", np.float32),
    "class": ("INT64", np.int64),
    "confidence": ("FP32", np.float32),
    "exit": ("INT64", np.int64),
}
"""The outputs: the protocol's name of the type, and numpy's."""
UNSUPPORTED = ("classification", "shared_memory_region")
"""Parameters of extensions that this server lacks, and that change what the data mean."""


@dataclass(frozen=True)
class Signature:
    """What a client has to know about a model."""

    name: str
    platform: str
    shape: tuple[int, int, int]
    """Of an image, (C, H, W)."""
    num_classes: int


@dataclass(frozen=True)
class InferRequest:
    """A request that was read."""

    images: np.ndarray
    """(B, C, H, W) uint8."""
    outputs: Mapping[str, bool]
    """The outputs to send, and whether each is sent as binary data."""
    id: str | None


def server_metadata() -> dict[str, Any]:
    """What GET /v2 answers."""
    return {
        "name": "early-exit",
        "version": early_exit.__version__,
        "extensions": ["binary_tensor_data"],
    }


def model_metadata(model: Signature) -> dict[str, Any]:
    """What GET /v2/models/NAME answers."""
    shapes = {"logits": [-1, model.num_classes]}
    return {
        "name": model.name,
        "versions": [],
        "platform": model.platform,
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *model.shape]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shapes.get(name, [-1])}
            for name, (datatype, _) in OUTPUTS.items()
        ],
    }


def read_request(
    body: bytes, header_length: str | None, model: Signature, max_images: int
) -> InferRequest:
    """The request in a body.

    header_length: the header `HEADER_LENGTH`; without it the whole body is JSON. Raises Refused for
    everything that is not such a request (400) and for too many images (413).
    """
    length = _header_length(header_length, len(body))
    values = _object(_json(body[:length]), "the request")
    identifier = values.get("id")
    if not isinstance(identifier, str | None):
        _refuse("id must be a string")
    inputs = values.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        _refuse(f"inputs must be a list of one tensor, {INPUT}")
    tensor = _object(inputs[0], "the input")
    shape = _check_input(tensor, model, max_images)
    parameters = _parameters(tensor, "the input")
    if "binary_data_size" in parameters:
        if "data" in tensor:
            _refuse("the input has data and binary_data_size; expected one of them")
        images = _binary(body[length:], parameters["binary_data_size"], shape)
    elif len(body) > length:
        _refuse(
            f"{len(body) - length} bytes follow the JSON, and the input has no binary_data_size"
        )
    else:
        images = _numbers(tensor.get("data"), shape)
    return InferRequest(images, _outputs(values), identifier)


def write_response(
    request: InferRequest, model: Signature, logits: np.ndarray, exit_index: np.ndarray
) -> tuple[bytes, int | None]:
    """The body of a response, and the length of the JSON in it if binary tensors follow.

    logits: (B, K); exit_index: (B,). Raises ValueError if a number in JSON would not be finite.
    """
    arrays = {
        "logits": logits,
        "class": logits.argmax(-1),
        "confidence": confidence_of(logits),
        "exit": exit_index,
    }
    outputs, binary = [], []
    for name, as_binary in request.outputs.items():
        datatype, kind = OUTPUTS[name]
        array = arrays[name].astype(kind)
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if as_binary:
            binary.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    values: dict[str, Any] = {"model_name": model.name, "outputs": outputs}
    if request.id is not None:
        values["id"] = request.id
    header = json.dumps(values, allow_nan=False).encode()
    return b"".join([header, *binary]), len(header) if binary else None


def _refuse(message: str) -> NoReturn:
    raise Refused(400, message)


def _header_length(given: str | None, size: int) -> int:
    if given is None:
        return size
    # more digits than a length has would take Python long to convert
    if not (given.isascii() and given.isdigit() and len(given) < 20 and int(given) <= size):
        _refuse(f"{HEADER_LENGTH} is {shortened(given, 40)}, and the body has {size} bytes")
    return int(given)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"the body is not JSON ({shortened(error, 120)})")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} must be an object")
    return value


def _parameters(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    parameters = _object(values.get("parameters", {}), f"the parameters of {what}")
    for name in UNSUPPORTED:
        if name in parameters:
            _refuse(f"{what} has the parameter {name}, of an extension that this server lacks")
    return parameters


def _check_input(
    tensor: Mapping[str, Any], model: Signature, max_images: int
) -> tuple[int, int, int, int]:
    """The shape of the input, which is as it should be."""
    for name, expected in (("name", INPUT), ("datatype", "UINT8")):
        if tensor.get(name) != expected:
            found = shortened(tensor.get(name), 40)
            _refuse(f"the {name} of the input is {found}; expected {expected}")
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or any(type(size) is not int for size in shape)
        or tuple(shape[1:]) != model.shape
        or shape[0] < 1
    ):
        expected = ", ".join(map(str, model.shape))
        _refuse(f"the shape of the input is {shortened(shape, 60)}; expected [B, {expected}]")
    if shape[0] > max_images:
        raise Refused(413, f"the input has {shape[0]} images; at most {max_images} are accepted")
    return shape[0], *model.shape


def _binary(data: bytes, declared: Any, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    if type(declared) is not int or not declared == len(data) == size:
        _refuse(
            f"the input needs {size} bytes; binary_data_size is {shortened(declared, 40)}, and"
            f" {len(data)} bytes follow the JSON"
        )
    return np.frombuffer(data, np.uint8).reshape(shape).copy()  # which can be written to


def _numbers(data: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array from JSON: a list of all numbers, or lists as deep as the shape."""
    try:
        if not isinstance(data, list):
            raise TypeError
        if data and isinstance(data[0], list):
            for size in shape[1:]:
                if any(len(part) != size for part in data):
                    raise ValueError
                data = list(chain.from_iterable(data))
        values = bytes(data)  # raises for all but numbers from 0 to 255
        return np.frombuffer(values, np.uint8).reshape(shape).copy()
    except (TypeError, ValueError, OverflowError):
        count = int(np.prod(shape))
        _refuse(f"the data of the input must be {count} integers from 0 to 255")


def _outputs(values: Mapping[str, Any]) -> dict[str, bool]:
    """The outputs that a request names, all if it names none."""
    default = _flag(_parameters(values, "the request"), "binary_data_output", False)
    outputs: dict[str, bool] = {}
    requested = values.get("outputs", [])
    if not isinstance(requested, list):
        _refuse("outputs must be a list")
    for one in requested:
        name = _object(one, "an output").get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            _refuse(f"there is no output {shortened(name, 40)}; outputs are {', '.join(OUTPUTS)}")
        if name in outputs:
            _refuse(f"the output {name} is named twice")
        outputs[name] = _flag(_parameters(one, f"the output {name}"), "binary_data", default)
    return outputs or dict.fromkeys(OUTPUTS, default)


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        _refuse(f"{name} must be true or false")
    return value
