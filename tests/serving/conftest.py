"""Fixtures for tests of the server."""

from pathlib import Path

import pytest
from fakes import FakeEngine, colour_model
from server_process import Server

from early_exit import serve
from early_exit.serving.limits import Limits


@pytest.fixture
def model():
    """See `colour_model`."""
    return colour_model()


@pytest.fixture
def engine(model):
    """An engine that answers at once, unless a test changes it."""
    return FakeEngine(model)


@pytest.fixture
def make_service(model, engine):
    """A function that makes a service of the model, with some limits changed."""
    for package in ("starlette", "prometheus_client", "python_multipart"):
        pytest.importorskip(package)
    from early_exit.serving.app import Service

    made = []

    def make(max_rows: int = 1024, **limits: object) -> Service:
        limits = Limits(**{"max_body": 2**16, "max_images": 4, "max_pixels": 10_000, **limits})
        made.append(Service(model, engine, "mine", limits=limits, max_rows=max_rows, stall=60.0))
        return made[-1]

    yield make
    engine.go.set()
    for service in made:
        service.close()


@pytest.fixture
def service(make_service):
    """A service with small limits."""
    return make_service()


@pytest.fixture
def app(service):
    """Its routes."""
    from early_exit.serving.app import build_app

    return build_app(service)


@pytest.fixture
def make_app(make_service):
    """A function that gives the routes of a service with some limits changed."""

    def make(**limits: object):
        from early_exit.serving.app import build_app

        return build_app(make_service(**limits))

    return make


@pytest.fixture
def start():
    """A function that starts a server, which is killed after the test."""
    for package in (*serve.PACKAGES, "onnxruntime", "httpx"):
        pytest.importorskip(package)
    started: list[Server] = []

    def start(model: Path, *flags: object) -> Server:
        started.append(Server(model, *flags))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
