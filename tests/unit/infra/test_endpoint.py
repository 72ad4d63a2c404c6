"""A declaration serves an endpoint, says who may call it, and what its answer may say of itself."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from quart import Request, Response

from authd.config import Settings
from authd.errors import LoginLocked, RefreshRefused, UserDisabled
from authd.infra.http.app import App, AppSettings, IgnoredHook
from authd.infra.http.endpoint import BEARER, NO_STORE, PUBLIC, Endpoints
from authd.infra.http.replies import json_response

POLICY = "default-src 'self'"


@pytest.fixture(scope="module")
def app(make_settings: Callable[..., Settings]) -> App:
    endpoint = Endpoints()

    @endpoint("GET", "/mine/<part>", "A test", auth=BEARER, reply=None)
    async def mine(request: Request, token: str, part: str) -> Response:
        return json_response([token, part])

    @endpoint("GET", "/page", "A test", auth=PUBLIC, reply=None, csp=POLICY, cache="public, max-age=7")
    async def page(request: Request) -> Response:
        if request.args:
            raise UserDisabled
        return json_response({})

    @endpoint("GET", "/cookies", "A test", auth=PUBLIC, reply=None, cookies=["seen"])
    async def cookies(request: Request) -> Response:
        return json_response(dict(request.cookies))

    @endpoint("GET", "/no-cookies", "A test", auth=PUBLIC, reply=None)
    async def no_cookies(request: Request) -> Response:
        return json_response(dict(request.cookies))

    return App(make_settings().section(AppSettings), endpoint.declared)


def test_a_declaration_that_says_nothing_of_who_may_call_stops_the_start() -> None:
    endpoint = cast(Any, Endpoints())
    with pytest.raises(TypeError, match="auth"):
        endpoint("GET", "/open", "A test", reply=None)
    assert endpoint.declared == []


@pytest.mark.parametrize("auth", [None, "bearer"])
def test_a_declaration_that_names_nobody_stops_the_start(auth: Any) -> None:
    endpoint = Endpoints()
    with pytest.raises(AttributeError):
        endpoint("GET", "/open", "A test", auth=auth, reply=None)
    assert endpoint.declared == []


def test_an_endpoint_that_is_declared_twice_stops_the_start(make_settings: Callable[..., Settings]) -> None:
    first, second = Endpoints(), Endpoints()
    for endpoint in (first, second):

        @endpoint("GET", "/found", "A test", auth=PUBLIC, reply=None)
        async def found(request: Request) -> Response:
            return json_response({})

    with pytest.raises(AssertionError):
        App(make_settings().section(AppSettings), [*first.declared, *second.declared])


def test_a_route_that_is_no_declared_endpoint_stops_the_start(make_settings: Callable[..., Settings]) -> None:
    app = App(make_settings().section(AppSettings), [])
    app.refuse_hooks()

    @app.get("/hidden")
    async def hidden() -> Response:
        return json_response({})

    with pytest.raises(IgnoredHook, match="/hidden"):
        app.refuse_hooks()


def test_a_code_that_is_none_stops_the_start() -> None:
    with pytest.raises(KeyError):
        Endpoints()("GET", "/found", "A test", auth=PUBLIC, reply=None, refusals=["no_such_code"])


def test_a_class_of_refusals_stands_for_all_its_codes() -> None:
    endpoint = Endpoints()

    @endpoint("GET", "/found", "A test", auth=PUBLIC, reply=None, refusals=[LoginLocked, RefreshRefused, "not_found"])
    async def found(request: Request) -> Response:
        return json_response({})

    codes = endpoint.declared[0].codes
    assert codes[0] == "login_locked"
    assert {"refresh_token_reused", "session_evicted"} < set(codes)
    assert codes[-1] == "not_found"


async def test_whoever_brings_no_token_never_reaches_the_handler(app: App) -> None:
    refused = await app.test_client().get("/mine/x")
    assert (refused.status_code, (await refused.get_json(force=True))["code"]) == (401, "token_missing")
    answered = await app.test_client().get("/mine/x", headers={"Authorization": "Bearer a.b.c"})
    assert await answered.get_json() == ["a.b.c", "x"]


async def test_an_endpoint_says_how_its_answer_is_kept_and_what_it_may_run_and_its_refusal_does_not(app: App) -> None:
    found = await app.test_client().get("/page")
    assert (found.headers["Cache-Control"], found.headers["Content-Security-Policy"]) == ("public, max-age=7", POLICY)
    refused = await app.test_client().get("/page?refused=1")
    assert refused.headers["Cache-Control"] == NO_STORE
    assert "Content-Security-Policy" not in refused.headers


async def test_a_handler_sees_the_cookies_of_its_declaration_alone(app: App) -> None:
    headers = {"Cookie": "seen=1; hidden=2"}
    assert await (await app.test_client().get("/cookies", headers=headers)).get_json() == {"seen": "1"}
    assert await (await app.test_client().get("/no-cookies", headers=headers)).get_json() == {}
