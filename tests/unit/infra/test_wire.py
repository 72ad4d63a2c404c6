"""What comes over the wire, through the real application and without a socket."""

import json

import anyio
import anyio.lowlevel
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quart import Request, Response, abort
from quart.typing import TestClientProtocol as Client
from werkzeug.sansio import request as sansio_request

from authd.accounts.http import RegisterRequest
from authd.errors import Unavailable
from authd.infra.http.app import App, AppSettings
from authd.infra.http.endpoint import PUBLIC, Endpoints
from authd.infra.http.reading import CONTENT_TYPE_CHARS_MAX, FORM_BYTES_MAX, FORM_FIELDS_MAX, read_form, read_json
from authd.infra.http.replies import json_response
from authd.sessions.http import RefreshRequest, read_logout_scope

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
BODY_BYTES_MAX = 4096


def make_app(make_settings, body_bytes_max: int = BODY_BYTES_MAX) -> App:
    """Endpoints that say what they read."""
    endpoint = Endpoints()

    @endpoint("POST", "/json", "A test", auth=PUBLIC, reply=None)
    async def read_a_json(request: Request) -> Response:
        return json_response(await read_json(request, RegisterRequest))

    @endpoint("POST", "/form", "A test", auth=PUBLIC, reply=None)
    async def read_a_form(request: Request) -> Response:
        return json_response(await read_form(request, "username", "password"))

    @endpoint("POST", "/scope", "A test", auth=PUBLIC, reply=None)
    async def read_a_scope(request: Request) -> Response:
        return json_response(await read_logout_scope(request))

    @endpoint("GET", "/slow", "A test", auth=PUBLIC, reply=None)
    async def be_slow(request: Request) -> Response:
        await anyio.sleep(60)
        return json_response({})

    @endpoint("GET", "/away", "A test", auth=PUBLIC, reply=None)
    async def be_away(request: Request) -> Response:
        raise Unavailable("user_store") from OSError("secret host name")

    @endpoint("GET", "/broken", "A test", auth=PUBLIC, reply=None)
    async def break_down(request: Request) -> Response:
        raise RuntimeError("secret detail")

    @endpoint("GET", "/teapot", "A test", auth=PUBLIC, reply=None)
    async def be_a_teapot(request: Request) -> Response:
        abort(418)

    settings = make_settings(body_max_bytes=body_bytes_max, request_timeout_s=0.2, hash_deadline_s=0.1)
    return App(settings.section(AppSettings), endpoint.declared)


@pytest.fixture(scope="module")
def app(make_settings) -> App:
    return make_app(make_settings)


@pytest.fixture
def client(app: App) -> Client:
    return app.test_client()


async def problem_of(response: Response) -> dict:
    assert response.content_type == "application/problem+json"
    problem: dict = json.loads(await response.get_data())
    assert problem["status"] == response.status_code
    assert problem["detail"].endswith(".")
    return problem


# JSON


async def test_json_is_read_and_unknown_fields_are_ignored(client: Client) -> None:
    body = '{"username": "a", "password": "b", "full_name": "ç\\u00e7🙂", "age": 3, "more": [{}]}'
    for headers in (
        JSON,
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": "application/x+json"},
        {},
    ):
        response = await client.post("/json", data=body.encode(), headers=headers)
        assert response.status_code == 200, headers
        assert json.loads(await response.get_data()) == {"username": "a", "password": "b", "full_name": "çç🙂"}


