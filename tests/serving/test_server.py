"""The command, and a real server process on loopback."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes import colour_model
from helpers import ROOT, assert_names, refusal, wait_for
from server_process import PATIENCE
from test_malformed import malformed

import early_exit
from early_exit import serve
from early_exit.manifest import Manifest
from early_exit.serving.engine import EngineSettings
from early_exit.serving.limits import Limits


@pytest.fixture
def expected(deployed_model, photos):
    """The files of the photos, and what `predict` says of them."""
    classify = early_exit.load(deployed_model, threads=1)
    files = sorted(photos.rglob("*.png"))
    return [file.read_bytes() for file in files], classify(files)


def slack(model: Path) -> float:
    """How far two confidences can be apart: see tests/test_deployed.py."""
    return 2 * 40 * Manifest.read(model).check["tolerance"]


def assert_predicted(found: list[dict], expected: list, tolerance: float) -> None:
    """What /v1/classify says is what `predict` says."""
    assert [one["class"] for one in found] == [one.name for one in expected]
    assert [one["exit"] for one in found] == [one.exit for one in expected]
    assert [one["macs_share"] for one in found] == [one.macs_share for one in expected]
    confidence = [one.confidence for one in expected]
    assert [one["confidence"] for one in found] == pytest.approx(confidence, abs=tolerance)


@pytest.mark.slow
def test_requests_of_many_clients(deployed_model, expected, start):
    """Each is answered as by `predict`, whatever runs together."""
    import httpx

    server = start(deployed_model, "--workers", 2)
    assert_names(server.line, "onnxruntime", "2 workers", "1 thread", "8 images")
    files, predictions = expected
    tolerance = slack(deployed_model)
    pixels = Manifest.read(deployed_model).input
    images = np.stack([early_exit.load(deployed_model, threads=1).read(file) for file in files])

    def infer(client: httpx.Client, rows: list[int]) -> None:
        shape = [len(rows), *pixels.shape]
        data = images[rows].ravel().tolist()
        one = {"name": "images", "datatype": "UINT8", "shape": shape, "data": data}
        outputs = [{"name": name} for name in ("class", "exit", "confidence")]
        response = client.post(
            "/v2/models/mine/infer", json={"inputs": [one], "outputs": outputs}
        ).json()
        classes, exits, confidence = (output["data"] for output in response["outputs"])
        assert classes == [predictions[row].class_index for row in rows]
        assert exits == [predictions[row].exit_index for row in rows]
        assert confidence == pytest.approx(
            [predictions[row].confidence for row in rows], abs=tolerance
        )

    def classify(client: httpx.Client, rows: list[int]) -> None:
        if len(rows) == 1:
            kind = {"content-type": "image/png"}
            response = client.post("/v1/classify", content=files[rows[0]], headers=kind)
        else:
            parts = [("image", ("x.png", files[row], "image/png")) for row in rows]
            response = client.post("/v1/classify", files=parts)
        assert_predicted(
            response.json()["predictions"], [predictions[row] for row in rows], tolerance
        )

    def client(seed: int) -> int:
        rng = np.random.default_rng(seed)
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            for number in range(25):
                rows = rng.integers(0, len(files), rng.integers(1, 6)).tolist()
                (classify if number % 2 else infer)(client, rows)
        return 25

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(client, range(16))) == 400
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'early_exit_requests_total{route="/v1/classify",status="200"} 192.0' in metrics
    assert "early_exit_rows_in_flight 0.0" in metrics
    assert 'early_exit_val_share{exit="final"}' in metrics
    assert server.stop() == 0
    assert list(server.log.queue) == []


def begin_upload(port: int, body: bytes) -> socket.socket:
    """A connection whose request the server has begun to read: it asks for the body."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    head = (
        "POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode())
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += connection.recv(1000)
    assert asked.startswith(b"HTTP/1.1 100")
    return connection


def is_refused(port: int) -> bool:
    """Whether new connections are refused."""
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except OSError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_accepted_is_answered_after_a_signal(deployed_model, expected, start, number):
    server = start(deployed_model)
    files, predictions = expected
    connections = [begin_upload(server.port, file) for file in files]
    server.process.send_signal(number)
    wait_for(lambda: is_refused(server.port), "the end of the listening socket")
    for connection, file in zip(connections, files):
        connection.sendall(file)
    for connection, prediction in zip(connections, predictions):
        answer = b""
        while part := connection.recv(10_000):  # until the server closes the connection
            answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert_predicted(json.loads(body)["predictions"], [prediction], slack(deployed_model))
        connection.close()
    assert server.wait() == 0
    assert list(server.log.queue) == []


