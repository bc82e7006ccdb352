"""A server process: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from early_exit.errors import Failed, Unavailable, UserError
from early_exit.serving.app import Service, build_app
from early_exit.serving.limits import MAX_HEADERS
from early_exit.serving.policies import Policies

HEADER_SECONDS = 30.0  # to send a request's line and headers


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, on which nothing is accepted yet. port: 0 is a free one.

    Raises UserError for an address that is not of this machine, Unavailable for one in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise _in_use(f"port {port} of {host}") from None
        raise UserError(f"{host} port {port} cannot be served ({reason})") from None
    return listener


def _in_use(address: str) -> Unavailable:
    return Unavailable(f"{address} is in use; end the other server or pass another --port")


def address_of(listener: socket.socket) -> str:
    """Its address as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    service: Service, policies: Policies, listener: socket.socket, grace: int, announce: str
) -> None:
    """Serves until SIGTERM or SIGINT; then answers what is in progress. SIGHUP reads the policy
    again.

    grace: seconds for the end; announce: a line to print when ready. Raises Failed if something
    was not answered.
    """
    config = uvicorn.Config(
        build_app(service),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_graceful_shutdown=grace - 1,  # the engine's end is within the grace period too
    )
    server = _Server(config, announce)
    loop = asyncio.get_running_loop()
    end = time.monotonic()

    def stop() -> None:
        nonlocal end
        server.force_exit = service.stopping  # the second signal
        end = time.monotonic() + (0 if service.stopping else grace)
        service.stopping = server.should_exit = True

    tasks: set[asyncio.Task[None]] = set()  # the loop alone would not keep them

    def begin(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = loop.create_task(work())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    if policies.max_drop is not None:
        begin(policies.adapt)
    loop.add_signal_handler(signal.SIGHUP, begin, policies.reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[listener])
    service.close()
    if server.server_state.tasks and not server.force_exit:  # they were cancelled
        await asyncio.wait(server.server_state.tasks, timeout=0.5)
    closed = await asyncio.to_thread(service.engine.close, max(0.0, end - time.monotonic()))
    if service.unanswered or not closed:
        raise Failed(f"some requests were not answered within {grace} seconds (--grace)")


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if a request's headers do not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        if self._timer:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        """As uvicorn's."""
        super().on_response_complete()
        self._expect_headers()

    def _expect_headers(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._close_without_request)

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's, whose signals are handled here."""

    def __init__(self, config: uvicorn.Config, announce: str) -> None:
        super().__init__(config)
        self.announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Would end the process by the signal."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Prints the line once connections are accepted. Raises Unavailable if another server that
        was loading too accepts them there now."""
        try:
            await super().startup(sockets)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not sockets:
                raise
            raise _in_use(address_of(sockets[0])) from None
        print(self.announce, flush=True)
