"""What no client should send: each gets a 4xx that says so, and the service goes on as if nothing had happened."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote_plus

import anyio
import httpx
import pytest
from anyio.abc import SocketAttribute
from support.api import Api, assert_problem
from support.process import ServiceProcess

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PASSWORD = "correct horse battery"
CLIENT_ERRORS = range(400, 500)
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
async def access_token(service: ServiceProcess) -> str:
    async with service.api() as api:
        token: str = (await api.new_session(await api.new_account()))["access_token"]
        return token


@pytest.fixture(autouse=True)
async def unharmed(service: ServiceProcess, access_token: str) -> AsyncIterator[None]:
    """After every test the same process still does its work. Its log is read at the module's end."""
    pid = service.pid
    yield
    assert service.is_running
    assert service.pid == pid
    async with service.api() as api:
        assert (await api.me(access_token)).status_code == 200


# What is not JSON, or not that JSON

NO_JSON_OBJECTS = [
    b"",
    b" ",
    b"{",
    b"nonsense",
    b"null",
    b"[]",
    b'"text"',
    b"1",
    b"username=x&password=y",
    b"<xml/>",
    b'{"username": 1,',
    b'{"username": "x@example.com" "password": "y"}',
    b"{'username': 'x'}",
    b'{"username": NaN}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"\x00",
    b'{"username": "\xff@example.com", "password": "12345678"}',
    b'{"username": "\xed\xa0\x80@example.com", "password": "12345678"}',
    b'{"username": "x@example.com", "password": "12345678"} trailing',
    b'{"a": "\\x00"}',
]


@pytest.mark.parametrize("path", ["/auth/register", "/auth/refresh_token"])
@pytest.mark.parametrize("body", NO_JSON_OBJECTS, ids=lambda body: repr(body[:24]))
async def test_a_body_that_is_no_json_object_answers_422(api: Api, path: str, body: bytes) -> None:
    assert_problem(await api.post(path, content=body, headers=JSON), 422)


@pytest.mark.parametrize("path", ["/auth/register", "/auth/refresh_token"])
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
async def test_json_of_another_content_type_answers_422(api: Api, path: str, content_type: str) -> None:
    answer = await api.post(path, content=b"{}", headers={"Content-Type": content_type})
    assert_problem(answer, 422, "unsupported_media_type")


