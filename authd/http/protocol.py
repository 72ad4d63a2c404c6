"""HTTP/1.1 on one connection: Hypercorn's protocol, held to stricter rules than it has of itself.

Neither HTTP/2 nor WebSocket is spoken here: an upgrade is ignored (RFC 9110, 7.8), a cleartext HTTP/2 preface refused.
"""

from itertools import chain
from typing import Any

import h11
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.h11 import H11Protocol

from authd.http.problems import MEDIA_TYPE, PROBLEMS, SECURITY_HEADERS, problem_body
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
    def __init__(self, config: Config, context: WorkerContext, headers_max: int, *rest: Any) -> None:
        """`headers_max`: header fields of a request. `rest`: see `H11Protocol`."""
        app, *others = rest
        super().__init__(app, config, context, *others)
        self._headers_max = headers_max
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
        await super()._create_stream(_plain(request))

    def _complaint(self, request: h11.Request) -> str | None:
        if request.http_version not in (b"1.0", b"1.1"):
            return "http_version_unknown"
        # The parser's own limit is for heads that are not complete yet: one that comes in a single read may be larger.
        size = sum(len(name) + len(value) + _LINE_EXTRA_BYTES for name, value in request.headers)
        if len(request.headers) > self._headers_max or size > self.config.h11_max_incomplete_size:
            return "headers_too_large"
        if len(request.target) > TARGET_BYTES_MAX:
            return "target_too_long"
        names = {name for name, _ in request.headers}
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
        await self._refuse(_PARSER_CODES.get(status_code, "bad_http"))

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
        **SECURITY_HEADERS,
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _plain(request: h11.Request) -> h11.Request:
    """The request in origin form (RFC 9112, 3.2.2) and without an upgrade."""
    if request.target.startswith(b"/") and all(name != b"upgrade" for name, _ in request.headers):
        return request
    target = bytes(request.target)
    if not target.startswith(b"/"):
        rest = target.partition(b"://")[2]
        authority_ends = min((index for index in map(rest.find, (b"/", b"?")) if index >= 0), default=len(rest))
        target = rest[authority_ends:]
        target = target if target.startswith(b"/") else b"/" + target
    return h11.Request(
        method=request.method,
        target=target,
        headers=[(name, value) for name, value in request.headers if name != b"upgrade"],
        http_version=request.http_version,
    )
