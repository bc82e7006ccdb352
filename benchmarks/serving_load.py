"""The open-loop client of benchmarks/serving.py: requests are sent at times that do not depend on
the answers. Imports no torch."""

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from serving_arms import MODEL

from early_exit.serving.protocol import BINARY, HEADER_LENGTH, INPUT

CONNECTIONS = 900  # at most, below the usual limit of open files
PATIENCE = 120.0  # seconds after the last request was due


@dataclass(frozen=True)
class Reply:
    """What came back for a request. Times are seconds from the beginning of the load."""

    due: float
    """When the request was to be sent."""
    begun: float
    """When the client began to send it, or to wait for one of its connections."""
    done: float
    status: int
    """0: the connection ended."""
    body: bytes


@dataclass(frozen=True)
class Latencies:
    """What the clients of a server saw at one rate."""

    requests: int
    answered: int
    """Of these requests."""
    rejected: int
    """With status 503."""
    failed: int
    """In another way."""
    answers_per_second: float
    """That arrived while these requests were sent, to earlier ones too."""
    p50: float
    """Seconds from when a request was due to its answer, of those answered; NaN if there are none.
    """
    p99: float
    accuracy: float | None
    """Of the answers; None without classes to compare with."""
    late_p99: float
    """Seconds between when a request was due and when the client began with it: the client's part
    of the latency."""


def arrival_times(rate: float, seconds: float, seed: int) -> np.ndarray:
    """The times of Poisson arrivals in [0, seconds), rising; rate: per second on average."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def percentile(values: Sequence[float], share: float) -> float:
    """The lowest of the values that at least this share of them does not exceed; NaN of none."""
    if not len(values):
        return float("nan")
    return float(np.quantile(values, share, method="inverted_cdf"))


def tensor_request(image: np.ndarray) -> bytes:
    """A request of the Open Inference Protocol; image: (C, H, W) uint8."""
    tensor = {
        "name": INPUT,
        "datatype": "UINT8",
        "shape": [1, *image.shape],
        "parameters": {"binary_data_size": image.size},
    }
    header = json.dumps({"inputs": [tensor], "outputs": [{"name": "class"}]}).encode()
    extra = f"{HEADER_LENGTH}: {len(header)}\r\n"
    return http_post(f"/v2/models/{MODEL}/infer", BINARY, extra, header + image.tobytes())


def png_request(image: np.ndarray) -> bytes:
    """A request to /v1/classify with a PNG file; image: (3, H, W) uint8."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return http_post("/v1/classify", "image/png", "", file.getvalue())


def http_post(path: str, content_type: str, headers: str, body: bytes) -> bytes:
    """A request; headers: further ones, each with its line's end."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def class_of(body: bytes) -> int:
    """The class in the answer to either request."""
    values = json.loads(body)
    if "outputs" in values:
        return values["outputs"][0]["data"][0]
    return values["predictions"][0]["class_index"]


def send_all(
    port: int, requests: Sequence[bytes], due: np.ndarray, connections: int = CONNECTIONS
) -> list[Reply]:
    """Sends each request to a server of this machine when it is due, or later when one of the
    connections is free, and gives the replies in the order of the requests. Raises TimeoutError if
    they do not come."""
    return asyncio.run(_send_all(port, requests, due, connections))


def answers_per_second(port: int, requests: Sequence[bytes], connections: int) -> float:
    """What a server answers of requests that are sent as soon as one of the connections is free.
    The first fifth of the requests is the warm-up."""
    replies = send_all(port, requests, np.zeros(len(requests)), connections)
    done = sorted(reply.done for reply in replies if reply.status == 200)
    first = len(done) // 5
    return (len(done) - 1 - first) / (done[-1] - done[first])


async def _send_all(
    port: int, requests: Sequence[bytes], due: np.ndarray, connections: int
) -> list[Reply]:
    loop, idle = asyncio.get_running_loop(), _Connections(port, connections)
    begin = loop.time() + 0.05
    tasks = []
    for request, time in zip(requests, due.tolist(), strict=True):
        await asyncio.sleep(max(0.0, begin + time - loop.time()))
        tasks.append(loop.create_task(_send(idle, request, time, begin)))
    try:
        return await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
    finally:
        idle.close()


async def _send(connections: "_Connections", request: bytes, due: float, begin: float) -> Reply:
    clock = asyncio.get_running_loop().time
    begun = clock() - begin
    async with connections.free:
        try:
            reader, writer = await connections.open()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
        except (OSError, EOFError):
            return Reply(due, begun, clock() - begin, 0, b"")
        connections.idle.append((reader, writer))
    return Reply(due, begun, clock() - begin, int(head[9:12]), body)


class _Connections:
    """Connections that are kept for the next request."""

    def __init__(self, port: int, count: int) -> None:
        self.port = port
        self.free = asyncio.Semaphore(count)
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection used last that is idle and was not closed by the server, or a new one."""
        while self.idle:
            reader, writer = self.idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port)

    def close(self) -> None:
        """Closes those that are idle."""
        for _, writer in self.idle:
            writer.close()


def summary(
    replies: Sequence[Reply], begin: float, seconds: float, target: Sequence[int] | None
) -> Latencies:
    """What is told of the requests that were due in `seconds` seconds from `begin` on.

    target: the class of the image in each request.
    """
    end = begin + seconds
    counted = [number for number, reply in enumerate(replies) if begin <= reply.due < end]
    answered = [number for number in counted if replies[number].status == 200]
    rejected = sum(replies[number].status == 503 for number in counted)
    latencies = [replies[number].done - replies[number].due for number in answered]
    late = [replies[number].begun - replies[number].due for number in counted]
    accuracy = None
    if target is not None and answered:
        right = [class_of(replies[number].body) == target[number] for number in answered]
        accuracy = sum(right) / len(right)
    arrived = sum(reply.status == 200 and begin <= reply.done < end for reply in replies)
    return Latencies(
        requests=len(counted),
        answered=len(answered),
        rejected=rejected,
        failed=len(counted) - len(answered) - rejected,
        answers_per_second=arrived / seconds,
        p50=percentile(latencies, 0.5),
        p99=percentile(latencies, 0.99),
        accuracy=accuracy,
        late_p99=percentile(late, 0.99),
    )