@pytest.mark.parametrize(
    "body", ['{"username": "a", "password": "b"}', '{"full_name": null, "username": "a", "password": "b"}']
)
async def test_an_optional_field_may_be_missing_or_null(client: Client, body: str) -> None:
    response = await client.post("/json", data=body, headers=JSON)
    assert json.loads(await response.get_data())["full_name"] is None


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ("{}", {"username", "password"}),
        ('{"username": "a"}', {"password"}),
        ('{"username": 1, "password": null}', {"username", "password"}),
        ('{"username": ["a"], "password": "b", "full_name": {}}', {"username", "full_name"}),
        ('{"Username": "a", "password": true}', {"username", "password"}),
        # The last one of a repeated name counts, and is looked at.
        ('{"username": "a", "password": "b", "username": 1}', {"username"}),
    ],
)
async def test_every_missing_or_wrong_field_is_named(client: Client, body: str, fields: set[str]) -> None:
    response = await client.post("/json", data=body, headers=JSON)
    problem = await problem_of(response)
    assert (response.status_code, problem["code"]) == (422, "invalid_request")
    assert {error["field"] for error in problem["errors"]} == fields
    assert all(error["detail"].endswith(".") for error in problem["errors"])


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"x", b"{", b'{"username": "a", }', b"null", b"[]", b"1", b'"x"', b"\xff\xfe",
        b'{"username": "\xff"}',
        b'{"username": "\\ud800", "password": "b"}', b"[" * 4000, b'{"a":' * 700,
        # msgspec complains of the wrong type before it reaches what is no JSON at all.
        b'{"username": 1, "password": ', b'{"username": ' + b"[" * 4000, b'{"username": 1, "password": NaN}',
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
async def test_what_is_no_json_object_is_malformed(client: Client, body: bytes) -> None:
    response = await client.post("/json", data=body, headers=JSON)
    assert (response.status_code, (await problem_of(response))["code"]) == (422, "malformed_request")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "multipart/form-data"]
)
async def test_another_type_than_json_is_refused(client: Client, kind: str) -> None:
    response = await client.post("/json", data=b"{}", headers={"Content-Type": kind})
    assert (response.status_code, (await problem_of(response))["code"]) == (422, "unsupported_media_type")


# Forms


async def test_a_password_grant_is_read_with_everything_that_comes_along(client: Client) -> None:
    body = "grant_type=password&username=ada%40example.com&password=a+b%2Bc%25%C3%A7&scope=&client_id=x&client_secret=y"
    response = await client.post("/form", data=body, headers=FORM)
    fields = json.loads(await response.get_data())
    assert (fields["username"], fields["password"]) == ("ada@example.com", "a b+c%ç")


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ("", {"username": "required", "password": "required"}),
        ("username=a", {"password": "required"}),
        ("username=a&password=", {"password": "required"}),
        ("username=a&password=b&password=c", {"password": "more than once"}),
        ("username=a&username=a&scope=1&scope=2", {"username": "more than once", "password": "required"}),
    ],
)
async def test_a_missing_or_repeated_field_is_named(client: Client, body: str, errors: dict[str, str]) -> None:
    response = await client.post("/form", data=body, headers=FORM)
    problem = await problem_of(response)
    assert (response.status_code, problem["code"]) == (422, "invalid_request")
    found = {error["field"]: error["detail"] for error in problem["errors"]}
    assert found.keys() == errors.keys()
    assert all(errors[field] in found[field] for field in errors)


@pytest.mark.parametrize(
    "body",
    [b"username=%FF&password=b", b"username=\xff", b"username=%ED%A0%80&password=b", b"a=1&" * (FORM_FIELDS_MAX + 1)],
)
async def test_what_is_no_form_is_malformed(client: Client, body: bytes) -> None:
    response = await client.post("/form", data=body, headers=FORM)
    assert (response.status_code, (await problem_of(response))["code"]) == (422, "malformed_request")


@pytest.mark.parametrize("headers", [{}, JSON, {"Content-Type": "multipart/form-data; boundary=x"}])
async def test_another_type_than_a_form_is_refused(client: Client, headers: dict[str, str]) -> None:
    response = await client.post("/form", data=b"username=a&password=b", headers=headers)
    assert (response.status_code, (await problem_of(response))["code"]) == (422, "unsupported_media_type")


@given(st.binary(max_size=200), st.sampled_from([JSON, FORM, {}]), st.sampled_from(["/json", "/form"]))
@settings(max_examples=60, deadline=None)
def test_no_body_breaks_the_edge(app: App, body: bytes, headers: dict[str, str], path: str) -> None:
    async def post() -> int:
        response = await app.test_client().post(path, data=body, headers=headers)
        return response.status_code

    assert anyio.run(post) in (200, 422)


def test_no_secret_shows_in_what_was_read() -> None:
    read = [RegisterRequest("ada@example.com", "a password"), RefreshRequest("v1.token")]
    assert not [word for word in ("a password", "v1.token") if word in repr(read)]


# The frame around every answer


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/json", 405, "method_not_allowed"),
        ("GET", "/away", 503, "user_store_unavailable"),
        ("GET", "/broken", 500, "internal_error"),
        ("GET", "/slow", 503, "deadline_exceeded"),
        ("GET", "/teapot", 422, "malformed_request"),
    ],
)
async def test_every_refusal_has_the_one_form(client: Client, method: str, path: str, status: int, code: str) -> None:
    response = await client.open(path, method=method)
    problem = await problem_of(response)
    assert (response.status_code, problem["code"]) == (status, code)
    assert "secret" not in str(problem)
    assert ("Retry-After" in response.headers) == (status == 503)


