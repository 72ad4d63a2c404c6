"""The server: accepts connections, never more than a limit, and holds each to deadlines of its own.

HTTP is Hypercorn's. Its server is not used: it bounds no number of connections, waits without end for a client that
does not read, and cannot be drained in order on every Python. A connection whose client still owes it bytes gives way
to a new one when all places are taken, so that a thousand half-open ones keep nobody out.
"""

import asyncio
import math
import resource
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from functools import lru_cache
from typing import Any, cast

import anyio
import msgspec
import structlog
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated

from authd.infra.http.app import App
from authd.infra.http.problems import PROBLEMS, SECURITY_HEADERS, problem_body, problem_headers
from authd.infra.http.server.protocol import Http1
from authd.infra.observe import metrics

LISTEN_BACKLOG = 1024
REQUESTS_PER_CONNECTION_MAX = 1000
READ_BYTES = 65_536
#: What a connection has been sent and its client has not taken yet, before we wait for it.
WRITE_BUFFER_BYTES = 65_536
#: How long a closing connection waits for the client to take the last answer and to close too.
LINGER_S = 1.0
#: Refusals that linger at a time; beyond it a connection is closed without a word.
REFUSALS_MAX = 256
#: A connection is not closed for another's sake before this: its request may be here and only not read yet.
EVICT_AFTER_S = 0.2
#: Time to read what had arrived when the drain began: a connection whose request is not read yet looks idle.
ARRIVED_S = 0.1
#: After the drain: time for the answers that say so.
FAREWELL_S = 2.0
#: File descriptors for all that is no connection of a client.
OTHER_DESCRIPTORS = 512
FULL = "connections_full"

_log = structlog.get_logger()


class ServerSettings(msgspec.Struct, frozen=True):
    header_max_bytes: int
    headers_max: int
    header_timeout_s: float
    request_timeout_s: float
    keep_alive_s: float


