"""What stands between a socket and the application: limits, deadlines and headers, seen from raw sockets."""

import json
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote_plus

import anyio
import httpx
import pytest
from anyio.abc import SocketStream
from support.api import Api
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

WITHIN_S = 10.0
HEADER_TIMEOUT_S, KEEP_ALIVE_S, REQUEST_TIMEOUT_S = 1, 1.5, 2
CONNECTIONS_MAX = 300
ORIGIN = "https://app.example.com"
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        if self.headers.get("content-type") != "application/problem+json":
            return None
        code: str = json.loads(self.body)["code"]
        return code


def request(target: str = "/livez", method: str = "GET", *headers: str, body: bytes = b"", host: bool = True) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *(["Host: authd.example"] if host else []), *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def parse(received: bytes, *, is_head: bool = False) -> list[Answer]:
    answers = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        assert len(headers) == len(lines), f"a header stands twice: {lines}"
        assert status_line.startswith("HTTP/1.1 "), received
        length = 0 if is_head else int(headers.get("content-length", "0"))
        answers.append(Answer(int(status_line.split(" ")[1]), headers, rest[:length]))
        received = rest[length:]
    return answers


async def read_to_end(stream: SocketStream) -> bytes:
    received = bytearray()
    try:
        while True:
            received += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return bytes(received)


async def talk(process: ServiceProcess, *parts: bytes, is_head: bool = False) -> list[Answer]:
    """The answers to what is sent, on one connection, which the service has to close."""
    with anyio.fail_after(WITHIN_S):
        async with await anyio.connect_tcp(*process.address) as stream, anyio.create_task_group() as group:

            async def send() -> None:
                try:
                    for part in parts:
                        await stream.send(part)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return  # it had heard enough

            group.start_soon(send)
            received = await read_to_end(stream)
            group.cancel_scope.cancel()
    return parse(received, is_head=is_head)


async def ask(process: ServiceProcess, target: str = "/livez", method: str = "GET", *headers: str) -> Answer:
    [answer] = await talk(process, request(target, method, "Connection: close", *headers), is_head=method == "HEAD")
    return answer


@pytest.fixture(scope="module", autouse=True)
def many_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))


@pytest.fixture(scope="module")
async def strict(services: Services) -> AsyncIterator[ServiceProcess]:
    """A process with short deadlines, few connections, and one web page that may call it."""
    settings = {
        "AUTHD_HEADER_TIMEOUT_S": str(HEADER_TIMEOUT_S),
        "AUTHD_KEEP_ALIVE_S": str(KEEP_ALIVE_S),
        "AUTHD_REQUEST_TIMEOUT_S": str(REQUEST_TIMEOUT_S),
        "AUTHD_HASH_DEADLINE_S": "1",
        "AUTHD_CONNECTIONS_MAX": str(CONNECTIONS_MAX),
        "AUTHD_CORS_ORIGINS": f"{ORIGIN}, http://localhost:3000",
    }
    async with services.running(**settings) as process:
        yield process


async def metric(process: ServiceProcess, line: str) -> float:
    return value((await ask(process, "/metrics")).body.decode(), line)


def value(text: str, line: str) -> float:
    return sum(map(float, re.findall(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)))


# How large


FORM = "Content-Type: application/x-www-form-urlencoded"
JSON = "Content-Type: application/json"


async def test_a_body_announced_too_large_is_refused_before_it_is_sent(service: ServiceProcess) -> None:
    for path in ("/auth/register", "/auth/login", "/auth/refresh_token"):
        kind = FORM if path == "/auth/login" else JSON
        [answer] = await talk(service, request(path, "POST", kind, "Content-Length: 16385"))
        assert (answer.status, answer.code) == (413, "body_too_large")


