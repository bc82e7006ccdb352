"""A real server process under load: every answer is the right one, and memory does not grow."""

import http.client
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import TASK
from server_process import PATIENCE

import early_exit
from early_exit.config import DataConfig
from early_exit.manifest import Manifest
from early_exit.serving.protocol import HEADER_LENGTH

OUTPUTS = {"class": np.int64, "exit": np.int64, "logits": np.float32}


@dataclass(frozen=True)
class Pool:
    """Images (B, C, H, W) uint8, and what the classifier says of them."""

    images: np.ndarray
    classes: np.ndarray
    exit_index: np.ndarray
    logits: np.ndarray
    slack: np.ndarray
    """(B,): how far the logits of two runs can be apart."""


@pytest.fixture(scope="module")
def pool(deployed_model) -> Pool:
    """Blends of two pictures of test each, as different as to take all exits.

    Left out are those whose answer may depend on rounding, and those whose logits are so much like
    another's that it could be taken for theirs.
    """
    rng, data = np.random.default_rng(0), TASK.load_data(DataConfig(dataset="digits"))
    pictures = np.stack([data.picture("test", index) for index in range(60)]).transpose(0, 3, 1, 2)
    first, second = rng.integers(0, len(pictures), (2, 256))
    weight = rng.uniform(size=(256, 1, 1, 1))
    blended = weight * pictures[first] + (1 - weight) * pictures[second]
    images = np.rint(blended).astype(np.uint8)

    classify = early_exit.load(deployed_model, threads=1)
    answers = classify.answer(images)
    # the manifest bounds the difference from one exact run, relative to the exit's largest logit
    slack, near = np.zeros(len(images)), np.zeros(len(images), bool)
    features, state = classify.manifest.input.array(images), None
    for (index, segment), temperature in zip(classify.segments, classify.policy.temperatures):
        features, logits, _, score, state = segment(features, temperature, state)
        most = 2 * float(np.abs(logits).max()) * Manifest.read(deployed_model).check["tolerance"]
        slack[answers.exit_index == index] = most
        if index < len(classify.policy.thresholds):
            # a probability moves by less than the logits, divided by the temperature
            close = np.abs(score - classify.policy.thresholds[index]) < most / temperature
            near |= close & (answers.exit_index >= index)
    best = np.sort(answers.logits)[:, -2:]
    near |= best[:, 1] - best[:, 0] < 2 * slack
    apart = np.abs(answers.logits[:, None] - answers.logits).max(-1)
    np.fill_diagonal(apart, np.inf)
    near |= apart.min(1) < 2 * slack
    kept = ~near
    assert kept.sum() > 200 and np.bincount(answers.exit_index[kept]).min() > 20
    parts = (images, answers.classes, answers.exit_index, answers.logits, slack)
    return Pool(*(part[kept] for part in parts))


def infer(connection: http.client.HTTPConnection, images: np.ndarray, name: str) -> dict:
    """The outputs for images, as binary tensors over a connection that is kept."""
    one = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
    one["parameters"] = {"binary_data_size": images.nbytes}
    outputs = [{"name": output, "parameters": {"binary_data": True}} for output in OUTPUTS]
    header = json.dumps({"id": name, "inputs": [one], "outputs": outputs}).encode()
    connection.request(
        "POST",
        "/v2/models/mine/infer",
        header + images.tobytes(),
        {HEADER_LENGTH: str(len(header))},
    )
    response = connection.getresponse()
    content = response.read()
    assert response.status == 200, content
    offset = int(response.headers[HEADER_LENGTH])
    values = json.loads(content[:offset])
    assert values["id"] == name
    assert [output["name"] for output in values["outputs"]] == list(OUTPUTS)
    found = {}
    for output, (key, kind) in zip(values["outputs"], OUTPUTS.items(), strict=True):
        size = output["parameters"]["binary_data_size"]
        found[key] = np.frombuffer(content[offset : offset + size], kind).reshape(output["shape"])
        offset += size
    assert offset == len(content)
    return found


def in_parallel(port: int, clients: int, requests: Sequence, send) -> None:
    """Shares requests out to clients, each with a connection of its own, and waits for all. send:
    called with the connection and a request."""

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        for request in requests[number::clients]:
            send(connection, request)
        connection.close()

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))


def metrics(port: int) -> str:
    """What the server counted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


@pytest.mark.slow
def test_10_000_requests_of_64_clients(deployed_model, pool, start):
    """Each row has its own logits, class and exit: nothing is lost, doubled or given to another."""
    server = start(deployed_model, "--workers", 2)
    rng = np.random.default_rng(1)
    requests = [
        (f"request {number}", rng.integers(0, len(pool.images), rng.integers(1, 9)))
        for number in range(10_000)
    ]

    def send(connection: http.client.HTTPConnection, request: tuple[str, np.ndarray]) -> None:
        name, rows = request
        found = infer(connection, pool.images[rows], name)
        assert found["class"].tolist() == pool.classes[rows].tolist()
        assert found["exit"].tolist() == pool.exit_index[rows].tolist()
        differences = np.abs(found["logits"] - pool.logits[rows]).max(1)
        assert (differences <= pool.slack[rows]).all()

    in_parallel(server.port, 64, requests, send)
    lines = metrics(server.port).splitlines()
    route = 'route="/v2/models/{name}/infer"'
    assert f'early_exit_requests_total{{{route},status="200"}} 10000.0' in lines
    assert "early_exit_rows_in_flight 0.0" in lines
    sent = np.bincount(pool.exit_index[np.concatenate([rows for _, rows in requests])])
    for name, count in zip(Manifest.read(deployed_model).exit_names, sent, strict=True):
        assert f'early_exit_answered_rows_total{{exit="{name}"}} {float(count)}' in lines
    assert server.stop() == 0
    assert list(server.log.queue) == []


def resident(pid: int) -> int:
    """The bytes of a process in memory that belong to no file."""
    with open(f"/proc/{pid}/status") as status:
        return 1024 * int(re.search(r"^RssAnon:\s+(\d+) kB$", status.read(), re.MULTILINE)[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_over_100_000_rows(deployed_model, pool, start, monkeypatch):
    """It grows by less than 4 MB in the second half.

    What could be kept of a row is an answer or more: its logits alone, an array of ten numbers,
    take over 100 bytes, which would be 5 MB for 50,000 rows. What may vary is what the allocators
    keep of freed memory: the first half brings it to its height, and with one arena, as set here,
    it does not depend on which threads the work fell to.
    """
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    server = start(deployed_model, "--max-batch", 32)
    rows = np.arange(16)
    requests = [rows + 16 * (number % 12) for number in range(50_000 // len(rows))]

    def send(connection: http.client.HTTPConnection, request: np.ndarray) -> None:
        assert len(infer(connection, pool.images[request], "")["class"]) == len(rows)

    found = []
    for _ in range(2):
        in_parallel(server.port, 8, requests, send)
        found.append(resident(server.process.pid))
    assert found[1] - found[0] < 4_000_000, found
    answered = re.findall(
        r"^early_exit_answered_rows_total\{.*\} (\S+)$", metrics(server.port), re.M
    )
    assert sum(map(float, answered)) == 100_000
    assert server.stop() == 0
