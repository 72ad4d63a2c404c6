"""HTTP/1.1 on one connection: Hypercorn's protocol, held to stricter rules than it has of itself.

Neither HTTP/2 nor WebSocket is spoken here: an upgrade is ignored (RFC 9110, 7.8), a cleartext HTTP/2 preface refused.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import chain
from typing import Any, cast
from urllib.parse import unquote

import h11
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState, HTTPScope

from authd.http.app import App
from authd.http.exchange import Exchange, Headers
from authd.http.problems import MEDIA_TYPE, PROBLEMS, problem_body
from authd.observe import metrics

#: RFC 9110, 4.1 asks for 8,000 at least.
TARGET_BYTES_MAX = 8000
#: A header line is its name, its value, and `: ` and CRLF.
_LINE_EXTRA_BYTES = 4

#: What the parser found, by the status that it proposes.
_PARSER_CODES = {431: "headers_too_large", 501: "transfer_coding_unknown"}
_DETAILS = {
    "bad_http": "The request is not HTTP/1.1 as RFC 9112 has it.",
    "headers_too_large": "The header fields are too many or too long.",
    "target_too_long": f"The request target is longer than {TARGET_BYTES_MAX} bytes.",
    "transfer_coding_unknown": "The only transfer coding is chunked.",
    "http_version_unknown": "Only HTTP/1.1 and HTTP/1.0 are spoken here.",
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
        self._headers_max = headers_max
        self._sends_body = True
        self._head = b""

    @property
    def is_idle(self) -> bool:
        """No request has begun, or none beyond a part of its header."""
        return self.connection.their_state is h11.IDLE

    @property
    def is_owed(self) -> bool:
        """The client still has to send something before it can be answered."""
        return self.connection.their_state in (h11.IDLE, h11.SEND_BODY)

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
            "method": request.method.decode().upper(),
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
        headers += self.config.response_headers("h11")
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
        # The parser's own limit is for heads that are not complete yet: one that comes in a single read may be larger.
        headers = request.headers.raw_items()  # a list, which h11's own headers are not: they cost more to walk
        size = sum([len(name) + len(value) + _LINE_EXTRA_BYTES for name, value in headers])
        if len(headers) > self._headers_max or size > self.config.h11_max_incomplete_size:
            return "headers_too_large"
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

    async def _send_error_response(self, status_code: int) -> None:
        """What the parser did not understand."""
        await self._refuse(_PARSER_CODES.get(status_code, "bad_http"), has_body=self._sends_body)

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


def problem_headers(length: int) -> list[tuple[bytes, bytes]]:
    """For a problem of `length` bytes after which the connection is closed."""
    headers = {
        "Content-Type": MEDIA_TYPE,
        "Content-Length": str(length),
        "Connection": "close",
        "Cache-Control": "no-store",
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _plain(request: h11.Request) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The request's headers without an upgrade, and its target in origin form (RFC 9112, 3.2.2)."""
    headers = [(name.lower(), value) for name, value in request.headers.raw_items() if name.lower() != b"upgrade"]
    target = bytes(request.target)
    if not target.startswith(b"/"):
        rest = target.partition(b"://")[2]
        authority_ends = min((index for index in map(rest.find, (b"/", b"?")) if index >= 0), default=len(rest))
        target = rest[authority_ends:]
        target = target if target.startswith(b"/") else b"/" + target
    return headers, target