async def test_json_without_a_content_type_or_with_a_parameter_is_read(api: Api) -> None:
    for number, headers in enumerate([{}, {"Content-Type": "application/json; charset=utf-8"}]):
        body = json.dumps({"username": f"typed{number}@example.com", "password": PASSWORD}).encode()
        assert (await api.post("/auth/register", content=body, headers=headers)).status_code == 201


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain", "multipart/form-data; boundary=x"])
async def test_a_login_that_is_no_form_answers_422(api: Api, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    body = b"username=x&password=y"
    assert_problem(await api.post("/auth/login", content=body, headers=headers), 422, "unsupported_media_type")


WRONG_VALUES: list[Any] = [None, 1, -1.5, 1e300, 10**400, True, [], {}, [[]], ["x@example.com"], {"a": {"b": 1}}]


@pytest.mark.parametrize("value", WRONG_VALUES, ids=lambda value: repr(value)[:12])
async def test_a_value_of_a_wrong_type_answers_422_and_names_the_field(api: Api, value: Any) -> None:
    fields = {"username": "x@example.com", "password": PASSWORD, "full_name": "X"}
    for field in fields:
        if field == "full_name" and value is None:
            continue
        answer = await api.post("/auth/register", json=fields | {field: value})
        problem = assert_problem(answer, 422)
        assert problem["code"] == "malformed_request" or [e["field"] for e in problem["errors"]] == [field]
    assert_problem(await api.post("/auth/refresh_token", json={"refresh_token": value}), 422)


async def test_missing_fields_are_named(api: Api) -> None:
    problem = assert_problem(await api.post("/auth/refresh_token", json={}), 422, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == ["refresh_token"]


async def test_unknown_fields_are_ignored(api: Api) -> None:
    body = {"username": "more@example.com", "password": PASSWORD, "is_admin": True, "user_id": 1, "x": {"y": [1]}}
    created = await api.post("/auth/register", json=body)
    assert created.status_code == 201
    assert created.json()["user_id"] > 1
    assert (await api.login("more@example.com", PASSWORD, otp="1", remember_me="yes")).status_code == 200


async def test_of_a_field_that_stands_twice_in_json_one_value_counts_for_everything(api: Api) -> None:
    body = b'{"username": "one@example.com", "username": "two@example.com", "password": "%s"}' % PASSWORD.encode()
    created = await api.post("/auth/register", content=body, headers=JSON)
    assert (created.status_code, created.json()["username"]) == (201, "two@example.com")
    assert (await api.login("one@example.com", PASSWORD)).status_code == 401


DEPTH = 8_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEPTH,
        b"[" * (DEPTH // 2) + b"]" * (DEPTH // 2),
        b'{"a":' * (DEPTH // 4),
        b'{"username":' + b"[" * DEPTH,
        b'{"unknown":' + b"[" * DEPTH,
        b'{"username": 1, "unknown":' + b"[" * DEPTH,
        b'{"username":' + b'{"a":' * (DEPTH // 4) + b"1" + b"}" * (DEPTH // 4) + b"}",
        b'{"refresh_token":' + b"[" * (DEPTH // 2) + b"]" * (DEPTH // 2) + b"}",
        b'{"password": ' + b"9" * DEPTH + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_deeply_nested_json_answers_422(api: Api, body: bytes) -> None:
    for path in ("/auth/register", "/auth/refresh_token"):
        assert_problem(await api.post(path, content=body, headers=JSON), 422)


# What is not a form

BROKEN_FORMS = [
    b"",
    b"&&&",
    b"====",
    b"username",
    b"username&password",
    b"username=a",
    b"username=&password=",
    b"username=a&password=%ED%A0%80",
    b"username=%ED%A0%80&password=12345678",
    b"username=%FF&password=12345678",
    b"username=\xff&password=12345678",
    b"username=\xed\xa0\x80&password=12345678",
    b"a=1&" * 1000 + b"username=a&password=b",
    b"username=a&username=b&password=12345678",
    b"username=a&password=12345678&password=87654321",
    b'{"username": "a", "password": "b"}',
]


@pytest.mark.parametrize("body", BROKEN_FORMS, ids=lambda body: repr(body[:36]))
async def test_a_login_whose_form_is_broken_or_repeats_a_field_answers_422(api: Api, body: bytes) -> None:
    assert_problem(await api.post("/auth/login", content=body, headers=FORM), 422)


ODD_STRINGS = {
    "nul": "a\0b@example.com",
    "only nul": "\0" * 12,
    "escape": "\x1b[31mred@example.com",
    "newline": "a\r\nSet-Cookie: a=b@example.com",
    "right to left": "\u202egro.elpmaxe@a",
    "emoji": "🦊🦊🦊🦊🦊🦊🦊🦊",
    "combining": "e" + "\u0301" * 500,
    "ligature": "\ufdfa" * 20,
    "noncharacter": "\uffff\ufffe@example.com",
    "sql": "' OR '1'='1' --",
    "lua": '"}) redis.call("FLUSHALL") --',
    "format": "%s%n{0}{user.__class__}",
    "only spaces": " " * 12,
    "long": "x" * 5000,
}


@pytest.mark.parametrize("text", ODD_STRINGS.values(), ids=ODD_STRINGS)
async def test_odd_characters_in_any_string_of_any_endpoint_are_data_and_no_fault(
    api: Api, access_token: str, text: str
) -> None:
    answers = [
        await api.login(text, PASSWORD),
        await api.login("x@example.com", text),
        await api.login("x@example.com", PASSWORD, scope=text, client_id=text, grant_type=text),
    ]
    for answer in answers:
        assert_problem(answer, 401, "invalid_credentials")
    assert_problem(await api.refresh(text), 401, "refresh_token_invalid")
    bearer = {"Authorization": f"Bearer {quote_plus(text)}"}
    assert_problem(await api.get("/auth/me", headers=bearer), 401, "token_invalid")
    assert_problem(await api.post("/auth/logout", headers=bearer), 401, "token_invalid")
    assert_problem(await api.register(text, PASSWORD), 422, "invalid_request")
    for field in ("password", "full_name"):
        body = {"username": "odd@example.com", "password": PASSWORD, field: text}
        answer = await api.post("/auth/register", json=body)
        assert answer.status_code in (201, 409, 422), answer.text
        if "\0" in text:
            problem = assert_problem(answer, 422, "invalid_request")
            assert [error["field"] for error in problem["errors"]] == [field]
    # Additions to the contract take strings too.
    for path in ("/auth/introspect", "/auth/revoke"):
        form = {"token": text, "client_id": text, "client_secret": text}
        assert_problem(await api.post(path, data=form), CLIENT_ERRORS)
        assert_problem(await api.post(path, data={"token": text}, auth=(text.encode(), text.encode())), CLIENT_ERRORS)
    session = f"/auth/sessions/{quote_plus(text)[:3000]}"
    assert_problem(await api.delete(session, headers=api.bearer(access_token)), CLIENT_ERRORS)
    answer = await api.post("/auth/logout", params={"scope": text[:3000]}, headers=api.bearer(access_token))
    assert_problem(answer, CLIENT_ERRORS)


async def test_a_full_name_keeps_every_character_that_can_be_stored(api: Api) -> None:
    for text in ("\u202eנעמה", "🦊 \x1b \uffff", "'; DROP TABLE users; --", " spaced ", "x" * 200):
        account = await api.new_account(full_name=text)
        assert (await api.me((await api.new_session(account))["access_token"])).json()["full_name"] == text


@pytest.mark.parametrize("escape", [r"\ud800", r"\udfff", r"\ud800\ud800", r"\udc00\ud800", r"\ud83d"])
async def test_a_lone_surrogate_in_json_answers_422(api: Api, escape: str) -> None:
    for field in ("username", "password", "full_name", "unknown"):
        fields = {"username": "x@example.com", "password": "12345678", field: "@"}
        body = json.dumps(fields).replace('"@"', f'"aaaaaaaa{escape}@example.com"')
        assert_problem(await api.post("/auth/register", content=body, headers=JSON), 422)
    body = f'{{"refresh_token": "v2.{escape}"}}'
    assert_problem(await api.post("/auth/refresh_token", content=body, headers=JSON), 422)


async def test_an_escaped_pair_of_surrogates_is_one_character(api: Api) -> None:
    body = rb'{"username": "fox@example.com", "password": "correct horse \ud83e\udd8a", "full_name": "\ud83e\udd8a"}'
    created = await api.post("/auth/register", content=body, headers=JSON)
    assert (created.status_code, created.json()["full_name"]) == (201, "🦊")
    assert (await api.login("fox@example.com", "correct horse 🦊")).status_code == 200


# Lengths


@pytest.mark.parametrize("username", ["x" * 300, "x" * 288 + "@example.com", "x@" + "y" * 286 + ".example.com"])
async def test_an_address_of_300_characters_is_refused_and_is_an_unknown_user(api: Api, username: str) -> None:
    assert len(username) >= 300
    problem = assert_problem(await api.register(username, PASSWORD), 422, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == ["username"]
    assert_problem(await api.login(username, PASSWORD), 401, "invalid_credentials")


def password_of(size: int) -> str:
    return ("a passphrase of some bytes, " * (size // 28 + 1))[:size]


@pytest.mark.parametrize("size", [8, 72, 73, 1024])
async def test_a_password_within_the_bounds_registers_and_logs_in_with_all_its_bytes(api: Api, size: int) -> None:
    username, password = f"length-{size}@example.com", password_of(size)
    assert (await api.register(username, password)).status_code == 201
    assert (await api.login(username, password)).status_code == 200
    for other in (password[:-1], password + "x", password[:-1] + "\u00fc", password.upper()):
        assert_problem(await api.login(username, other), 401, "invalid_credentials")


@pytest.mark.parametrize("size", [0, 7, 1025, 5000])
async def test_a_password_out_of_bounds_is_refused_and_logs_nobody_in(api: Api, size: int) -> None:
    account, password = await api.new_account(), password_of(size)
    problem = assert_problem(await api.register("never@example.com", password), 422, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == ["password"]
    for username in (account.username, "never@example.com"):
        answer = await api.login(username, password)
        # An empty value is a missing one (RFC 6749, 3.1).
        assert_problem(answer, 401 if size else 422, "invalid_credentials" if size else "invalid_request")


async def test_the_bounds_of_a_password_count_bytes_above_and_characters_below(api: Api) -> None:
    assert (await api.register("umlauts@example.com", "ü" * 512)).status_code == 201
    assert (await api.login("umlauts@example.com", "ü" * 512)).status_code == 200
    assert (await api.login("umlauts@example.com", "ü" * 511)).status_code == 401
    assert_problem(await api.register("umlauts2@example.com", "ü" * 513), 422)
    assert_problem(await api.register("umlauts3@example.com", "ü" * 7), 422)


async def test_a_body_above_the_limit_answers_413(api: Api) -> None:
    for path, headers in (("/auth/register", JSON), ("/auth/refresh_token", JSON), ("/auth/login", FORM)):
        refused = await api.post(path, content=b"x" * 16_385, headers=headers)
        assert_problem(refused, 413, "body_too_large")
        # What is left of the body is not read, and a client that is not told would use the connection again.
        assert refused.headers["Connection"] == "close"
        assert (await api.post(path, content=b"x" * 16_384, headers=headers)).status_code in (401, 422)


async def test_an_answer_that_needs_no_body_leaves_the_connection_usable(api: Api) -> None:
    headers = {"Content-Type": "text/plain"}
    for _ in range(25):
        for path, status in (("/nowhere", 404), ("/auth/me", 405), ("/auth/login", 422), ("/auth/logout", 401)):
            assert_problem(await api.post(path, content=b"x" * 9_000, headers=headers), status)


async def test_an_answer_before_the_end_of_a_body_says_that_the_connection_ends(service: ServiceProcess) -> None:
    head = await exchange(service, b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
    assert head.startswith(b"HTTP/1.1 404")
    assert b"\r\nconnection: close\r\n" in head


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("path", ["/auth/register", "/auth/login", "/auth/refresh_token", "/auth/logout", "/nowhere"])
async def test_ten_megabytes_are_answered_with_413_or_closed(api: Api, path: str, is_chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * MEGABYTE

    headers = FORM if path == "/auth/login" else JSON
    content = chunks() if is_chunked else b"x" * 10 * MEGABYTE
    try:
        answer = await api.post(path, content=content, headers=headers)
    except httpx.TransportError:
        return
    # Two of them ask for a token, or for a route, before they look at a body.
    assert_problem(answer, {413, 401, 404})


async def test_a_chunked_body_is_read_like_any_other(api: Api) -> None:
    async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    body = json.dumps({"username": "chunked@example.com", "password": PASSWORD}).encode()
    answer = await api.post("/auth/register", content=chunks(body[:10], body[10:11], body[11:]), headers=JSON)
    assert answer.status_code == 201
    form = f"username=chunked%40example.com&password={quote_plus(PASSWORD)}".encode()
    assert (await api.post("/auth/login", content=chunks(form[:5], form[5:]), headers=FORM)).status_code == 200
    assert_problem(await api.post("/auth/login", content=chunks(), headers=FORM), 422)
    pair, other = [(await api.login("chunked@example.com", PASSWORD)).json() for _ in range(2)]
    headers = JSON | api.bearer(pair["access_token"])
    assert (await api.post("/auth/logout", content=chunks(b'{"scope":', b'"current"}'), headers=headers)).is_success
    assert (await api.me(pair["access_token"])).status_code == 401
    assert (await api.me(other["access_token"])).status_code == 200


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream"])
async def test_a_logout_of_an_old_client_with_any_type_and_no_body_ends_every_session(
    api: Api, content_type: str
) -> None:
    account = await api.new_account()
    pair, other = await api.new_session(account), await api.new_session(account)
    headers = {"Content-Type": content_type} | api.bearer(pair["access_token"])
    assert (await api.post("/auth/logout", headers=headers)).json() == {"status": "success"}
    assert (await api.me(other["access_token"])).status_code == 401


# Paths, methods and headers


@pytest.mark.parametrize(
    "path", ["/", "/auth", "/auth/", "/auth/login/", "/AUTH/LOGIN", "/auth/nothing", "/auth/login%00", "/..%2f..%2fetc"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_path_answers_404(api: Api, method: str, path: str) -> None:
    assert_problem(await api.request(method, path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/auth/login", "POST"),
        ("PUT", "/auth/register", "POST"),
        ("DELETE", "/auth/refresh_token", "POST"),
        ("PATCH", "/auth/logout", "POST"),
        ("POST", "/auth/me", "GET"),
        ("POST", "/readyz", "GET"),
        ("TRACE", "/auth/me", "GET"),
        ("BREW", "/auth/login", "POST"),
    ],
)
async def test_a_wrong_method_answers_405_and_says_which_is_right(
    api: Api, method: str, path: str, allowed: str
) -> None:
    answer = await api.request(method, path)
    assert_problem(answer, 405, "method_not_allowed")
    assert allowed in answer.headers["Allow"]


async def test_odd_headers_do_no_harm(api: Api, access_token: str) -> None:
    odd = [
        (b"User-Agent", b"\xff\xfe \xed\xa0\x80 \x01" + b"x" * 3000),
        (b"X-Request-ID", b"a b;\xff" * 100),
        (b"X-Forwarded-For", b"1.2.3.4, \xff, ::1%eth0, 999.999.999.999, '"),
        (b"Forwarded", b"for=\xff"),
        (b"Accept", b"\xff"),
        (b"Cookie", b"session=\xff; =; ;;;"),
        (b"Content-Type", b"application/json; charset=\xff"),
        (b"Accept-Encoding", b"\x7f"),
    ]
    for name, value in odd:
        value = value.replace(b"\x01", b"") if name == b"User-Agent" else value
        headers = [(b"Authorization", b"Bearer " + access_token.encode()), (name, value)]
        answer = await api.get("/auth/me", headers=headers)
        assert answer.status_code == 200, (name, answer.text)
        answer = await api.post("/auth/refresh_token", json={"refresh_token": "x"}, headers=[(name, value)])
        assert_problem(answer, {401, 422})
        account = await api.new_account()
        form = f"username={account.username}&password={quote_plus(account.password)}"
        login = [(name, value)] if name == b"Content-Type" else [(name, value), *_bytes(FORM)]
        answer = await api.post("/auth/login", content=form, headers=login)
        assert answer.status_code in (200, 422), (name, answer.text)


def _bytes(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def test_a_login_from_an_odd_user_agent_can_be_listed_and_refreshed(api: Api) -> None:
    account = await api.new_account()
    for agent in (b"\xff" * 40, "ü🦊".encode() * 300, b"", b"%s{0}\\"):
        headers = [(b"User-Agent", agent)]
        form = {"username": account.username, "password": account.password}
        pair = (await api.post("/auth/login", data=form, headers=headers)).json()
        fresh = await api.post("/auth/refresh_token", json={"refresh_token": pair["refresh_token"]}, headers=headers)
        assert fresh.status_code == 200
        assert (await api.get("/auth/sessions", headers=api.bearer(pair["access_token"]))).status_code == 200


async def exchange(service: ServiceProcess, sent: bytes, *, within_s: float = 10.0) -> bytes:
    """All that the service says to these bytes until it closes, or until a whole head has come."""
    received = b""
    with anyio.move_on_after(within_s) as waiting:
        async with await anyio.connect_tcp(*service.address) as stream:
            assert stream.extra(SocketAttribute.family) == socket.AF_INET
            try:
                await stream.send(sent)
                while b"\r\n\r\n" not in received:
                    received += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass
    assert not waiting.cancelled_caught, f"neither answered nor closed: {received!r}"
    return received


BROKEN_HTTP = {
    "nonsense": b"nonsense\r\n\r\n",
    "binary": bytes(range(256)) + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no version": b"GET /livez\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "length no number": b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: ten\r\n\r\n",
    "negative length": b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "bad chunk": b"POST /auth/login HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "unknown coding": b"POST /auth/login HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    "folded name": b"GET /livez HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n",
    "nul in header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "huge header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "endless header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1_000_000,
    "many headers": b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 40_000 + b"\r\n",
    "huge path": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("sent", BROKEN_HTTP.values(), ids=BROKEN_HTTP)
async def test_broken_http_is_answered_with_4xx_or_closed(service: ServiceProcess, sent: bytes) -> None:
    received = await exchange(service, sent)
    # 501 is what RFC 9112 wants for an unknown transfer coding.
    assert received == b"" or received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), received


async def test_an_upgrade_that_is_not_offered_breaks_nothing(service: ServiceProcess) -> None:
    websocket = (
        b"GET /auth/me HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    received = await exchange(service, websocket)
    assert received == b"" or received.startswith(b"HTTP/1.1 4"), received
    h2c = (
        b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: \r\n\r\n"
    )
    received = await exchange(service, h2c)
    assert received.startswith(b"HTTP/1.1 "), received
    assert not received.startswith(b"HTTP/1.1 5"), received


async def test_clients_that_hang_up_anywhere_in_a_request_leave_no_trace(service: ServiceProcess) -> None:
    request = (
        b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: 35\r\n\r\nusername=gone%40b.example&password=x"
    )

    async def hang_up(after: int) -> None:
        async with await anyio.connect_tcp(*service.address) as stream:
            await stream.send(request[:after])

    await asyncio.gather(*(hang_up(after) for after in range(1, len(request) + 1, 3)))


async def test_after_all_that_a_user_can_still_register_log_in_refresh_and_log_out(api: Api) -> None:
    pair = await api.new_session(await api.new_account())
    fresh = (await api.refresh(pair["refresh_token"])).json()
    assert (await api.logout(fresh["access_token"])).status_code == 200
