"""An id that Postgres gives a second time, as after a restore: the first user's tokens open nothing of the second's."""

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import jwt
import pytest
from anyio import to_thread
from support.api import Account, Api, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

#: So few failures lock an account for everybody but its own devices.
ATTEMPTS = 3


@dataclass
class Twice:
    """Ada had the id, Bob has it. `ada`, `bob`: what their logins answered."""

    api: Api
    ada_account: Account
    ada: dict[str, Any]
    bob_account: Account
    bob: dict[str, Any]


@pytest.fixture(params=["kept", "wiped"])
async def twice(services: Services, request: pytest.FixtureRequest) -> AsyncIterator[tuple[ServiceProcess, Twice]]:
    settings = {"AUTHD_MAX_LOGIN_ATTEMPTS": str(ATTEMPTS), "AUTHD_ACCOUNT_MAX_FAILURES": str(ATTEMPTS)}
    async with services.running(**settings) as process, process.api() as api:
        ada_account = await api.new_account()
        ada = await api.new_session(ada_account)
        assert (await api.me(ada["access_token"])).status_code == 200
        await process.query("DELETE FROM users")
        await process.query(f"ALTER SEQUENCE users_id_seq RESTART WITH {ada_account.user_id}")
        if request.param == "wiped":
            await process.wipe_redis()
        bob_account = await api.new_account()
        assert bob_account.user_id == ada_account.user_id
        bob = await api.new_session(bob_account)
        yield process, Twice(api, ada_account, ada, bob_account, bob)
        # Whatever was tried, it is Bob's account, with his one session.
        assert (await api.me(bob["access_token"])).json() == bob_account.registered
        listed = (await api.get("/auth/sessions", headers=api.bearer(bob["access_token"]))).json()["sessions"]
        assert [session["current"] for session in listed] == [True]
        assert (await api.refresh(bob["refresh_token"])).status_code == 200


async def until_heard(process: ServiceProcess, api: Api, twice: Twice) -> None:
    """Until the replica has heard of the deletion, for which it looks every second."""

    async def is_out() -> bool:
        return (await api.me(twice.ada["access_token"])).status_code == 401

    await eventually(is_out)


async def test_the_first_users_refresh_token_opens_nothing(twice: tuple[ServiceProcess, Twice]) -> None:
    process, users = twice
    await until_heard(process, users.api, users)
    for _ in range(2):
        assert_problem(await users.api.refresh(users.ada["refresh_token"]), 403, "user_disabled")


async def test_the_first_users_access_token_opens_nothing(twice: tuple[ServiceProcess, Twice]) -> None:
    process, users = twice
    await until_heard(process, users.api, users)
    token, api = users.ada["access_token"], users.api
    assert_problem(await api.me(token), 401, "token_invalid")
    assert_problem(await api.get("/auth/sessions", headers=api.bearer(token)), 401, "token_invalid")
    for scope in ("all", "others", "current"):
        answer = await api.post(f"/auth/logout?scope={scope}", headers=api.bearer(token))
        assert_problem(answer, 401, "token_invalid")
    assert_problem(await api.delete("/auth/sessions/x", headers=api.bearer(token)), 401, "token_invalid")


async def test_the_first_users_device_is_none_of_the_seconds(twice: tuple[ServiceProcess, Twice]) -> None:
    _, users = twice
    api, account = users.api, users.bob_account
    for _ in range(ATTEMPTS):
        assert_problem(await api.login(account.username, "wrong horse battery"), 401)
    assert_problem(await api.login(account.username, account.password), 429, "login_locked")
    of_ada = await api.login(account.username, account.password, device_token=users.ada["device_token"])
    assert_problem(of_ada, 429, "login_locked")
    of_bob = await api.login(account.username, account.password, device_token=users.bob["device_token"])
    assert of_bob.status_code == 200
    # It was one more session of his: ended, for what the fixture looks at.
    answer = await api.post("/auth/logout?scope=current", headers=api.bearer(of_bob.json()["access_token"]))
    assert answer.status_code == 200


async def test_whoever_verifies_offline_can_tell_them_apart(twice: tuple[ServiceProcess, Twice]) -> None:
    process, users = twice
    client = jwt.PyJWKClient(f"{process.url}/.well-known/jwks.json")
    claims = []
    for token in (users.ada["access_token"], users.bob["access_token"]):
        key = await to_thread.run_sync(client.get_signing_key_from_jwt, token)
        claims.append(jwt.decode(token, key, algorithms=["ES256"]))
    assert claims[0]["sub"] == claims[1]["sub"]
    assert claims[0]["inc"] != claims[1]["inc"]
    rows = await process.query("SELECT incarnation FROM users")
    assert [row["incarnation"] for row in rows] == [claims[1]["inc"]]


async def test_a_token_from_before_incarnations_answers_401_and_its_refresh_goes_on(services: Services) -> None:
    """Old clients refresh on 401."""
    secret = "the secret that every older service of this team holds"
    async with (
        services.running(AUTHD_JWT_ALGORITHM="HS256", AUTHD_JWT_SECRET=secret) as process,
        process.api() as api,
    ):
        pair = await api.new_session(await api.new_account())
        _, payload, _ = pair["access_token"].split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        headers = jwt.get_unverified_header(pair["access_token"])
        old = jwt.encode({k: v for k, v in claims.items() if k != "inc"}, secret, algorithm="HS256", headers=headers)
        same = jwt.encode(claims, secret, algorithm="HS256", headers=headers)
        assert (await api.me(same)).status_code == 200
        assert_problem(await api.me(old), 401, "token_invalid")
        fresh = (await api.refresh(pair["refresh_token"])).json()
        assert (await api.me(fresh["access_token"])).status_code == 200