class HttpServer:
    def __init__(self, app: App, settings: ServerSettings, *, connections_max: int, drain_s: float) -> None:
        self.settings = settings
        self._connections_max = connections_max
        self._drain_s = drain_s
        self.config = make_config(settings)
        self.context = WorkerContext(None)
        self.app = app
        self._connections: set[_Connection] = set()
        #: Since when each waits for its client, the first of them first; some no longer do.
        self._waiting: dict[_Connection, float] = {}
        self._refusals: set[_Refusal] = set()
        self._gone = anyio.Event()

    @asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncGenerator[None, None]:
        """Serve while the body runs; then drain: idle connections close at once, requests get `drain_s`, what is left
        then is answered with a 503. The listener is closed.

        :raises IgnoredHook:
        """
        self.app.refuse_hooks()
        _raise_descriptor_limit(self._connections_max)
        loop = asyncio.get_running_loop()
        self.now = loop.time
        async with anyio.create_task_group() as self._group:
            server = await loop.create_server(self._make_protocol, sock=listener, backlog=LISTEN_BACKLOG)
            try:
                yield
            finally:
                server.close()
            await self._drain()

    async def _drain(self) -> None:
        await self.context.terminated.set()
        await anyio.sleep(ARRIVED_S)
        for connection in list(self._connections):
            if connection.is_idle:
                connection.abort()
        with anyio.move_on_after(self._drain_s):
            await self._until_gone()
        self.app.end_requests()
        with anyio.move_on_after(FAREWELL_S):
            await self._until_gone()
        for connection in list(self._connections):
            connection.abort()

    async def _until_gone(self) -> None:
        while self._connections:
            self._gone = anyio.Event()
            await self._gone.wait()

    def _make_protocol(self) -> asyncio.BaseProtocol:
        if len(self._connections) < self._connections_max or self._evict():
            return _StreamProtocol(asyncio.StreamReader(), self._connected)
        metrics.connections_ended.labels("refused").inc()
        return _Refusal(self._refusals)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        cast(_StreamProtocol, writer.transport.get_protocol()).connection = connection
        self._connections.add(connection)
        metrics.connections.inc()
        self._group.start_soon(self._serve, connection)

    async def _serve(self, connection: "_Connection") -> None:
        try:
            await connection.run()
        except Exception as error:  # one connection's trouble is not the others'
            _log.error("fault", exc_info=error)
        finally:
            self._forget(connection)

    def wait_for_client(self, connection: "_Connection") -> None:
        """Note that the connection is the newest of those that wait for their client."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = self.now()

    def _evict(self) -> bool:
        """Make room by closing the connection that has waited longest for its client."""
        while self._waiting:
            connection, since = next(iter(self._waiting.items()))
            if self.now() - since < EVICT_AFTER_S:
                return False
            del self._waiting[connection]
            if connection.is_owed:
                connection.abort()
                self._forget(connection)
                metrics.connections_ended.labels("evicted").inc()
                return True
        return False

    def _forget(self, connection: "_Connection") -> None:
        self._waiting.pop(connection, None)
        if connection in self._connections:
            self._connections.discard(connection)
            metrics.connections.dec()
        if not self._connections:
            self._gone.set()


class _StreamProtocol(asyncio.StreamReaderProtocol):
    """Tells the connection that its client has hung up, also when bytes that nobody reads yet stand before that."""

    connection: "_Connection | None" = None

    def eof_received(self) -> bool | None:
        if self.connection is not None:
            self.connection.on_hang_up()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.connection is not None:
            self.connection.on_hang_up()


class _Connection:
    """One client's connection. Its task reads; what the application sends is written by the application's task."""

    def __init__(self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._protocol: Http1 | None = None
        self._timer: asyncio.Handle | None = None
        self._timer_at = math.inf
        self._ends_at = math.inf
        self._awaits_first_byte = False
        self._closing = False
        self._handler: asyncio.Task[Any] | None = None
        self._is_stopped = False

    @property
    def is_idle(self) -> bool:
        return self._protocol is None or self._protocol.is_idle

    @property
    def is_owed(self) -> bool:
        return self._closing or self._protocol is None or self._protocol.is_owed

    def abort(self) -> None:
        self._closing = True  # what was read before is not handled any more
        self._writer.transport.abort()
        self._stop_handling()

    def on_hang_up(self) -> None:
        """While a request is handled nobody may be reading, and so nobody else hears of it."""
        if self._handler is not None:
            self.abort()

    async def run(self) -> None:
        peer, local = (self._writer.get_extra_info(name) for name in ("peername", "sockname"))
        try:
            async with asyncio.TaskGroup() as tasks:
                self._protocol = Http1(
                    self._server.app,
                    self._server.config,
                    self._server.context,
                    tasks,
                    self._server.settings.headers_max,
                    peer[:2] if peer else None,
                    local[:2] if local else None,
                    self._send,
                )
                self._wait_for_request(self._server.settings.header_timeout_s)
                await self._read(self._protocol)
        finally:
            self._stop_timer()
            self._writer.close()
            with anyio.move_on_after(LINGER_S), suppress(OSError, RuntimeError):
                await self._writer.wait_closed()
            self.abort()

    async def _read(self, protocol: Http1) -> None:
        with suppress(OSError):
            while data := await self._reader.read(READ_BYTES):
                if self._closing:  # read on, or the system resets the connection before the client has our answer
                    continue
                if self._awaits_first_byte:
                    self._wait_for_request(self._server.settings.header_timeout_s)
                await self._handle(protocol, data)
        with anyio.move_on_after(LINGER_S):
            await protocol.handle(Closed())

    async def _handle(self, protocol: Http1, data: bytes) -> None:
        # Hypercorn waits here without end when what it answered is not taken, or what it was sent not read. Not a
        # scope of anyio's: this is in the way of every request.
        self._handler = handler = cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            await protocol.handle(RawData(data))
        except asyncio.CancelledError:
            if not self._is_stopped or handler.uncancel():
                raise
        finally:
            self._handler = None

    def _stop_handling(self) -> None:
        # Soon and not now: it may be the handler itself that asks, and then it mostly ends of its own accord.
        asyncio.get_running_loop().call_soon(self._interrupt)

    def _interrupt(self) -> None:
        if self._handler is not None and not self._is_stopped:
            self._is_stopped = True
            self._handler.cancel()

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            try:
                self._writer.write(event.data)
                if self._writer.transport.get_write_buffer_size() > WRITE_BUFFER_BYTES:
                    async with asyncio.timeout(self._server.settings.request_timeout_s):
                        await self._writer.drain()
            except (OSError, RuntimeError):  # the client takes nothing, or has gone: reading says so too
                self.abort()
        elif isinstance(event, Closed):
            self._close()
        elif isinstance(event, Updated):
            if event.idle:
                self._wait_for_request(self._server.settings.keep_alive_s, is_first_byte_awaited=True)
            else:
                self._awaits_first_byte = False
                self._set_timer(None)

    def _wait_for_request(self, seconds: float, *, is_first_byte_awaited: bool = False) -> None:
        self._awaits_first_byte = is_first_byte_awaited
        self._set_timer(seconds)
        self._server.wait_for_client(self)

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            with suppress(OSError, RuntimeError):
                self._writer.write_eof()
            self._set_timer(LINGER_S)
            self._stop_handling()
            self._server.wait_for_client(self)

    def _set_timer(self, seconds: float | None) -> None:
        """Abort the connection after these seconds, and not at any time set before."""
        self._ends_at = math.inf if seconds is None else self._server.now() + seconds
        # The timer that runs looks again when it is due: to set one anew for each request costs more.
        if self._ends_at < self._timer_at:
            self._stop_timer()
            self._start_timer()

    def _start_timer(self) -> None:
        self._timer_at = self._ends_at
        self._timer = asyncio.get_running_loop().call_at(self._timer_at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at = math.inf
        if self._server.now() >= self._ends_at:
            self.abort()
        elif self._ends_at < math.inf:
            self._start_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = math.inf


class _Refusal(asyncio.Protocol):
    """Says 503 to whoever connects when all places are taken, and reads nothing that it says."""

    def __init__(self, others: "set[_Refusal]") -> None:
        self._others = others

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)
        if len(self._others) >= REFUSALS_MAX:
            stream.abort()
            return
        self._others.add(self)
        stream.write(_FULL_ANSWER)
        with suppress(OSError, RuntimeError):
            stream.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, stream.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.discard(self)


class _Config(Config):
    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        """Return what stands in every answer besides the application's."""
        return [*SECURITY_HEADERS, (b"date", _date(int(time.time())))]


@lru_cache(1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


def make_config(settings: ServerSettings) -> Config:
    """Return what the protocol asks Hypercorn's configuration for."""
    config = _Config()
    config.errorlog = None
    config.keep_alive_max_requests = REQUESTS_PER_CONNECTION_MAX
    config.h11_max_incomplete_size = settings.header_max_bytes
    return config


def _raise_descriptor_limit(connections: int) -> None:
    """Let the process hold so many connections, as far as the system allows."""
    wanted = connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        _log.warning("too_few_descriptors", allowed=allowed, wanted=wanted)


def _full_answer() -> bytes:
    body = problem_body(FULL, "All connections are taken. Try again.")
    lines = [f"HTTP/1.1 {PROBLEMS[FULL][0]} {PROBLEMS[FULL][1]}".encode()]
    headers = [*problem_headers(len(body)), (b"Retry-After", b"1"), *SECURITY_HEADERS]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


_FULL_ANSWER = _full_answer()
