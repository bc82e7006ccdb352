"""The routes, with an engine that does as the tests say."""

import asyncio
import dataclasses
import io
import json

import numpy as np
import pytest
from fakes import SHAPE, call, exchange, picture
from helpers import assert_names
from PIL import Image

from early_exit.inference.policy import Policy
from early_exit.serving.engine import Overloaded, SegmentFailed

PNG = {"content-type": "image/png"}
RED, GREY, BLUE = (250, 0, 0), (90, 91, 90), (0, 10, 240)


def classify(**options: object) -> dict:
    """A request to classify; one red picture, unless the options say otherwise."""
    given = {"method": "POST", "url": "/v1/classify", **options}
    if "files" not in given:
        given = {"content": picture(RED), "headers": PNG, **given}
    return given


def form(*files: bytes) -> list:
    """Pictures as the parts of a form."""
    return [("image", (f"{i}.png", file, "image/png")) for i, file in enumerate(files)]


def infer(values: object = None, **options: object) -> dict:
    """An inference request, of two black images unless other values are given."""
    size = int(np.prod(SHAPE))
    one = {"name": "images", "datatype": "UINT8", "shape": [2, *SHAPE], "data": [0] * 2 * size}
    values = {"inputs": [one]} if values is None else values
    return {"method": "POST", "url": "/v2/models/mine/infer", "json": values, **options}


def get(url: str) -> dict:
    """A request without a body."""
    return {"method": "GET", "url": url}


def refused(response, status: int) -> str:
    """The one line of an error."""
    assert response.status_code == status, response.text
    message = response.json()["error"]
    assert message and "\n" not in message
    return message


class TestClassify:
    def test_one_image(self, app, model, tmp_path):
        (response,) = call(app, classify())
        (tmp_path / "red.png").write_bytes(picture(RED))
        (expected,) = model([tmp_path / "red.png"])
        values = dataclasses.asdict(expected)
        assert response.json() == {
            "predictions": [
                {"class": values.pop("name"), **values, "queued_ms": 250, "computed_ms": 500}
            ]
        }

    def test_several_images_in_their_order(self, app, model):
        colours = [BLUE, GREY, RED]
        (response,) = call(app, classify(files=form(*map(picture, colours))))
        found = response.json()["predictions"]
        assert [one["class"] for one in found] == ["blue", "green", "red"]
        assert [one["exit"] for one in found] == ["layer1", "final", "layer1"]
        assert [one["macs_share"] for one in found] == [0.7, 1.1, 0.7]

    def test_an_image_is_rotated_as_in_predict(self, app, model):
        """Left half red, right half blue, on its side: the crop to a square takes the middle."""
        image = Image.new("RGB", (8, 24), RED)
        image.paste(BLUE, (0, 0, 8, 12))
        exif = Image.Exif()
        exif[0x0112] = 6
        content = io_bytes(image, exif=exif)
        (response,) = call(app, classify(content=content))
        (expected,) = model.predict([model.read(content)])
        assert response.json()["predictions"][0]["confidence"] == expected.confidence

    def test_a_class_whose_name_is_not_unicode(self, service, app):
        """As the name of a folder may be."""
        classes = ("caf\udce9", "green", "blue")
        service.model = dataclasses.replace(service.model, classes=classes)
        (response,) = call(app, classify())
        assert response.status_code == 200
        assert response.json()["predictions"][0]["class"] == "caf\udce9"

    def test_a_part_without_a_type(self, app):
        files = [("image", ("x", picture(BLUE), "application/octet-stream"))]
        (response,) = call(app, classify(files=files))
        assert response.json()["predictions"][0]["class"] == "blue"

    def test_a_name_in_a_form_is_not_looked_at(self, app, tmp_path):
        files = [("../../etc/passwd", ("/etc/passwd", picture(BLUE), "image/png"))]
        (response,) = call(app, classify(files=files))
        assert response.json()["predictions"][0]["class"] == "blue"


def io_bytes(image: Image.Image, **options: object) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


