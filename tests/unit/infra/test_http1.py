"""HTTP/1.1 as bytes in and bytes out: the protocol and its exchanges, without a socket and without naming a parser."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.lowlevel
import pytest
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.events import Closed, Event, RawData
from quart import Request, Response, g
from structlog.testing import capture_logs

from authd.config import Settings
from authd.infra.http.app import App, AppSettings
from authd.infra.http.endpoint import PUBLIC, Endpoints
from authd.infra.http.replies import json_response
from authd.infra.http.server.framing import CHUNK_LINE_BYTES_MAX, EMPTY_LINES_MAX, TRAILERS_BYTES_MAX
from authd.infra.http.server.protocol import PARTS_PER_TURN, Http1
from authd.infra.http.server.server import ServerSettings, make_config

WITHIN_S = 5.0
POLICY, DEFAULT_POLICY = "default-src 'self'", "default-src 'none'; frame-ancestors 'none'"
HEAD = b"GET /echo HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Peer:
    """A client's end: `send` gives the protocol bytes, `answers` are what it has written so far."""

    def __init__(self, app: App, settings: Settings, tasks: asyncio.TaskGroup) -> None:
        self.written = bytearray()
        self.is_closed = False
        config = make_config(settings.section(ServerSettings))
        self._protocol = Http1(
            app, config, WorkerContext(None), tasks, settings.headers_max, ("198.51.100.1", 1), None, self._receive
        )

    async def _receive(self, event: Event) -> None:
        if isinstance(event, RawData):
            assert not self.is_closed
            self.written += event.data
        elif isinstance(event, Closed):
            self.is_closed = True

    async def send(self, data: bytes) -> None:
        if not self.is_closed:
            await self._protocol.handle(RawData(data))

    async def hang_up(self) -> None:
        await self._protocol.handle(Closed())

    async def answers(self, count: int) -> list[tuple[int, bytes]]:
        """The first `count` answers, each a status and a body, when they have been written."""
        with anyio.fail_after(WITHIN_S):
            while len(found := parse(bytes(self.written))) < count:
                await anyio.lowlevel.checkpoint()
        return found

    async def closed(self) -> list[tuple[int, bytes]]:
        """All answers, when the protocol has closed the connection."""
        with anyio.fail_after(WITHIN_S):
            while not self.is_closed:
                await anyio.lowlevel.checkpoint()
        return parse(bytes(self.written))


def parse(written: bytes) -> list[tuple[int, bytes]]:
    answers = []
    while b"\r\n\r\n" in written:
        head, _, rest = written.partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(headers.get(b"content-length", b"0"))
        if len(rest) < length:
            break
        if status != 100:
            answers.append((status, rest[:length]))
        written = rest[length:]
    return answers


