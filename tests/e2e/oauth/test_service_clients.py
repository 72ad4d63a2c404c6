"""Services that ask about tokens: their registration, introspection, revocation, and the documents that lead there."""

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import jwt
import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from support.api import Account, Api, Credentials, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

from authd.embedded import PostgresServer, RedisServer
from authd.oauth.clients import FRESH_S

ISSUER = "https://id.example.com"
INACTIVE = {"active": False}
REFRESH_TTL_S = 30 * 86_400


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    async with services.running(AUTHD_ISSUER=ISSUER) as process:
        yield process


@pytest.fixture(scope="module")
async def client(service: ServiceProcess) -> Credentials:
    return await service.new_client()


@pytest.fixture
async def account(api: Api) -> Account:
    return await api.new_account()


@pytest.fixture
async def pair(api: Api, account: Account) -> dict[str, Any]:
    return await api.new_session(account)


def basic(text: str | bytes) -> dict[str, str]:
    raw = text.encode() if isinstance(text, str) else text
    return {"Authorization": f"Basic {base64.b64encode(raw).decode()}"}


def percent_encoded(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def claims_of(pair: dict[str, Any]) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(pair["access_token"], options={"verify_signature": False})
    return claims


def tampered(token: str) -> str:
    """Another character in the middle of the last part: the last one of all may hold bits that count for nothing."""
    place = len(token) - 20
    return token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]


async def assert_inactive(api: Api, client: Credentials, *tokens: str) -> None:
    for token in tokens:
        answer = await api.introspect(client, token)
        assert (answer.status_code, answer.json()) == (200, INACTIVE)


def assert_not_let_in(answer: httpx.Response) -> None:
    problem = assert_problem(answer, 401, "invalid_client")
    assert problem["error"] == "invalid_client"
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert answer.headers["Cache-Control"] == "no-store"


# Registration


async def test_a_client_is_added_listed_and_removed(service: ServiceProcess, api: Api, pair: dict[str, Any]) -> None:
    client_id, secret = credentials = await service.new_client("the shop's back end")
    assert len(secret) >= 32
    listed = await service.run("clients", "list")
    [line] = [line for line in listed.stdout.splitlines() if line.startswith(client_id)]
    assert line.endswith("the shop's back end")
    assert secret not in listed.stdout
    assert (await api.introspect(credentials, pair["access_token"])).json()["active"] is True

    removed = await service.run("clients", "remove", client_id)
    assert (removed.returncode, removed.stderr) == (0, "")
    assert client_id not in (await service.run("clients", "list")).stdout

    async def is_forgotten() -> bool:
        return (await api.introspect(credentials, pair["access_token"])).status_code == 401

    await eventually(is_forgotten, FRESH_S + 5)
    assert_not_let_in(await api.introspect(credentials, pair["access_token"]))
    again = await service.run("clients", "remove", client_id)
    assert (again.returncode, again.stdout, again.stderr) == (1, "", "authd: No such client.\n")


async def test_clients_may_share_a_name_and_no_secret(service: ServiceProcess, api: Api, pair: dict[str, Any]) -> None:
    (first, secret), (second, other) = [await service.new_client("twin") for _ in range(2)]
    assert first != second and secret != other
    assert_not_let_in(await api.introspect((first, other), pair["access_token"]))


async def test_a_secret_is_stored_nowhere_as_it_is(service: ServiceProcess, api: Api) -> None:
    client_id, secret = await service.new_client()
    await api.introspect((client_id, secret), "anything")
    [row] = await service.query("SELECT * FROM clients WHERE client_id = $1", client_id)
    for value in row.values():
        stored = value if isinstance(value, bytes) else str(value).encode()
        assert secret.encode() not in stored
    # That it is in no log either is looked at when the process has ended, for every secret of these tests.
    assert secret in service.secrets.found_in(f"a line with {secret}")


# Authentication