@pytest.mark.slow
def test_a_client_that_does_not_finish_does_not_hold_up_the_end(deployed_model, start):
    server = start(deployed_model, "--grace", 2)
    with contextlib.closing(begin_upload(server.port, b"x" * 100)) as connection:
        assert server.stop() == 0
        assert connection.recv(1000).startswith(b"HTTP/1.1 503")
    (line,) = server.log.queue
    assert "Traceback" not in line


@pytest.mark.slow
def test_an_image_that_still_waits_at_the_end_of_the_grace_period(deployed_model, expected, start):
    import httpx

    server = start(deployed_model, "--grace", 2, "--max-wait", 60_000, "--target-p99", 100_000)
    file, url = expected[0][0], f"{server.url}/metrics"
    with contextlib.closing(begin_upload(server.port, file)) as connection:
        connection.sendall(file)
        waiting = "early_exit_rows_in_flight 1.0"
        wait_for(lambda: waiting in httpx.get(url).text, "the image in the queue")
        assert server.stop() == 1
        assert connection.recv(1000).startswith(b"HTTP/1.1 503")
    (line,) = [line for line in server.log.queue if "--grace" in line]
    assert_names(line, 2)


@pytest.mark.slow
def test_the_policy_is_read_again(deployed_copy, expected, start):
    import httpx

    server = start(deployed_copy)
    files, _ = expected
    path = deployed_copy / "policy.yaml"
    values = yaml.safe_load(path.read_text())

    def exits() -> set[str]:
        found = set()
        for file in files:
            kind = {"content-type": "image/png"}
            response = httpx.post(f"{server.url}/v1/classify", content=file, headers=kind)
            found |= {one["exit"] for one in response.json()["predictions"]}
        return found

    def reload(thresholds: list, line: str) -> None:
        path.write_text(yaml.safe_dump({**values, "thresholds": thresholds}))
        server.process.send_signal(signal.SIGHUP)
        assert line in server.log.get(timeout=PATIENCE)

    assert len(exits()) > 1
    reload([0.1, 0.1], "read again")
    assert exits() == {"layer1"}
    reload([float("inf")] * 2, "read again")
    assert exits() == {"final"}
    reload([7.0, 0.1], "stays as it was")
    assert exits() == {"final"}
    reload([0.1], "stays as it was")
    assert exits() == {"final"}
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client(deployed_model, expected, start, binary):
    triton = pytest.importorskip("tritonclient.http")
    server = start(deployed_model)
    files, predictions = expected
    classify = early_exit.load(deployed_model, threads=1)
    images = np.stack([classify.read(file) for file in files])
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("mine")
    metadata = client.get_model_metadata("mine")
    assert metadata["inputs"][0]["shape"] == [-1, *images.shape[1:]]
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    names = ["exit", "class", "logits", "confidence"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    for requested in (None, outputs):
        found = client.infer("mine", [tensor], outputs=requested, request_id="seven")
        assert found.get_response()["id"] == "seven"
        assert found.as_numpy("class").tolist() == [one.class_index for one in predictions]
        assert found.as_numpy("exit").tolist() == [one.exit_index for one in predictions]
        assert found.as_numpy("confidence") == pytest.approx(
            [one.confidence for one in predictions], abs=slack(deployed_model)
        )
        assert found.as_numpy("logits").dtype == np.float32
    with pytest.raises(triton.InferenceServerException, match="other"):
        client.get_model_metadata("other")
    client.close()


@pytest.mark.slow
def test_malformed_requests_end_nothing(deployed_model, expected, start):
    import httpx

    server = start(deployed_model, "--max-body", 100_000)
    files, predictions = expected
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        for request in malformed():
            assert 400 <= client.request(**request).status_code < 500
        too_large = client.post(
            "/v1/classify", content=b"x" * 150_000, headers={"content-type": "image/png"}
        )
        assert_names(too_large.json()["error"], 100_000)
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nLong: " + b"x" * 20_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            connection.sendall(garbage + b"\r\n\r\n")
            # 431 if all headers arrive at once
            assert connection.recv(1000).split()[1] in (b"400", b"431")
    kind = {"content-type": "image/png"}
    response = httpx.post(f"{server.url}/v1/classify", content=files[0], headers=kind)
    assert_predicted(response.json()["predictions"], predictions[:1], slack(deployed_model))
    assert server.stop() == 0


@pytest.mark.parametrize("whole", [0, 1])
def test_a_client_that_does_not_finish_its_headers_is_disconnected(monkeypatch, app, whole):
    """At its first request, and after one that was answered."""
    uvicorn = pytest.importorskip("uvicorn")
    from uvicorn.server import ServerState

    from early_exit.serving import server

    monkeypatch.setattr(server, "HEADER_SECONDS", 0.05)

    async def run() -> bytes:
        # uvicorn's own limit, of a connection that is idle after an answer, must not end it
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_keep_alive=3600)
        config.load()
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(
            lambda: server.Connection(config, ServerState(), {}), "127.0.0.1", 0
        )
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(whole * request + request[:-2])
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        listening.close()
        return answer

    answer = asyncio.run(run())
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"HTTP/1.1 ") == whole