def make_app(settings: Settings) -> App:
    endpoint = Endpoints()

    @endpoint("GET", "/echo", "A test", auth=PUBLIC, reply=None)
    async def get(request: Request) -> Response:
        return json_response({"query": request.query_string.decode()})

    @endpoint("POST", "/echo", "A test", auth=PUBLIC, reply=None)
    async def post(request: Request) -> Response:
        return json_response({"body": (await request.body).decode()})

    @endpoint("GET", "/found/<part>", "A test", auth=PUBLIC, reply=None)
    async def found(request: Request, part: str) -> Response:
        return json_response({"part": part})

    @endpoint("GET", "/page", "A test", auth=PUBLIC, reply=None, csp=POLICY)
    async def page(request: Request) -> Response:
        return json_response({})

    @endpoint("GET", "/context", "A test", auth=PUBLIC, reply=None)
    async def context(request: Request) -> Response:
        g.requests = g.get("requests", 0) + 1
        return json_response({"requests": g.requests})

    @endpoint("GET", "/torn", "A test", auth=PUBLIC, reply=None)
    async def torn(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"{"
            raise RuntimeError("the body failed")

        return Response(body(), content_type="application/json")

    return App(settings.section(AppSettings), endpoint.declared)


Connect = Callable[[], AbstractAsyncContextManager[Peer]]


@pytest.fixture(scope="module")
def connect(make_settings: Callable[..., Settings]) -> Connect:
    settings = make_settings(body_max_bytes=4096, header_max_bytes=4096)
    app = make_app(settings)

    @asynccontextmanager
    async def connected() -> AsyncIterator[Peer]:
        async with asyncio.TaskGroup() as tasks:
            peer = Peer(app, settings, tasks)
            yield peer
            await peer.hang_up()

    return connected


def code_of(body: bytes) -> str:
    code: str = json.loads(body)["code"]
    return code


# What is refused


DOUBTFUL = {
    "a bare LF ends a header line": HEAD + b"X-A: b\nContent-Length: 65\r\n\r\n",
    "a bare LF ends the request line": b"GET /echo HTTP/1.1\nHost: a\r\n\r\n",
    "a bare LF ends the head": HEAD + b"\n",
    "bare LFs everywhere": b"GET /echo HTTP/1.1\nHost: a\n\n",
    "a bare CR in a value": HEAD + b"X-A: b\rContent-Length: 65\r\n\r\n",
    "a bare CR ends the head": HEAD + b"\r\r\n",
    "a bare LF before the request line": b"\n" + HEAD + b"\r\n",
    "obs-fold with a space": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "obs-fold with a tab": POST + b"Content-Length:\r\n\t5\r\n\r\nhello",
    "a space before the first header": b"GET /echo HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n",
    "a length twice": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a length twice, in other case": POST + b"CONTENT-LENGTH: 5\r\nX: y\r\ncontent-length: 5\r\n\r\nhello",
    "a list of equal lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "an empty length": POST + b"Content-Length:\r\n\r\n",
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\nhello",
    "a method in lower case": b"get /echo HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method in mixed case": b"Get /echo HTTP/1.1\r\nHost: a\r\n\r\n",
    "a space after the chunk's size": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "a chunk's size with a sign": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "a chunk's size in C's way": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a chunk's size of 17 digits": CHUNKED + b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "no chunk's size": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "a bare LF ends the chunk's size": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "a bare CR in a chunk's extension": CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"4\r\nhello\r\n0\r\n\r\n",
    "an endless chunk line": CHUNKED + b"5;" + b"x" * CHUNK_LINE_BYTES_MAX,
    "a bare LF ends the trailers": CHUNKED + b"0\r\n\nGET /echo HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bare LF ends a trailer": CHUNKED + b"0\r\nX: y\nZ: z\r\n\r\n",
    "a folded trailer": CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n",
    "endless trailers": CHUNKED + b"0\r\n" + b"X: y\r\n" * (TRAILERS_BYTES_MAX // 6 + 1),
    "too many empty lines": b"\r\n" * (EMPTY_LINES_MAX + 1) + HEAD + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("sent", DOUBTFUL.values(), ids=DOUBTFUL)
@pytest.mark.parametrize("size", [1, 7, 100_000], ids=["bytewise", "by sevens", "at once"])
async def test_bytes_in_doubt_are_refused_and_end_the_connection(connect: Connect, sent: bytes, size: int) -> None:
    async with connect() as peer:
        for start in range(0, len(sent), size):
            await peer.send(sent[start : start + size])
        [(status, body)] = await peer.closed()
        assert (status, code_of(body)) == (400, "bad_http")


async def test_a_head_is_too_large_however_it_is_cut(connect: Connect) -> None:
    head = HEAD + b"X: " + b"y" * 4096 + b"\r\n\r\n"
    for parts in ([head], [head[:2000], head[2000:]], [head[:4097]]):
        async with connect() as peer:
            for part in parts:
                await peer.send(part)
            [(status, _)] = await peer.closed()
            assert status == 431


# What is read


READ = {
    "a body": (POST + b"Content-Length: 5\r\n\r\nhello", b'{"body":"hello"}'),
    "spaces around a length": (POST + b"Content-Length: \t5 \r\n\r\nhello", b'{"body":"hello"}'),
    "chunks": (CHUNKED + b"2\r\nhe\r\n03;a=b\r\nllo\r\n0;last\r\nX: y\r\n\r\n", b'{"body":"hello"}'),
    "a chunk that looks like an end": (CHUNKED + b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b'{"body":"\\r\\n0\\r\\n\\r\\n"}'),
    "empty lines before": (b"\r\n" * EMPTY_LINES_MAX + HEAD + b"\r\n", b'{"query":""}'),
    "a header that begins like a length": (HEAD + b"Content-Length-X: 1, 2\r\n\r\n", b'{"query":""}'),
    "an upgrade": (HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b'{"query":""}'),
    "a tab within a value": (HEAD + b"X: a\tb\r\n\r\n", b'{"query":""}'),
}


@pytest.mark.parametrize(("sent", "expected"), READ.values(), ids=READ)
@pytest.mark.parametrize("size", [1, 7, 100_000], ids=["bytewise", "by sevens", "at once"])
async def test_a_request_is_read_however_it_is_cut_and_the_next_one_too(
    connect: Connect, sent: bytes, expected: bytes, size: int
) -> None:
    async with connect() as peer:
        sent += HEAD.replace(b"/echo", b"/echo?next") + b"\r\n"
        for start in range(0, len(sent), size):
            await peer.send(sent[start : start + size])
        assert await peer.answers(2) == [(200, expected), (200, b'{"query":"next"}')]
        assert not peer.is_closed


async def test_an_empty_line_after_a_body_belongs_to_no_request(connect: Connect) -> None:
    body = POST + b"Content-Length: 5\r\n\r\nhello\r\n"
    async with connect() as peer:
        await peer.send(body * 3)
        assert await peer.answers(3) == [(200, b'{"body":"hello"}')] * 3
        assert not peer.is_closed


LAST = {
    "asked to close": POST + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.0": b"POST /echo HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    "chunked": POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("sent", LAST.values(), ids=LAST)
@pytest.mark.parametrize("behind", [b"\r\n", b"\n", b"\0\xff", HEAD + b"\r\n", b"get x\n"], ids=repr)
@pytest.mark.parametrize("is_apart", [False, True], ids=["with it", "apart"])
async def test_bytes_behind_the_last_request_are_ignored_and_it_is_answered(
    connect: Connect, sent: bytes, behind: bytes, is_apart: bool
) -> None:
    async with connect() as peer:
        for part in (sent, behind) if is_apart else (sent + behind,):
            await peer.send(part)
        assert await peer.closed() == [(200, b'{"body":"hello"}')]


async def test_an_expectation_is_met_before_the_body_and_a_bad_chunk_is_refused_after_it(connect: Connect) -> None:
    async with connect() as peer:
        await peer.send(CHUNKED.removesuffix(b"\r\n") + b"Expect: 100-continue\r\n\r\n")
        assert bytes(peer.written).startswith(b"HTTP/1.1 100 ")
        await peer.send(b"5\r\nhello\r\nx")
        await peer.send(b"\r\n")
        [(status, body)] = await peer.closed()
        assert (status, code_of(body)) == (400, "bad_http")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/echo", 200),
        ("/%65cho", 200),  # a letter is the same letter percent-encoded (RFC 3986, 2.3)
        ("/found/a%20b", 200),
        ("//echo", 404),
        ("///echo", 404),
        ("/%2fecho", 404),
        ("/%2Fecho", 404),
        ("//%65cho", 404),
        ("/found%2fa", 404),
        ("/found/a%2Fb", 404),
        ("/found//a", 404),
        ("/found/a/", 404),
        ("/echo/", 404),
        ("/ECHO", 404),
        ("/./echo", 404),
        ("http://a//echo", 404),
        ("http:////echo", 404),
    ],
)
async def test_a_path_is_found_in_no_spelling_that_a_proxy_reads_otherwise(
    connect: Connect, path: str, status: int
) -> None:
    async with connect() as peer:
        await peer.send(HEAD.replace(b"/echo", path.encode()) + b"\r\n")
        assert [status for status, _ in await peer.answers(1)] == [status]


async def test_a_body_in_many_chunks_lets_all_others_have_their_turns(connect: Connect) -> None:
    chunks, turns = 1000, 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with connect() as peer, anyio.create_task_group() as others:
        others.start_soon(take_turns)
        await peer.send(CHUNKED + b"1\r\nx\r\n" * chunks + b"0\r\n\r\n")
        assert turns >= 2 * chunks // PARTS_PER_TURN - 1
        others.cancel_scope.cancel()
        assert await peer.answers(1) == [(200, json.dumps({"body": "x" * chunks}, separators=(",", ":")).encode())]


async def test_header_fields_are_counted_before_they_are_parsed(
    connect: Connect, make_settings: Callable[..., Settings]
) -> None:
    fields = make_settings().headers_max
    async with connect() as peer:
        await peer.send(HEAD + b"X: y\r\n" * (fields - 1) + b"\r\n")
        assert await peer.answers(1) == [(200, b'{"query":""}')]
        # A parser would find that the last of them is none.
        await peer.send(HEAD + b"X: y\r\n" * (fields - 1) + b": y\r\n\r\n")
        [_, (status, body)] = await peer.closed()
        assert (status, code_of(body)) == (431, "headers_too_large")


# What is answered


async def test_requests_of_one_connection_share_no_context(connect: Connect) -> None:
    async with connect() as peer:
        await peer.send((HEAD.replace(b"/echo", b"/context") + b"\r\n") * 3)
        assert await peer.answers(3) == [(200, b'{"requests":1}')] * 3


async def test_a_fault_outside_every_handler_is_answered_with_a_problem(connect: Connect) -> None:
    async with connect() as peer:
        with capture_logs() as logged:
            await peer.send(HEAD.replace(b"/echo", b"/torn") + b"\r\n")
            await peer.closed()
        assert [line["event"] for line in logged] == ["fault"]
        [(status, body)] = await peer.closed()
        assert (status, code_of(body)) == (500, "internal_error")
        assert b"application/problem+json" in peer.written
        assert b"the body failed" not in peer.written


# What stands in every answer


@pytest.mark.parametrize(
    ("path", "policy"), [("/page", POLICY), ("/echo", DEFAULT_POLICY), ("/nothing", DEFAULT_POLICY)]
)
async def test_an_answer_has_one_policy_and_it_is_the_endpoints_own_where_that_has_one(
    connect: Connect, path: str, policy: str
) -> None:
    async with connect() as peer:
        await peer.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await peer.answers(1)
        head = bytes(peer.written).partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    assert [line for line in head if line.startswith("content-security-policy")] == [
        f"content-security-policy: {policy}"
    ]
    assert len([line for line in head if line.startswith(("x-frame-options", "x-content-type-options"))]) == 2