class TestLimits:
    def test_too_large_a_body_with_its_length(self, make_app):
        app = make_app(max_body=100)
        (response,) = call(app, classify(content=b"x" * 101))
        assert_names(refused(response, 413), 100)

    def test_too_large_a_body_in_chunks(self, make_app):
        app = make_app(max_body=100)

        async def chunks():
            for _ in range(30):
                yield b"x" * 10

        (response,) = call(app, classify(content=chunks()))
        assert_names(refused(response, 413), 100)
        assert response.headers["connection"] == "close"  # more than twice the limit

    def test_too_many_images(self, app):
        (response,) = call(app, classify(files=form(*[picture(RED)] * 5)))
        assert_names(refused(response, 413), 4)
        size = int(np.prod(SHAPE))
        one = {"name": "images", "datatype": "UINT8", "shape": [5, *SHAPE], "data": [0] * 5 * size}
        (response,) = call(app, infer({"inputs": [one]}))
        assert_names(refused(response, 413), 5, 4)

    def test_too_many_pixels_by_the_header(self, app):
        content = picture(RED, (101, 100))
        (response,) = call(app, classify(content=content[:100]))  # never decoded
        assert_names(refused(response, 422), "10,100", "10,000")

    @pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
    def test_another_type(self, app, kind):
        (response,) = call(app, classify(headers={"content-type": kind}))
        assert_names(refused(response, 415), "image/jpeg", kind)

    def test_a_part_of_another_type(self, app):
        files = [*form(picture(RED)), ("note", ("x.txt", b"abc", "text/plain"))]
        (response,) = call(app, classify(files=files))
        assert_names(refused(response, 415), "part 2", "text/plain")

    def test_a_compressed_body(self, app):
        (response,) = call(app, classify(headers={**PNG, "content-encoding": "gzip"}))
        assert_names(refused(response, 415), "gzip")

    def test_an_image_that_cannot_be_decoded_is_named(self, app):
        (response,) = call(app, classify(files=form(picture(RED), picture(RED)[:45])))
        assert_names(refused(response, 422), "image 2 of 2")

    def test_long_headers(self, app):
        (response,) = call(app, classify(headers={**PNG, "x": "x" * 2**14}))
        assert_names(refused(response, 431), 2**14)

    def test_an_empty_body(self, app):
        (response,) = call(app, classify(content=b""))
        assert_names(refused(response, 400), "empty")

    def test_a_form_without_its_end(self, app):
        kind = {"content-type": "multipart/form-data; boundary=x"}
        body = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + picture(RED)
        (response,) = call(app, classify(content=body, headers=kind))
        assert_names(refused(response, 400), "boundary")

    def test_a_form_without_a_boundary(self, app):
        (response,) = call(app, classify(headers={"content-type": "multipart/form-data"}))
        assert_names(refused(response, 400), "boundary")

    def test_a_slow_body(self, make_app):
        app, never = make_app(body_seconds=0.0), asyncio.Event()
        messages = [{"type": "http.request", "body": b"x", "more_body": True}]

        async def receive() -> dict:
            if not messages:
                await never.wait()
            return messages.pop()

        start, body = asyncio.run(exchange(app, classify(), receive))
        assert start["status"] == 408
        assert (b"connection", b"close") in start["headers"]
        assert b"0 seconds" in body["body"]

    def test_bodies_that_are_too_large_together(self, service, app, engine):
        service.admission.bytes = service.admission.max_bytes
        (response,) = call(app, classify())
        refused(response, 503)
        assert service.admission.bytes == service.admission.max_bytes
        assert engine.refused == 1

    @pytest.mark.parametrize("request_of", [classify, infer])
    def test_bodies_do_not_count_while_their_images_wait(self, service, app, engine, request_of):
        """As many wait as there may be rows, however small the largest body."""
        engine.go.clear()
        made = request_of()
        content = made.get("content") or json.dumps(made["json"]).encode()
        message = {"type": "http.request", "body": content, "more_body": False}
        service.admission.max_bytes = len(content)

        async def run() -> list[list[dict]]:
            never, tasks = asyncio.Event(), []
            for _ in range(3):
                messages = [message]

                async def receive(messages=messages) -> dict:
                    if not messages:
                        await never.wait()
                    return messages.pop()

                tasks.append(asyncio.ensure_future(exchange(app, made, receive)))
                assert await asyncio.to_thread(engine.submitted.acquire, timeout=60)
                assert service.admission.bytes == 0
            engine.go.set()
            return await asyncio.gather(*tasks)

        assert [start["status"] for start, _ in asyncio.run(run())] == [200] * 3

    def test_rows_that_are_too_many_together(self, service, app, engine):
        service.admission.rows = service.admission.max_rows
        engine.expected_wait = 2.5
        (response,) = call(app, classify())
        refused(response, 503)
        assert response.headers["retry-after"] == "3"
        assert engine.refused == 1