@pytest.mark.parametrize("size", [1, 100, 5000])
async def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(service: ServiceProcess, size: int) -> None:
    chunk = f"{size:x}\r\n".encode() + b"x" * size + b"\r\n"
    endless = [chunk * (20_000 // size) for _ in range(50)]
    head = request("/auth/login", "POST", FORM, "Transfer-Encoding: chunked")
    [answer] = await talk(service, head, *endless)
    assert (answer.status, answer.code) == (413, "body_too_large")


async def test_the_answer_to_a_body_that_nobody_reads_arrives(service: ServiceProcess) -> None:
    """A reset for what was sent but not read must not take the answer from the client."""
    for _ in range(20):
        [answer] = await talk(
            service, request("/auth/nothing", "POST", "Content-Length: 4000000"), *[b"x" * 100_000] * 40
        )
        assert answer.status == 404


TOO_LARGE = {
    "one field, in one piece": request("/livez", "GET", "X-Big: " + "x" * 20_000),
    "one field, never ended": request("/livez", "GET", "X-Big: " + "x" * 300_000)[:-4],
    "many fields": request("/livez", "GET", *(f"X-{number}: y" for number in range(101))),
    "many bytes in few fields": request("/livez", "GET", *("X: " + "y" * 500 for _ in range(50))),
}


@pytest.mark.parametrize("sent", TOO_LARGE.values(), ids=TOO_LARGE)
async def test_a_header_that_is_too_large_answers_431(service: ServiceProcess, sent: bytes) -> None:
    [answer] = await talk(service, sent)
    assert (answer.status, answer.code) == (431, "headers_too_large")


async def test_a_header_within_the_limits_is_read(service: ServiceProcess) -> None:
    assert (await ask(service, "/livez", "GET", *(f"X-{number}: y" for number in range(98)))).status == 200
    assert (await ask(service, "/livez", "GET", "X-Big: " + "x" * 16_000)).status == 200


async def test_a_target_above_8000_bytes_answers_414(service: ServiceProcess) -> None:
    assert (await ask(service, "/livez?" + "x" * 7993)).status == 200
    [answer] = await talk(service, request("/livez?" + "x" * 7994))
    assert (answer.status, answer.code) == (414, "target_too_long")


async def test_a_chunked_body_that_is_too_large_is_told_that_the_connection_ends(service: ServiceProcess) -> None:
    chunks = b"".join(b"1000\r\n" + b"x" * 4096 + b"\r\n" for _ in range(5))
    [answer] = await talk(service, request("/auth/register", "POST", JSON, "Transfer-Encoding: chunked"), chunks)
    assert (answer.status, answer.code, answer.headers["connection"]) == (413, "body_too_large", "close")


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example", "[::1]:8000", "authd.example:99999"])
async def test_no_route_depends_on_the_host(service: ServiceProcess, host: str) -> None:
    sent = request("/livez", "GET", f"Host: {host}", "Connection: close", host=False)
    [answer] = await talk(service, sent)
    assert answer.status == 200


# How many


@asynccontextmanager
async def half_open(process: ServiceProcess, number: int, sent: bytes) -> AsyncIterator[None]:
    """Connections that have sent only a part of a request."""
    async with AsyncExitStack() as stack:
        for _ in range(number):
            stream = await stack.enter_async_context(await anyio.connect_tcp(*process.address))
            await stream.send(sent)
        yield


HALF_SENT = {
    "nothing": b"",
    "half a header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: ",
    "half a body": request("/auth/login", "POST", FORM, "Content-Length: 100", body=b"username="),
}


@pytest.mark.proof
@pytest.mark.parametrize("sent", HALF_SENT.values(), ids=HALF_SENT)
async def test_a_thousand_half_open_connections_keep_nobody_out(services: Services, sent: bytes) -> None:
    settings = {"AUTHD_CONNECTIONS_MAX": str(CONNECTIONS_MAX)}
    async with services.running(**settings) as process, process.api() as api:
        account = await api.new_account()
        with anyio.fail_after(3 * WITHIN_S):
            async with half_open(process, 1000, sent), process.api() as newcomer:

                async def is_let_in() -> str:
                    try:
                        answer = await newcomer.login(account.username, account.password)
                        return (await newcomer.get("/metrics")).text if answer.status_code == 200 else ""
                    except httpx.TransportError:  # turned away, among hundreds at the same moment
                        return ""

                text = await eventually(is_let_in)
                assert value(text, "authd_http_connections") <= CONNECTIONS_MAX
                ended = [f'authd_http_connections_ended_total{{how="{how}"}}' for how in ("evicted", "refused")]
                evicted, refused = [value(text, line) for line in ended]
                assert evicted >= 1
                assert evicted + refused >= 1000 - CONNECTIONS_MAX


async def test_when_every_connection_waits_for_us_one_more_is_told_503(services: Services) -> None:
    settings = {"AUTHD_CONNECTIONS_MAX": "8", "AUTHD_BCRYPT_COST": "12", "AUTHD_HASH_THREADS": "1"}
    async with services.running(**settings) as process:
        answers: list[Answer] = []

        async def login(number: int) -> None:
            body = f"username={number}%40example.com&password=wrong+password".encode()
            head = request("/auth/login", "POST", FORM, f"Content-Length: {len(body)}", "Connection: close")
            answers.extend(await talk(process, head + body))

        async with anyio.create_task_group() as group:
            for number in range(12):
                group.start_soon(login, number)
        refused = answers[:4]  # at once, before any of the others
        assert [answer.code for answer in answers] == ["connections_full"] * 4 + ["invalid_credentials"] * 8
        for answer in refused:
            assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
            assert answer.headers["cache-control"] == "no-store"
            assert SECURITY_HEADERS.items() <= answer.headers.items()
        assert await metric(process, 'authd_http_connections_ended_total{how="refused"}') == 4


async def test_connections_of_clients_that_left_are_not_counted(strict: ServiceProcess) -> None:
    before = await metric(strict, "authd_http_connections")
    async with half_open(strict, 50, b"GET"):
        pass

    async def are_gone() -> bool:
        return await metric(strict, "authd_http_connections") <= before

    await eventually(are_gone)


# What stands behind a request

SLOW = {"AUTHD_BCRYPT_COST": "14", "AUTHD_HEADER_TIMEOUT_S": "0.3", "AUTHD_HASH_THREADS": "1"}
BODY = b"username=nobody%40example.com&password=wrong+password"
LOGIN = request("/auth/login", "POST", FORM, f"Content-Length: {len(BODY)}", body=BODY)


async def test_a_pipelined_request_is_cut_by_no_deadline_of_the_next_ones_head(services: Services) -> None:
    async with services.running(**SLOW) as process:
        with anyio.fail_after(WITHIN_S):
            async with await anyio.connect_tcp(*process.address) as stream:
                await stream.send(request("/livez") + LOGIN)
                received = await stream.receive()
                # The login has begun, from what was read with the request before it.
                await stream.send(request("/livez", "GET", "Connection: close"))
                received += await read_to_end(stream)
        assert [answer.status for answer in parse(received)] == [200, 401, 200]


@pytest.mark.parametrize("behind", [b"", b"\r\n", request("/livez")], ids=["nothing", "an empty line", "a request"])
async def test_a_client_that_hangs_up_is_noticed_whatever_it_sent_behind_its_request(
    services: Services, behind: bytes
) -> None:
    async with services.running(**SLOW) as process:
        async with await anyio.connect_tcp(*process.address) as stream:
            await stream.send(LOGIN + behind)

            async def is_hashed() -> bool:
                return await metric(process, 'authd_hash_wait_seconds_count{queue="others"}') == 1

            await eventually(is_hashed)

        async def is_cut() -> bool:
            return (
                await metric(process, 'authd_http_requests_total{method="POST",route="/auth/login",status="499"}') == 1
            )

        await eventually(is_cut)


# How slow


async def trickle(process: ServiceProcess, sent: bytes) -> tuple[list[Answer], float]:
    """The answers to bytes sent one at a time, and the seconds until the connection was closed."""
    started = anyio.current_time()
    with anyio.fail_after(WITHIN_S):
        async with await anyio.connect_tcp(*process.address) as stream, anyio.create_task_group() as group:

            async def send() -> None:
                try:
                    for index in range(len(sent)):
                        await stream.send(sent[index : index + 1])
                        await anyio.sleep(0.1)  # what is tested is slowness
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    return

            group.start_soon(send)
            received = await read_to_end(stream)
            group.cancel_scope.cancel()
    return parse(received), anyio.current_time() - started


async def test_a_header_that_trickles_is_given_up(strict: ServiceProcess) -> None:
    answers, seconds = await trickle(strict, request("/livez", "GET", "X: " + "y" * 500))
    assert answers == []
    assert HEADER_TIMEOUT_S <= seconds < HEADER_TIMEOUT_S + 2


async def test_a_connection_that_says_nothing_is_given_up(strict: ServiceProcess) -> None:
    answers, seconds = await trickle(strict, b"")
    assert answers == []
    assert HEADER_TIMEOUT_S <= seconds < HEADER_TIMEOUT_S + 2


async def test_a_body_that_trickles_answers_at_the_deadline_of_the_request(strict: ServiceProcess) -> None:
    head = request("/auth/login", "POST", FORM, "Content-Length: 500")
    with anyio.fail_after(WITHIN_S):
        async with await anyio.connect_tcp(*strict.address) as stream, anyio.create_task_group() as group:
            started = anyio.current_time()
            await stream.send(head)

            async def send() -> None:
                try:
                    while True:
                        await stream.send(b"x")
                        await anyio.sleep(0.1)
                except anyio.BrokenResourceError:
                    return

            group.start_soon(send)
            [answer] = parse(await read_to_end(stream))
            group.cancel_scope.cancel()
    # Which of two deadlines of the same length comes first is chance.
    assert (answer.status, answer.code) == (408, "body_timeout")
    assert REQUEST_TIMEOUT_S <= anyio.current_time() - started < REQUEST_TIMEOUT_S + 3


async def test_an_idle_connection_is_kept_and_then_closed(strict: ServiceProcess) -> None:
    with anyio.fail_after(WITHIN_S):
        async with await anyio.connect_tcp(*strict.address) as stream:
            for _ in range(3):
                await stream.send(request())
                received = b""
                while not received.endswith(b"}"):
                    received += await stream.receive()
                [answer] = parse(received)
                assert answer.status == 200
                assert "connection" not in answer.headers
            started = anyio.current_time()
            assert await read_to_end(stream) == b""
            assert KEEP_ALIVE_S - 0.5 <= anyio.current_time() - started < KEEP_ALIVE_S + 2


async def test_a_connection_answers_a_thousand_requests_and_closes(service: ServiceProcess) -> None:
    answers = await talk(service, request() * 1100)
    assert len(answers) == 1000
    assert {answer.status for answer in answers} == {200}
    assert [answer.headers.get("connection") for answer in answers] == [None] * 999 + ["close"]


@asynccontextmanager
async def deaf(process: ServiceProcess) -> AsyncIterator[None]:
    """A client that asks for far more than buffers hold and reads nothing."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(process.address)
    raw.setblocking(False)
    with raw:
        raw.send(request("/openapi.json") * 900)
        yield


async def test_a_client_that_does_not_read_is_given_up(strict: ServiceProcess) -> None:
    before = await metric(strict, "authd_http_connections")

    async def open_connections(is_wanted: Callable[[float], bool]) -> bool:
        return is_wanted(await metric(strict, "authd_http_connections"))

    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(deaf(strict))
        await eventually(lambda: open_connections(lambda number: number > before))
        await eventually(lambda: open_connections(lambda number: number <= before), 20)


async def test_a_client_that_does_not_read_holds_up_no_stop(services: Services) -> None:
    settings = {"AUTHD_REQUEST_TIMEOUT_S": "3", "AUTHD_HASH_DEADLINE_S": "1"}
    async with services.running(**settings) as process, deaf(process):
        await eventually(lambda: _asked(process, "/openapi.json"))
        process.signal()
        assert await process.wait(8) == 0


async def _asked(process: ServiceProcess, route: str) -> bool:
    return bool(await metric(process, f'authd_http_requests_total{{method="GET",route="{route}",status="200"}}'))


# Which protocol


async def test_http_2_without_tls_is_refused(service: ServiceProcess) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
    [answer] = await talk(service, preface)
    assert (answer.status, answer.code) == (505, "http_version_unknown")


@pytest.mark.parametrize(
    "headers",
    [
        ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"],
        ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="],
        ["Connection: Upgrade", "Upgrade: TLS/1.0"],
    ],
    ids=["h2c", "websocket", "tls"],
)
async def test_an_upgrade_is_ignored(service: ServiceProcess, headers: list[str]) -> None:
    answers = await talk(service, request("/livez", "GET", *headers), request("/livez", "GET", "Connection: close"))
    assert [answer.status for answer in answers] == [200, 200]


async def test_pipelined_requests_are_answered_in_order(service: ServiceProcess) -> None:
    body = b"username=nobody%40example.com&password=wrong+password"
    login = request("/auth/login", "POST", FORM, f"Content-Length: {len(body)}", body=body)
    sent = login + request("/livez") + request("/nowhere") + request("/auth/me", "GET", "Connection: close")
    answers = await talk(service, sent)
    assert [answer.status for answer in answers] == [401, 200, 404, 401]
    assert [answer.code for answer in answers] == ["invalid_credentials", None, "not_found", "token_missing"]


SMUGGLED = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED_WITH_MORE = b"0\r\n\r\n" + SMUGGLED
SMUGGLERS = {
    "both lengths": request("/auth/login", "POST", FORM, "Content-Length: 5", "Transfer-Encoding: chunked"),
    "both, the other way": request("/auth/login", "POST", FORM, "Transfer-Encoding: chunked", "Content-Length: 5"),
    "two lengths": request("/auth/login", "POST", FORM, "Content-Length: 5", "Content-Length: 0"),
    "a list of lengths": request("/auth/login", "POST", FORM, "Content-Length: 5, 0"),
    "a signed length": request("/auth/login", "POST", FORM, "Content-Length: +5"),
    "a coding twice": request("/auth/login", "POST", FORM, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "an unknown coding": request("/auth/login", "POST", FORM, "Transfer-Encoding: xchunked"),
    "a space before the colon": request("/auth/login", "POST", FORM, "Transfer-Encoding : chunked"),
    "an old version": b"POST /auth/login HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("sent", SMUGGLERS.values(), ids=SMUGGLERS)
async def test_a_request_whose_end_is_in_doubt_ends_the_connection(service: ServiceProcess, sent: bytes) -> None:
    answers = await talk(service, sent + CHUNKED_WITH_MORE)
    assert [answer.status for answer in answers] in ([400], [501])


@pytest.mark.parametrize("method", ["TRACE", "BREW", "PROPFIND", "OPTIONS", "PUT", "X" * 200])
async def test_a_method_that_an_endpoint_has_not_answers_405(service: ServiceProcess, method: str) -> None:
    answer = await ask(service, "/auth/me", method, "X-Secret: do-not-echo")
    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", "GET, HEAD")
    assert b"do-not-echo" not in answer.body


@pytest.mark.parametrize("target", ["authd.example:443", "*", "livez", "ftp://a/livez", "?x", "mailto:a@b"])
async def test_a_target_that_is_no_path_of_ours_answers_400(service: ServiceProcess, target: str) -> None:
    for method in ("CONNECT", "OPTIONS", "GET"):
        [answer] = await talk(service, request(target, method))
        assert (answer.status, answer.code) == (400, "bad_http")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://authd.example/livez", 200),
        ("HTTP://authd.example/livez", 400),
        ("https://other.example:8443/livez?x=http://a/b", 200),
        ("http://user:password@authd.example/livez", 200),
        ("http://[broken/livez", 200),
        ("http://authd.example", 404),
        ("http://authd.example?x=/livez", 404),
        ("http:///livez", 200),
        ("//authd.example/livez", 404),
        ("/../livez", 404),
        ("/%2e%2e/livez", 404),
        ("/livez%00", 404),
        ("/livez;x=1", 404),
        ("/%ff%fe", 404),
        ("/livez#fragment", 404),
    ],
)
async def test_an_absolute_target_means_its_path_and_nothing_redirects(
    service: ServiceProcess, target: str, status: int
) -> None:
    answer = await ask(service, target)
    assert answer.status == status
    assert "location" not in answer.headers


async def test_head_answers_like_get_without_the_body(service: ServiceProcess) -> None:
    for target, status in (("/livez", 200), ("/.well-known/jwks.json", 200), ("/auth/me", 401), ("/nowhere", 404)):
        head, get = await ask(service, target, "HEAD"), await ask(service, target)
        assert (head.status, head.body) == (status, b"")
        changing = {"date", "x-request-id"}
        assert {name: head.headers[name] for name in head.headers.keys() - changing} == {
            name: get.headers[name] for name in get.headers.keys() - changing
        }
    answers = parse(
        (await _raw(service, request("/nowhere", "HEAD") + request("/livez", "HEAD", "Connection: close"))),
        is_head=True,
    )
    assert [answer.status for answer in answers] == [404, 200]
    [refused] = await talk(service, request("*", "HEAD"), is_head=True)
    assert refused.status == 400


async def _raw(process: ServiceProcess, sent: bytes) -> bytes:
    with anyio.fail_after(WITHIN_S):
        async with await anyio.connect_tcp(*process.address) as stream:
            await stream.send(sent)
            return await read_to_end(stream)


# What headers say


@pytest.mark.parametrize(
    "value",
    ["a\r\nSet-Cookie: stolen=1", "a\nSet-Cookie: stolen=1", "a\rSet-Cookie: stolen=1", "%0d%0aSet-Cookie:%20stolen=1"],
)
async def test_a_request_id_brings_no_header_and_no_log_line_of_its_own(service: ServiceProcess, value: str) -> None:
    answer = await ask(service, "/livez", "GET", f"X-Request-ID: {value}")
    assert "set-cookie" not in answer.headers
    if answer.status == 200:
        assert re.fullmatch(r"a|[0-9a-f]{16}", answer.headers["x-request-id"])
    else:
        assert (answer.status, answer.code) == (400, "bad_http")
    assert "stolen" not in service.everything_logged


async def test_a_usable_request_id_comes_back_and_any_other_is_replaced(service: ServiceProcess) -> None:
    assert (await ask(service, "/livez", "GET", "X-Request-ID: Order_7.a-b")).headers["x-request-id"] == "Order_7.a-b"
    for unusable in ("", "a b", "x" * 65, "<script>", "a;b", "\xe4", '"', "a,b"):
        answer = await ask(service, "/livez", "GET", f"X-Request-ID: {unusable}")
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])


async def test_nothing_that_tells_of_a_user_may_be_stored(service: ServiceProcess, api: Api) -> None:
    account = await api.new_account()
    pair = await api.new_session(account)
    bearer = api.bearer(pair["access_token"])
    await api.new_session(account)
    sessions = await api.get("/auth/sessions", headers=bearer)
    answers = [
        await api.register("stored@example.com", "correct horse battery"),
        await api.register("stored@example.com", "correct horse battery"),
        await api.login(account.username, account.password),
        await api.login(account.username, "wrong password"),
        await api.refresh(pair["refresh_token"]),
        await api.me(pair["access_token"]),
        await api.me("no token"),
        sessions,
        await api.delete(f"/auth/sessions/{quote_plus(sessions.json()['sessions'][1]['id'])}", headers=bearer),
        await api.post("/auth/introspect", data={"token": "x"}),
        await api.post("/auth/revoke", data={"token": "x"}),
        await api.logout(pair["access_token"]),
        await api.get("/metrics"),
        await api.get("/readyz"),
        await api.get("/nowhere"),
    ]
    assert [answer.headers["Cache-Control"] for answer in answers] == ["no-store"] * len(answers)
    assert (await api.get("/.well-known/jwks.json")).headers["Cache-Control"] == "public, max-age=300"


EVERY_KIND = {
    "an answer": request("/livez", "GET", "Connection: close"),
    "a refusal": request("/auth/me", "GET", "Connection: close"),
    "no route": request("/nowhere", "GET", "Connection: close"),
    "no method": request("/livez", "PUT", "Connection: close"),
    "a body too large": request("/auth/login", "POST", FORM, "Content-Length: 99999"),
    "no http": b"\x16\x03\x01\x02\r\n\r\n",
    "no host": request("/livez", host=False),
    "a bad chunk": request("/auth/login", "POST", FORM, "Transfer-Encoding: chunked", body=b"zz\r\n"),
    "a header too large": request("/livez", "GET", "X: " + "y" * 20_000),
    "a target too long": request("/" + "x" * 9000),
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown coding": request("/auth/login", "POST", FORM, "Transfer-Encoding: gzip"),
}


@pytest.mark.parametrize("sent", EVERY_KIND.values(), ids=EVERY_KIND)
async def test_every_answer_has_the_security_headers_and_no_name_of_a_server(
    service: ServiceProcess, sent: bytes
) -> None:
    [answer] = await talk(service, sent)
    assert SECURITY_HEADERS.items() <= answer.headers.items()
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] in ("application/json", "application/problem+json")
    assert answer.headers.keys().isdisjoint({"server", "x-powered-by", "set-cookie"})


# Which web pages


CORS_HEADERS = re.compile("access-control-.*")


def cors_of(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if CORS_HEADERS.fullmatch(name)}


def preflight(origin: str, path: str = "/auth/me") -> tuple[str, str, str, str]:
    return path, "OPTIONS", f"Origin: {origin}", "Access-Control-Request-Method: GET"


async def test_without_the_setting_no_page_may_read_anything(service: ServiceProcess) -> None:
    for path in ("/auth/me", "/livez", "/.well-known/jwks.json"):
        answer = await ask(service, path, "GET", f"Origin: {ORIGIN}")
        assert cors_of(answer) == {}
    answer = await ask(service, *preflight(ORIGIN))
    assert (answer.status, cors_of(answer)) == (405, {})


@pytest.mark.parametrize("origin", [ORIGIN, "http://localhost:3000"])
async def test_a_page_of_a_permitted_origin_may_ask_and_read(strict: ServiceProcess, origin: str) -> None:
    asked = await ask(strict, *preflight(origin, "/auth/refresh_token"), "Access-Control-Request-Headers: content-type")
    assert (asked.status, asked.body) == (204, b"")
    assert "content-length" not in asked.headers
    assert cors_of(asked) == {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": "Authorization, Content-Type, X-Device-Token, X-Request-ID",
        "access-control-expose-headers": "Retry-After, WWW-Authenticate, X-Request-ID",
        "access-control-max-age": "600",
    }
    assert asked.headers["vary"] == "Origin"
    answer = await ask(strict, "/auth/me", "GET", f"Origin: {origin}")
    assert (answer.status, answer.headers["vary"]) == (401, "Origin")
    assert cors_of(answer)["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "*",
        f"{ORIGIN}.evil.example",
        f"{ORIGIN}:443",
        ORIGIN.upper(),
        "http://app.example.com",
        f"{ORIGIN}/",
        f"{ORIGIN} https://evil.example",
    ],
)
async def test_a_page_of_any_other_origin_may_not(strict: ServiceProcess, origin: str) -> None:
    for asked in (preflight(origin), ("/auth/me", "GET", f"Origin: {origin}")):
        answer = await ask(strict, *asked)
        assert answer.status in (405, 401)
        assert cors_of(answer) == {}
        assert answer.headers["vary"] == "Origin"


async def test_probes_and_metrics_are_for_no_page(strict: ServiceProcess) -> None:
    for path in ("/metrics", "/readyz", "/livez"):
        assert cors_of(await ask(strict, path, "GET", f"Origin: {ORIGIN}")) == {}
        assert (await ask(strict, *preflight(ORIGIN, path))).status == 405


async def test_a_page_can_read_that_a_request_took_too_long(strict: ServiceProcess) -> None:
    [answer] = await talk(strict, request("/auth/login", "POST", FORM, "Content-Length: 9", f"Origin: {ORIGIN}"))
    assert answer.status in (503, 408)
    assert cors_of(answer)["access-control-allow-origin"] == ORIGIN