def test_torch_is_not_needed():
    for package in serve.PACKAGES:
        pytest.importorskip(package)
    code = "import sys; sys.modules['torch'] = None; import early_exit.serve"
    code += ", early_exit.serving.server"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the second bind fails")
def test_two_servers_that_load_at_the_same_time(service, model, tmp_path):
    """Both have the port until one of them listens."""
    pytest.importorskip("uvicorn")
    from early_exit.serving import server
    from early_exit.serving.policies import Policies

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.bind("127.0.0.1", 0))
        port = first.getsockname()[1]
        second = stack.enter_context(server.bind("127.0.0.1", port))
        first.listen()
        policies = Policies(service.engine, model.manifest, tmp_path, None, 0.25)
        made = server.serve(service, policies, second, 2, "ready")
        assert_names(refusal(asyncio.run, made), port, "in use", "--port")


@pytest.mark.slow
def test_a_model_that_can_adapt(deployed_model, start):
    server = start(deployed_model, "--adapt", "--max-drop", 100)
    assert server.stop() == 0


class TestFlags:
    def test_each_reaches_what_it_sets(self, monkeypatch, tmp_path):
        for package in serve.PACKAGES:
            pytest.importorskip(package)
        from early_exit.serving import server

        (tmp_path / "model.json").touch()
        made, loaded = {}, []

        def load(directory, **options):
            loaded.append((directory, options))
            return colour_model()

        async def serve_once(service, policies, listener, grace, announce):
            made.update(service=service, policies=policies, grace=grace)
            service.close()
            service.engine.close(PATIENCE)
            listener.close()

        monkeypatch.setattr(serve.deployed, "load", load)
        monkeypatch.setattr(server, "serve", serve_once)
        numbers = {
            **{"--port": 0, "--workers": 3, "--threads": 2, "--max-batch": 5, "--max-wait": 7},
            **{"--target-p99": 90, "--max-rows": 70, "--max-body": 1000, "--max-images": 6},
            **{"--max-pixels": 4000, "--stall": 11, "--grace": 13},
        }
        flags = [word for pair in numbers.items() for word in map(str, pair)]
        serve.main([str(tmp_path), "--name", "mine", "--runtime", "openvino", *flags])
        assert loaded == [(tmp_path, {"runtime": "openvino", "threads": 2})]
        service = made["service"]
        assert service.engine._settings == EngineSettings(
            max_batch=5, workers=3, max_wait=0.007, max_rows=70, target=0.09
        )
        assert service.limits == Limits(max_body=1000, max_images=6, max_pixels=4000)
        assert (service.admission.max_rows, service.stall, made["grace"]) == (70, 11, 13)
        assert (made["policies"].max_drop, made["policies"].target) == (None, 0.09)

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["--workers", "0"], ("--workers", 1)),
            (["--port", "65536"], ("--port", 65536)),
            (["--max-wait", "nan"], ("--max-wait", "nan")),
            (["--max-wait", "250"], ("--max-wait", "--target-p99", 250)),
            (["--max-batch", "0"], ("--max-batch", 0)),
            (["--target-p99", "0"], ("--target-p99", 0)),
            (["--max-pixels", str(2**28 + 1)], ("--max-pixels", 2**28)),
            (["--grace", "1"], ("--grace", 2)),
            (["--max-images", "9", "--max-rows", "8"], ("--max-images", "--max-rows")),
            (["--adapt"], ("--adapt", "--max-drop")),
            (["--max-drop", "1"], ("--adapt", "--max-drop")),
            (["--name", "a/b"], ("--name", "a/b")),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_numbers_that_make_no_sense(self, tmp_path, flags, named):
        (tmp_path / "model.json").touch()
        assert_names(refusal(serve.main, [str(tmp_path), *flags]), *named)

    @pytest.mark.parametrize("host", ["0.0.0..0", "a" * 64])
    def test_what_is_not_a_host(self, tmp_path, host):
        pytest.importorskip("uvicorn")
        (tmp_path / "model.json").touch()
        assert_names(refusal(serve.main, [str(tmp_path), "--host", host]), host)

    def test_what_is_no_deployed_model(self, tmp_path):
        assert_names(refusal(serve.main, [str(tmp_path)]), tmp_path, "early_exit.export")

    def test_a_port_in_use(self, tmp_path):
        pytest.importorskip("uvicorn")
        (tmp_path / "model.json").touch()
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            message = refusal(serve.main, [str(tmp_path), "--port", str(port)])
        assert_names(message, port, "in use", "--port")