class TestEngine:
    def test_overloaded(self, app, engine):
        engine.refuse_with = Overloaded("1024 rows are in flight", 0.001)
        (response, other) = call(app, classify(), infer())
        assert_names(refused(response, 503), 1024)
        assert response.headers["retry-after"] == other.headers["retry-after"] == "1"

    def test_a_segment_that_fails(self, app, engine):
        engine.fail_with = SegmentFailed("layer1: out of memory")
        (response,) = call(app, classify())
        assert_names(refused(response, 500), "out of memory")
        engine.fail_with = None
        assert call(app, classify())[0].status_code == 200

    def test_another_error_says_nothing_of_the_inside(self, app, engine, caplog):
        engine.refuse_with = KeyError("secret")
        (response,) = call(app, classify())
        assert "secret" not in refused(response, 500)
        assert "secret" in caplog.text

    @pytest.mark.parametrize("request_of", [classify, infer])
    def test_a_client_that_goes_away_frees_its_rows(self, service, app, engine, request_of):
        engine.go.clear()

        async def run() -> list:
            gone = asyncio.Event()
            made = request_of()
            content = made.get("content") or json.dumps(made["json"]).encode()
            messages = [{"type": "http.request", "body": content, "more_body": False}]

            async def receive() -> dict:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            task = asyncio.ensure_future(exchange(app, made, receive))
            await asyncio.to_thread(engine.submitted.acquire, timeout=60)
            assert service.admission.rows > 0
            gone.set()
            return await asyncio.wait_for(task, 60)

        assert asyncio.run(run())[0]["status"] == 499
        assert engine.requests[0].cancelled.is_set()
        assert service.admission.rows == service.admission.bytes == 0


class TestProtocol:
    def test_the_server(self, app):
        found, live, ready, model, model_ready = call(
            app,
            get("/v2"),
            get("/v2/health/live"),
            get("/v2/health/ready"),
            get("/v2/models/mine"),
            get("/v2/models/mine/ready"),
        )
        assert found.json()["name"] == "early-exit"
        assert (live.json(), ready.json()) == ({"live": True}, {"ready": True})
        assert model.json()["platform"] == "onnxruntime_onnx"
        assert model_ready.json() == {"name": "mine", "ready": True}

    def test_another_model(self, app):
        urls = ("/v2/models/other", "/v2/models/other/ready")
        requests = [*map(get, urls), infer(url="/v2/models/other/infer")]
        for response in call(app, *requests):
            assert_names(refused(response, 404), "other", "mine")

    def test_inference(self, app, model):
        images = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), np.uint8)
        one = {"name": "images", "datatype": "UINT8", "shape": [3, *SHAPE], "data": images.tolist()}
        (response,) = call(app, infer({"inputs": [one], "id": "5"}))
        values = response.json()
        assert values["id"] == "5"
        expected = model.predict(list(images))
        outputs = {output["name"]: output["data"] for output in values["outputs"]}
        assert outputs["class"] == [one.class_index for one in expected]
        assert outputs["exit"] == [one.exit_index for one in expected]
        assert outputs["confidence"] == [one.confidence for one in expected]
        assert outputs["logits"] == model.answer(images).logits.ravel().tolist()

    def test_binary_data(self, app, model):
        images = np.full((1, *SHAPE), 9, np.uint8)
        one = {
            "name": "images",
            "datatype": "UINT8",
            "shape": [1, *SHAPE],
            "parameters": {"binary_data_size": images.size},
        }
        header = json.dumps(
            {"inputs": [one], "outputs": [{"name": "exit", "parameters": {"binary_data": True}}]}
        ).encode()
        (response,) = call(
            app,
            {
                "method": "POST",
                "url": "/v2/models/mine/infer",
                "content": header + images.tobytes(),
                "headers": {"Inference-Header-Content-Length": str(len(header))},
            },
        )
        length = int(response.headers["inference-header-content-length"])
        assert json.loads(response.content[:length])["outputs"][0]["name"] == "exit"
        assert np.array_equal(
            np.frombuffer(response.content[length:], "<i8"), model.answer(images).exit_index
        )

    def test_a_wrong_request(self, app):
        (response,) = call(app, infer({"inputs": []}))
        assert_names(refused(response, 400), "inputs")

    @pytest.mark.parametrize(
        ("made", "status"),
        [(get("/nothing"), 404), (get("/v1/classify"), 405), (classify(url="/v2"), 405)],
    )
    def test_another_address(self, app, made, status):
        refused(call(app, made)[0], status)


