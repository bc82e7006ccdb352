"""200 malformed requests: each is answered with an error of the client, in one line."""

import json
import random

import numpy as np
from fakes import SHAPE, call, picture

SIZE = int(np.prod(SHAPE))


def broken_picture(rng: random.Random) -> bytes:
    """Bytes that are no image, or a file that is cut within its header."""
    content = picture((200, 30, 30), kind=rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    return rng.choice([rng.randbytes(rng.randint(1, 500)), content[: rng.randint(1, 20)]])


def broken_upload(rng: random.Random) -> dict:
    """An upload of one image."""
    kind = rng.choice(["image/png", "image/jpeg", "image/nothing"])
    return {"content": broken_picture(rng), "headers": {"content-type": kind}}


def broken_form(rng: random.Random) -> dict:
    """A form with a part that is no image, or that is no form."""
    boundary = rng.choice(["x", "-----", "a b"])
    parts = [picture((0, 0, 9))] * rng.randint(0, 2) + [broken_picture(rng)]
    body = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="i"\r\n\r\n%s\r\n'
        % (boundary.encode(), part)
        for part in parts
    )
    end = b"--%s--\r\n" % boundary.encode()
    body = rng.choice([body + end, body, body[rng.randint(1, 9) :] + end, end, rng.randbytes(99)])
    header = f'multipart/form-data; boundary="{boundary}"'
    return {"content": body, "headers": {"content-type": header}}


def broken_type(rng: random.Random) -> dict:
    """An image under another type."""
    kinds = [
        "",
        "text/html",
        "application/json",
        "multipart/mixed; boundary=x",
        "\xff",
        ";",
        "image",
    ]
    kind = rng.choice(kinds).encode("latin-1")
    return {"content": picture((9, 9, 9)), "headers": [(b"content-type", kind)]}


def broken_inference(rng: random.Random) -> dict:
    """An inference request with something else in the place of one of its values."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, *SHAPE], "data": [7] * SIZE}
    wrong = rng.choice([None, -1, 1.5, "x", [], {}, [[]], [None], {"a": {}}, 10**40, [300] * SIZE])
    values = {"inputs": [{**tensor, rng.choice(list(tensor)): wrong}]}
    return {"url": "/v2/models/mine/infer", "content": json.dumps(values).encode()}


def broken_text(rng: random.Random) -> dict:
    """What is not JSON, or has a wrong length of its JSON."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, *SHAPE], "data": [7] * SIZE}
    text = json.dumps({"inputs": [tensor]}).encode()
    length = rng.choice(["0", "-3", str(len(text) - 1), str(len(text) + 1), "x", "1" * 30])
    return rng.choice(
        [
            {"url": "/v2/models/mine/infer", "content": text[: rng.randint(1, len(text) - 1)]},
            {"url": "/v2/models/mine/infer", "content": rng.randbytes(rng.randint(1, 300))},
            {
                "url": "/v2/models/mine/infer",
                "content": text,
                "headers": {"Inference-Header-Content-Length": length},
            },
        ]
    )


KINDS = (broken_upload, broken_form, broken_type, broken_inference, broken_text)


def malformed(count: int = 200, seed: int = 0) -> list[dict]:
    """The requests, as `call` takes them."""
    rng = random.Random(seed)
    base = {"method": "POST", "url": "/v1/classify"}
    return [{**base, **KINDS[number % len(KINDS)](rng)} for number in range(count)]


def test_malformed_requests(app, service):
    good = {
        "method": "POST",
        "url": "/v1/classify",
        "content": picture((200, 30, 30)),
        "headers": {"content-type": "image/png"},
    }
    *responses, last = call(app, *malformed(), good)
    assert len(responses) == 200
    for response in responses:
        assert 400 <= response.status_code < 500, response.request.content
        assert len(response.json()["error"].splitlines()) == 1
    assert {response.status_code for response in responses} >= {400, 415, 422}
    assert last.json()["predictions"][0]["class"] == "red"
    assert service.admission.rows == service.admission.bytes == 0
