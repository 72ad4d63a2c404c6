"""HTTP/1.1 on one connection: Hypercorn's protocol, held to stricter rules than it has of itself (see framing.py).

Neither HTTP/2 nor WebSocket is supported: an upgrade is ignored (RFC 9110, 7.8), a cleartext HTTP/2 preface refused.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import chain
from typing import Any, cast
from urllib.parse import unquote

import h11
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.typing import ConnectionState, HTTPScope

from authd.infra.http.app import App
from authd.infra.http.problems import PROBLEMS, problem_body, problem_headers
from authd.infra.http.server.exchange import Exchange, Headers
from authd.infra.http.server.framing import CHUNKS_MAX, Framing, FramingError
from authd.infra.observe import metrics

#: RFC 9110, 4.1 asks for 8,000 at least.
TARGET_BYTES_MAX = 8000

#: What is parsed of one connection before all others have their turn. A body in chunks of one byte has two parts for
#: each, and a part costs the parser as much when it is small.
PARTS_PER_TURN = 16

#: What the parser found, by the status that it proposes.
_PARSER_CODES = {431: "headers_too_large", 501: "transfer_coding_unknown"}
_DETAILS = {
    "body_too_large": f"The body comes in more than {CHUNKS_MAX} chunks.",
    "bad_http": "The request is not HTTP/1.1 as RFC 9112 has it.",
    "headers_too_large": "The header fields are too many or too long.",
    "target_too_long": f"The request target is longer than {TARGET_BYTES_MAX} bytes.",
    "transfer_coding_unknown": "The only transfer coding is chunked.",
    "http_version_unknown": "Only HTTP/1.1 and HTTP/1.0 are supported.",
}


class Http1(H11Protocol):
    def __init__(
        self,
        app: App,
        config: Config,
        context: WorkerContext,
        tasks: asyncio.TaskGroup,
        headers_max: int,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
    ) -> None:
        """`headers_max`: header fields of a request. Its handlers run in `tasks`; `send` writes to the connection."""
        super().__init__(
            cast(Any, app), config, context, cast(Any, tasks), ConnectionState({}), False, client, server, send
        )
        self._app = app
        self._tasks = tasks
        self._framing = Framing(config.h11_max_incomplete_size, headers_max)
        self._sends_body = True
        self._head = b""

    @property
    def is_idle(self) -> bool:
        """Return whether no request has begun, or none beyond a part of its header."""
        return self.connection.their_state is h11.IDLE

    @property
    def is_owed(self) -> bool:
        """Return whether the client still has to send something before it can be answered."""
        return self.connection.their_state in (h11.IDLE, h11.SEND_BODY)

    async def handle(self, event: Event) -> None:
        if isinstance(event, RawData):
            self._framing.add(event.data)
            try:
                await self._handle_events()
            except FramingError as error:
                await self._refuse_bytes(error.args[0])
            except h11.RemoteProtocolError as error:
                await self._refuse_bytes(_PARSER_CODES.get(error.error_status_hint, "bad_http"))
        else:
            await super().handle(event)

    async def _handle_events(self) -> None:
        """Feed the parser the present request's bytes, and only when that is answered the next one's.

        :raises FramingError, h11.RemoteProtocolError:
        """
        parts = 0
        while not self._framing.has_more or await self._next_request():
            data = self._framing.take()
            if not data:
                return
            self.connection.receive_data(data)
            while await self._handle_event(self.connection.next_event()):
                pass
            parts += 1
            if parts % PARTS_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _handle_event(self, event: Any) -> bool:
        """Return whether the parser may have more: to ask it in vain costs as much as any event."""
        if isinstance(event, h11.Request):
            await self.send(Updated(idle=False))
            length = _body_length(event)
            self._framing.begin_body(length)
            await self._create_stream(event)
            if self.connection.they_are_waiting_for_100_continue:
                headers = self.config.response_headers("h11")
                await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=headers))
            return length == 0
        if isinstance(event, h11.Data):
            if self.stream is not None:  # or it was answered before its end
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
            return True
        if isinstance(event, h11.EndOfMessage) and self.stream is not None:
            await self.stream.handle(EndBody(stream_id=STREAM_ID))
        return False

    async def _next_request(self) -> bool:
        """Wait until the present request is answered; False where the connection ends with it. Bytes behind such a
        request are ignored: to refuse them would drop the answer to what was carried out.
        """
        if self.stream is not None:
            await self.can_read.clear()
            await self.can_read.wait()
        if self.connection.their_state is not h11.IDLE:
            return False
        self._framing.next_request()
        return True

    async def _check_protocol(self, event: h11.Request) -> None:
        """Nothing: what Hypercorn looks for here is HTTP/2."""

    async def _create_stream(self, request: h11.Request) -> None:
        code = self._complaint(request)
        if code is not None:
            await self._refuse(code, has_body=request.method != b"HEAD")
            await self.send(Closed())
            return
        headers, target = _plain(request)
        path, _, query = target.partition(b"?")
        self._sends_body = request.method != b"HEAD"
        scope: HTTPScope = {
            "type": "http",
            "http_version": request.http_version.decode(),
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": request.method.decode(),
            "scheme": "http",
            "path": unquote(path.decode()),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": self.client,
            "server": self.server,
            "state": ConnectionState({}),
            "extensions": {},
        }
        self.stream = cast(Any, Exchange(self._app, scope, self._answer, self._tasks))
        self.keep_alive_requests += 1

    async def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        if status == 204:  # RFC 9110, 8.6
            headers = [(name, value) for name, value in headers if name != b"content-length"]
        # What the application says of a header replaces what stands in every answer: a page has a policy of its own.
        said = {name for name, _ in headers}
        headers += [header for header in self.config.response_headers("h11") if header[0] not in said]
        if self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        await self._send_h11_event(h11.Response(headers=headers, status_code=status))
        if body and self._sends_body:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())
        self._sends_body = True
        await self._maybe_recycle()

    def _complaint(self, request: h11.Request) -> str | None:
        if request.http_version not in (b"1.0", b"1.1"):
            return "http_version_unknown"
        headers = request.headers.raw_items()  # a list, which h11's own headers are not: they cost more to walk
        if len(request.target) > TARGET_BYTES_MAX:
            return "target_too_long"
        names = {name.lower() for name, _ in headers}
        # Two ideas of where the body ends are how a second request is smuggled past a proxy (RFC 9112, 6.1).
        if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
            return "bad_http"
        if not request.target.startswith((b"/", b"http://", b"https://")):  # `*`, and what CONNECT asks for
            return "bad_http"
        return None

    async def _send_h11_event(self, event: Any) -> None:
        try:
            data = self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response):
            # It waits for what follows it: a small answer is one write and one segment.
            self._head = data
            return
        data, self._head = self._head + data, b""
        if data:
            await self.send(RawData(data))

    async def _refuse_bytes(self, code: str) -> None:
        """End the connection over bytes that cannot be read; answer them, unless an answer has begun."""
        if self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._close_stream()
            await self._refuse(code, has_body=self._sends_body)
        await self.send(Closed())

    async def _refuse(self, code: str, *, has_body: bool = True) -> None:
        metrics.refusals.labels(code).inc()
        body = problem_body(code, _DETAILS[code])
        response = h11.Response(
            status_code=PROBLEMS[code][0],
            headers=list(chain(problem_headers(len(body)), self.config.response_headers("h11"))),
        )
        await self._send_h11_event(response)
        if has_body:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


def _body_length(request: h11.Request) -> int | None:
    """Return the bytes of the body by `Content-Length`; None for chunks."""
    for name, value in request.headers.raw_items():
        name = name.lower()
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0


def _plain(request: h11.Request) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the request's headers without an upgrade, and its target in origin form (RFC 9112, 3.2.2)."""
    headers = [(name.lower(), value) for name, value in request.headers.raw_items() if name.lower() != b"upgrade"]
    target = bytes(request.target)
    if not target.startswith(b"/"):
        rest = target.partition(b"://")[2]
        authority_ends = min((index for index in map(rest.find, (b"/", b"?")) if index >= 0), default=len(rest))
        target = rest[authority_ends:]
        target = target if target.startswith(b"/") else b"/" + target
    return headers, target