class TestHealth:
    def test_a_service_that_ends_is_not_ready(self, service, app):
        service.stopping = True
        live, ready, own = call(
            app, get("/v2/health/live"), get("/v2/health/ready"), get("/v2/models/mine/ready")
        )
        assert (live.status_code, ready.status_code, own.status_code) == (200, 503, 503)

    def test_a_run_that_hangs_ends_liveness(self, app, engine):
        engine.stalled = 61.0
        (live,) = call(app, get("/v2/health/live"))
        assert live.status_code == 503


def test_metrics(app, engine):
    engine.policy = Policy(exit_names=engine.policy.exit_names, thresholds=(0.75,))
    wrong = {"content-type": "text/plain"}
    call(app, classify(), classify(), classify(headers=wrong), get("/v2"), get("/secret"))
    engine.refuse_with = Overloaded("full", 1.0)
    *_, response = call(app, infer(), get("/metrics"))
    lines = set(response.text.splitlines())
    assert {
        'early_exit_requests_total{route="/v1/classify",status="200"} 2.0',
        'early_exit_requests_total{route="/v1/classify",status="415"} 1.0',
        'early_exit_requests_total{route="/v2/models/{name}/infer",status="503"} 1.0',
        'early_exit_requests_total{route="other",status="404"} 1.0',
        'early_exit_request_seconds_count{route="/v1/classify"} 3.0',
        "early_exit_rejected_total 1.0",
        "early_exit_rows_in_flight 7.0",
        'early_exit_threshold{exit="layer1"} 0.75',
        'early_exit_answered_rows_total{exit="layer1"} 2.0',
        'early_exit_waiting_rows{segment="layer1"} 3.0',
        'early_exit_segment_runs_total{segment="final"} 6.0',
        'early_exit_segment_rows_total{segment="layer1"} 50.0',
        'early_exit_segment_seconds_total{segment="final"} 0.25',
    } <= lines
    assert "secret" not in response.text


def test_the_shares_of_val_are_shown_where_they_are_stored(model, engine, service):
    assert b"val_share" not in service.metrics.text()
    row = {"threshold": 0.9, "accuracy": 0.5, "macs_share": 0.8, "exit_shares": [0.75, 0.25]}
    val = {"thresholds": [0.9], "temperatures": [1.0, 1.0], "accuracy": 0.8, "macs_share": 0.8}
    manifest = dataclasses.replace(model.manifest, val=val, val_curve=[row])
    lines = type(service.metrics)(engine, manifest).text().decode().splitlines()
    assert 'early_exit_val_share{exit="layer1"} 0.75' in lines
    assert 'early_exit_val_share{exit="final"} 0.25' in lines


def test_nothing_is_held_afterwards(service, app):
    call(app, classify(), classify(content=b"x"), infer(), infer({}), classify(files=form(b"x")))
    assert service.admission.rows == service.admission.bytes == 0