@pytest.mark.parametrize("path", ["/auth/introspect", "/auth/revoke"])
async def test_a_client_shows_its_secret_in_the_header_or_in_the_form(api: Api, client: Credentials, path: str) -> None:
    client_id, secret = client
    ways: list[tuple[dict[str, str], dict[str, str]]] = [
        (basic(f"{client_id}:{secret}"), {}),
        (basic(f"{percent_encoded(client_id)}:{percent_encoded(secret)}"), {}),
        ({}, {"client_id": client_id, "client_secret": secret}),
    ]
    for headers, form in ways:
        answer = await api.post(path, data={"token": "junk", **form}, headers=headers)
        assert answer.status_code == 200, answer.text
    # `client_id` alone is no second way to authenticate: some libraries send it always.
    answer = await api.post(path, data={"token": "junk", "client_id": client_id}, headers=ways[0][0])
    assert answer.status_code == 200
    # The scheme's name may be written in any case.
    headers = {"Authorization": basic(f"{client_id}:{secret}")["Authorization"].replace("Basic", "bAsIc")}
    assert (await api.post(path, data={"token": "junk"}, headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/auth/introspect", "/auth/revoke"])
async def test_a_client_that_shows_itself_in_two_ways_at_once_is_refused(
    api: Api, client: Credentials, path: str
) -> None:
    client_id, secret = client
    both = {"client_id": client_id, "client_secret": secret}
    for headers in (basic(f"{client_id}:{secret}"), basic(f"{client_id}:"), basic(client_id), basic(":")):
        problem = assert_problem(
            await api.post(path, data={"token": "junk", **both}, headers=headers), 422, "invalid_request"
        )
        assert problem["error"] == "invalid_request"
        assert [error["field"] for error in problem["errors"]] == ["client_secret"]
    # Nor is a broken header overlooked where the form has a client.
    form = {"token": "junk", "client_id": client_id}
    assert_not_let_in(await api.post(path, data=form, headers={"Authorization": "Basic !!!"}))


@pytest.mark.parametrize("path", ["/auth/introspect", "/auth/revoke"])
async def test_who_is_no_client_learns_nothing_and_ends_nothing(
    api: Api, client: Credentials, pair: dict[str, Any], path: str
) -> None:
    client_id, secret = client
    ways: list[tuple[dict[str, str], dict[str, str]]] = [
        ({}, {}),
        ({}, {"client_id": client_id}),
        ({}, {"client_secret": secret}),
        ({}, {"client_id": client_id, "client_secret": secret + "x"}),
        ({}, {"client_id": client_id, "client_secret": "é\x00\U0001f98a"}),
        ({}, {"client_id": "\x00", "client_secret": secret}),
        ({}, {"client_id": "x" * 5000, "client_secret": secret}),
        (basic(f"{client_id}:wrong"), {}),
        (basic(f"{client_id}:{secret.swapcase()}"), {}),
        (basic(f"unknown:{secret}"), {}),
        (basic(f"{client_id}:"), {}),
        (basic(f":{secret}"), {}),
        (basic(client_id), {}),
        (basic(f"{client_id}:" + "%41" * 3000), {}),
        (basic(b"\xff:\xfe"), {}),
        ({"Authorization": "Basic"}, {}),
        ({"Authorization": "Basic !!!"}, {}),
        ({"Authorization": "Basic YQ"}, {}),
        ({"Authorization": f"Bearer {secret}"}, {}),
        (api.bearer(pair["access_token"]), {}),
    ]
    for headers, form in ways:
        assert_not_let_in(await api.post(path, data={"token": pair["refresh_token"], **form}, headers=headers))
        assert_not_let_in(await api.post(path, data=form or {"a": "b"}, headers=headers))
    assert (await api.me(pair["access_token"])).status_code == 200


@pytest.mark.parametrize("path", ["/auth/introspect", "/auth/revoke"])
async def test_a_request_without_one_token_is_invalid(api: Api, client: Credentials, path: str) -> None:
    for content in ("", "token=", "token_type_hint=access_token", "token=a&token=b"):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        problem = assert_problem(await api.post(path, content=content, headers=headers, auth=client), 422)
        assert problem["error"] == "invalid_request"
        assert [error["field"] for error in problem["errors"]] == ["token"]


# Introspection


async def test_an_active_access_token_is_told_by_its_claims(
    api: Api, client: Credentials, account: Account, pair: dict[str, Any]
) -> None:
    claims = claims_of(pair)
    for hint in (
        {},
        {"token_type_hint": "access_token"},
        {"token_type_hint": "refresh_token"},
        {"token_type_hint": "?"},
    ):
        answer = await api.introspect(client, pair["access_token"], **hint)
        assert answer.status_code == 200
        assert (answer.headers["Content-Type"], answer.headers["Cache-Control"]) == ("application/json", "no-store")
        assert answer.json() == {"active": True, "token_type": "Bearer", **claims}
    assert claims.keys() == {"iss", "sub", "inc", "sid", "epoch", "jti", "iat", "exp"}
    assert (claims["iss"], claims["sub"]) == (ISSUER, str(account.user_id))


async def test_an_active_refresh_token_is_told_too(
    api: Api, client: Credentials, account: Account, pair: dict[str, Any]
) -> None:
    for hint in ({}, {"token_type_hint": "access_token"}, {"token_type_hint": "refresh_token"}):
        body = (await api.introspect(client, pair["refresh_token"], **hint)).json()
        assert body.keys() == {"active", "token_type", "sub", "inc", "sid", "iat", "exp"}
        assert (body["active"], body["token_type"]) == (True, "refresh_token")
        assert (body["sub"], body["sid"]) == (str(account.user_id), claims_of(pair)["sid"])
        assert body["exp"] - body["iat"] == REFRESH_TTL_S
        assert abs(body["iat"] - time.time()) < 60
    # Asking uses nothing up.
    assert (await api.refresh(pair["refresh_token"])).status_code == 200


async def test_what_is_no_token_of_ours_is_inactive(api: Api, client: Credentials, pair: dict[str, Any]) -> None:
    access, refresh = pair["access_token"], pair["refresh_token"]
    junk = ["x", "v1.", "v2.x", "a.b.c", "..", "null", "é", "\0", "🦊" * 50, "x" * 10_000, refresh[3:], f" {access}"]
    await assert_inactive(api, client, *junk, tampered(access), tampered(refresh), access[:-1], f"{refresh}A")


async def test_a_replaced_refresh_token_is_inactive_and_its_session_is_not(
    api: Api, client: Credentials, pair: dict[str, Any]
) -> None:
    new = (await api.refresh(pair["refresh_token"])).json()
    await assert_inactive(api, client, pair["refresh_token"])
    for token in (pair["access_token"], new["access_token"], new["refresh_token"]):
        assert (await api.introspect(client, token)).json()["active"] is True


async def test_expired_tokens_are_inactive_and_an_audience_is_told(services: Services) -> None:
    settings = {
        "AUTHD_ACCESS_TTL_S": "1",
        "AUTHD_REFRESH_TTL_S": "3",
        "AUTHD_AUDIENCE": "shop",
        "AUTHD_ISSUER": "authd",
    }
    async with services.running(**settings) as process, process.api() as api:
        client, pair = await process.new_client(), await api.new_session(await api.new_account())
        exp = claims_of(pair)["exp"]
        await anyio.sleep(max(0, exp - time.time()))
        await assert_inactive(api, client, pair["access_token"])
        pair = (await api.refresh(pair["refresh_token"])).json()
        answer = (await api.introspect(client, pair["access_token"])).json()
        if answer["active"]:  # else the machine was busy for longer than it lives
            assert answer == {"active": True, "token_type": "Bearer", **claims_of(pair)}
            assert answer["aud"] == "shop"

        async def is_over() -> bool:
            return not (await api.introspect(client, pair["refresh_token"])).json()["active"]

        await eventually(is_over)
        await assert_inactive(api, client, pair["access_token"], pair["refresh_token"])
        # And an issuer that is no URL has no metadata.
        assert_problem(await api.get("/.well-known/oauth-authorization-server"), 404, "not_found")


# Revocation


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
@pytest.mark.parametrize("hint", ["", "access_token", "refresh_token", "unknown"])
async def test_either_token_revokes_its_session_and_no_other(
    api: Api, client: Credentials, account: Account, kind: str, hint: str
) -> None:
    pair, other = await api.new_session(account), await api.new_session(account)
    for _ in range(2):  # a second time nothing happens
        answer = await api.revoke(client, pair[kind], **({"token_type_hint": hint} if hint else {}))
        assert answer.status_code == 200
    await assert_inactive(api, client, pair["access_token"], pair["refresh_token"])
    assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
    assert_problem(await api.refresh(pair["refresh_token"]), 401, "session_ended")
    assert (await api.me(other["access_token"])).status_code == 200


async def test_a_replaced_refresh_token_revokes_its_session_too(
    api: Api, client: Credentials, pair: dict[str, Any]
) -> None:
    new = (await api.refresh(pair["refresh_token"])).json()
    assert (await api.revoke(client, pair["refresh_token"])).status_code == 200
    await assert_inactive(api, client, new["access_token"], new["refresh_token"])


async def test_revoking_what_is_no_token_is_no_error(api: Api, client: Credentials, pair: dict[str, Any]) -> None:
    for token in ("x", "v2.x", "a.b.c", "\0", tampered(pair["access_token"]), tampered(pair["refresh_token"])):
        assert (await api.revoke(client, token)).status_code == 200
    assert (await api.me(pair["access_token"])).status_code == 200


# When a store is away


@pytest.mark.proof
async def test_without_postgres_a_known_client_is_answered_and_a_new_one_is_not(
    service: ServiceProcess, api: Api, client: Credentials, pair: dict[str, Any], postgres_server: PostgresServer
) -> None:
    stranger = await service.new_client()
    assert (await api.introspect(client, pair["access_token"])).json()["active"] is True
    await postgres_server.pause()
    try:
        for wait_s in (0, FRESH_S + 0.5):  # while the registration is fresh, and when it is stale
            await anyio.sleep(wait_s)
            assert (await api.introspect(client, pair["access_token"])).json()["active"] is True
            assert_not_let_in(await api.introspect((client[0], "wrong"), pair["access_token"]))
            refused = await api.introspect(stranger, pair["access_token"])
            assert_problem(refused, 503, "user_store_unavailable")
            assert "Retry-After" in refused.headers
            # An ending must be written down: without Postgres it is not promised.
            assert_problem(await api.revoke(client, pair["refresh_token"]), 503, "user_store_unavailable")
    finally:
        await postgres_server.resume()

    async def is_answered() -> bool:
        return (await api.introspect(stranger, pair["access_token"])).status_code == 200

    await eventually(is_answered)
    assert (await api.introspect(stranger, pair["access_token"])).json()["active"] is True


async def test_without_redis_nothing_is_said_of_a_token(
    api: Api, client: Credentials, pair: dict[str, Any], redis_server: RedisServer
) -> None:
    assert (await api.introspect(client, pair["access_token"])).json()["active"] is True
    await redis_server.pause()
    try:
        for answer in (
            await api.introspect(client, pair["access_token"]),
            await api.introspect(client, pair["refresh_token"]),
        ):
            assert_problem(answer, 503, "session_store_unavailable")
            assert "Retry-After" in answer.headers
        # What is no token at all needs no store.
        await assert_inactive(api, client, "junk", tampered(pair["access_token"]))
    finally:
        await redis_server.resume()

    async def is_answered() -> bool:
        return (await api.introspect(client, pair["access_token"])).status_code == 200

    await eventually(is_answered)
    assert (await api.introspect(client, pair["access_token"])).json()["active"] is True


# The documents


async def test_the_metadata_is_valid_and_leads_to_the_endpoints(
    api: Api, client: Credentials, pair: dict[str, Any]
) -> None:
    answer = await api.get("/.well-known/oauth-authorization-server")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert "max-age=" in answer.headers["Cache-Control"]
    metadata = AuthorizationServerMetadata(answer.json())
    metadata.validate()
    assert metadata.issuer == ISSUER == claims_of(pair)["iss"]
    assert [] not in metadata.values()  # RFC 8414, 3.2: what has no elements is left out

    def path(name: str) -> str:
        url = str(metadata[name])
        assert url.startswith(f"{ISSUER}/")
        return url.removeprefix(ISSUER)

    form = {"grant_type": "password", "username": "x", "password": "x"}
    assert_problem(await api.post(path("token_endpoint"), data=form), 401, "invalid_credentials")
    assert (await api.get(path("jwks_uri"))).json()["keys"]
    token = {"token": pair["access_token"]}
    for name, outcome in (("introspection_endpoint", True), ("revocation_endpoint", None)):
        assert set(metadata[f"{name}_auth_methods_supported"]) == {"client_secret_basic", "client_secret_post"}
        answer = await api.post(path(name), data=token, auth=client)
        assert (answer.status_code, answer.json().get("active")) == (200, outcome)
    await assert_inactive(api, client, pair["access_token"])


async def test_the_published_keys_may_be_kept_for_a_while(api: Api) -> None:
    answer = await api.get("/.well-known/jwks.json")
    assert answer.headers["Content-Type"] == "application/json"
    directives = [part.strip() for part in answer.headers["Cache-Control"].split(",")]
    assert "public" in directives
    [max_age] = [int(part.removeprefix("max-age=")) for part in directives if part.startswith("max-age=")]
    # A key is published for 900 s before it signs, and read by every replica within 30 s.
    assert 60 <= max_age <= 900 - 30