async def test_a_wrong_method_is_told_the_right_one(client: Client) -> None:
    assert "POST" in (await client.get("/json")).headers["Allow"]


async def test_a_body_above_the_bound_is_refused(client: Client) -> None:
    at_bound = msgspec.json.encode({"username": "a", "password": "b", "full_name": "x"})
    at_bound += b" " * (BODY_BYTES_MAX - len(at_bound))
    assert (await client.post("/json", data=at_bound, headers=JSON)).status_code == 200
    response = await client.post("/json", data=at_bound + b" ", headers=JSON)
    assert (response.status_code, (await problem_of(response))["code"]) == (413, "body_too_large")


async def test_a_request_keeps_its_id_or_gets_one(client: Client) -> None:
    response = await client.get("/nothing", headers={"X-Request-ID": "a-1.b_C"})
    assert response.headers["X-Request-ID"] == "a-1.b_C"
    for unusable in ("", "a b", "x" * 65, '"', "é"):
        response = await client.get("/nothing", headers={"X-Request-ID": unusable})
        assert len(response.headers["X-Request-ID"]) == 16


async def test_requests_that_are_ended_answer_at_once_as_the_drain_needs(app: App) -> None:
    statuses: list[int] = []

    async def get() -> None:
        statuses.append((await app.test_client().get("/slow")).status_code)

    async with anyio.create_task_group() as group:
        group.start_soon(get)
        with anyio.fail_after(30):
            while not app.inflight:
                await anyio.lowlevel.checkpoint()
        app.end_requests()
    assert statuses == [503]
    assert not app.inflight


# What a stranger's form or header may cost


@pytest.fixture
def client_of_large_bodies(make_settings) -> Client:
    return make_app(make_settings, 2 * FORM_BYTES_MAX).test_client()


async def test_a_form_is_bounded_whatever_a_body_may_have_and_before_it_is_parsed(
    client_of_large_bodies: Client,
) -> None:
    client = client_of_large_bodies
    start = b"username=a&password="
    at_bound = start + b"x" * (FORM_BYTES_MAX - len(start))
    assert (await client.post("/form", data=at_bound, headers=FORM)).status_code == 200
    for path in ("/form", "/scope"):
        for body in (at_bound + b"x", b"\xff" * (FORM_BYTES_MAX + 1)):
            response = await client.post(path, data=body, headers=FORM)
            assert (response.status_code, (await problem_of(response))["code"]) == (413, "body_too_large")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types that werkzeug took apart."""
    seen: list[str] = []
    parse = sansio_request.parse_options_header

    def listen(value: str) -> tuple[str, dict[str, str]]:
        seen.append(value)
        return parse(value)

    monkeypatch.setattr(sansio_request, "parse_options_header", listen)
    return seen


@pytest.mark.parametrize("path", ["/json", "/form", "/scope"])
@pytest.mark.parametrize("parameter", [";a*=utf-8''%41", ";", '; a="\\\\"'])
async def test_a_type_that_is_too_long_is_refused_before_it_is_parsed(
    client: Client, parsed: list[str], path: str, parameter: str
) -> None:
    kind = FORM["Content-Type"] if path == "/form" else JSON["Content-Type"]
    long = kind + parameter * (CONTENT_TYPE_CHARS_MAX // len(parameter))
    response = await client.post(path, data=b"{}", headers={"Content-Type": long})
    assert (await problem_of(response))["code"] == "unsupported_media_type"
    assert parsed == []
    short = long[:CONTENT_TYPE_CHARS_MAX].rpartition(";")[0]
    await client.post(path, data=b"{}", headers={"Content-Type": short})
    assert parsed == [short]


async def test_a_query_of_many_fields_is_refused_and_one_of_few_is_read(client: Client) -> None:
    response = await client.post("/scope?" + "a&" * 4000)
    assert (await problem_of(response))["code"] == "malformed_request"
    response = await client.post("/scope?" + "a=b&" * (FORM_FIELDS_MAX - 1) + "scope=current")
    assert json.loads(await response.get_data()) == "current"
    for query in ("scope", "scope=", "scope=none", "scope=%ff"):
        assert (await problem_of(await client.post("/scope?" + query)))["code"] == "invalid_request"
