"""Redis away, refusing, full or wiped: the column of the failure matrix, for every request, with the real server."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import anyio
import httpx
import pytest
from support.api import Api, assert_problem
from support.faults import (
    SLOW_MAX,
    TIMEOUTS,
    FaultStores,
    assert_alive,
    assert_dead,
    away,
    flush,
    full,
    read_only,
    refusing,
    retried,
    until_ready,
    until_unready,
)
from support.process import ServiceProcess
from support.request_matrix import (
    SESSION_STORE,
    USER_STORE,
    WORKS,
    Expected,
    ServiceClient,
    new_request_matrix,
    new_service_client,
)

pytestmark = pytest.mark.timeout(120)

#: Registration alone does without sessions. Revocation fails closed: nobody is let in unseen.
AWAY: Expected = dict.fromkeys(WORKS, SESSION_STORE) | {"register": (201, "")}
#: What only reads, and what ends sessions, goes on.
FULL: Expected = WORKS | dict.fromkeys(("login", "login, wrong password", "refresh"), SESSION_STORE)
WIPED: Expected = WORKS | {
    "me, cached": (401, "token_invalid"),
    "me, not cached": (401, "token_invalid"),
    "sessions": (401, "token_invalid"),
    "introspect an access token": (200, "inactive"),
    "introspect a refresh token": (200, "inactive"),
    "logout, current": (401, "token_invalid"),
    "logout, all": (401, "token_invalid"),
    "end a session": (401, "token_invalid"),
}


@pytest.fixture(scope="module")
async def service(parts: FaultStores) -> AsyncIterator[ServiceProcess]:
    async with parts.services.running(**TIMEOUTS) as process:
        yield process


@pytest.fixture(scope="module")
async def client(service: ServiceProcess) -> AsyncIterator[ServiceClient]:
    async with service.api() as api:
        yield await new_service_client(service, api)


@pytest.mark.parametrize("how", ["killed", "frozen", "refusing"])
async def test_without_redis_only_registration_goes_on_and_redis_back_is_in_use_without_a_restart(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api, how: Any
) -> None:
    first, second, third = [await new_request_matrix(api, client) for _ in range(3)]
    breaking: AbstractAsyncContextManager[None] = refusing(parts.redis) if how == "refusing" else away(parts.redis, how)
    async with breaking:
        await first.play(AWAY)
        await second.play(AWAY)
        assert first.slow() + second.slow() <= SLOW_MAX
        await until_unready(service, "session_store")
    await until_ready(service)
    # Postgres had committed this one before Redis failed: it holds. The others were refused before anything was done.
    await assert_dead(api, first.ended["revoke a refresh token"])
    for name in ("logout, current", "logout, all", "end a session", "revoke an access token"):
        await assert_alive(api, first.ended[name])
    await third.play(WORKS)
    for pair in third.ended.values():
        await assert_dead(api, pair)


async def test_a_hundred_requests_at_once_wait_for_a_frozen_redis_once(
    service: ServiceProcess, parts: FaultStores, api: Api
) -> None:
    account = await api.new_account()
    pair = await api.new_session(account)
    answers: list[httpx.Response] = []

    async def ask() -> None:
        answers.append(await api.me(pair["access_token"]))

    async with away(parts.redis, "frozen"):
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for _ in range(100):
                    group.start_soon(ask)
        for answer in answers:
            assert_problem(answer, *SESSION_STORE)
    await until_ready(service)
    assert (await retried(partial(api.me, pair["access_token"]))).status_code == 200


async def test_a_full_redis_reads_and_refuses_what_takes_memory(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api
) -> None:
    first, second = [await new_request_matrix(api, client) for _ in range(2)]
    async with full(parts.redis):
        await first.play(FULL)
        # A Redis that answers is asked: refusals cost the other requests nothing.
        for _ in range(10):
            assert_problem(await first.requests["refresh"](), *SESSION_STORE)
        assert (await first.requests["me, cached"]()).status_code == 200
    for pair in first.ended.values():
        await assert_dead(api, pair)
    await second.play(WORKS)


@pytest.mark.parametrize("how", ["flushed", "restarted empty"])
async def test_a_wiped_redis_costs_nobody_the_session_and_revives_nobody(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api, how: str
) -> None:
    first, second, third = [await new_request_matrix(api, client) for _ in range(3)]
    await second.play(WORKS)
    await flush(parts.redis.url)
    if how == "restarted empty":
        async with away(parts.redis, "killed"):
            pass
        await until_ready(service)
    await first.play(WIPED)
    for name, pair in first.ended.items():
        if name == "revoke an access token":
            # A bearer is nothing to us until its device has refreshed; RFC 7009 answers 200 to that.
            await assert_alive(api, pair)
        elif name == "revoke a refresh token":
            await assert_dead(api, pair)
        else:
            await assert_alive(api, pair)
    for pair in second.ended.values():
        await assert_dead(api, pair)
    await third.requests["refresh"]()
    for name in ("me, cached", "me, not cached"):
        assert_problem(await third.requests[name](), 401, "token_invalid")


async def test_a_wiped_redis_refuses_bearers_only_until_their_device_has_refreshed(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api
) -> None:
    account = await api.new_account()
    pair = await api.new_session(account)
    await flush(parts.redis.url)
    assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
    renewed = (await api.refresh(pair["refresh_token"])).json()
    for token in (pair["access_token"], renewed["access_token"]):
        assert (await api.me(token)).status_code == 200
        assert (await client.introspect(token)).json()["active"] is True


async def test_a_wipe_while_postgres_is_away_is_503_and_no_verdict(
    service: ServiceProcess, parts: FaultStores, api: Api
) -> None:
    account = await api.new_account()
    alive, dead = [await api.new_session(account) for _ in range(2)]
    assert (await api.post("/auth/logout?scope=current", headers=api.bearer(dead["access_token"]))).status_code == 200
    async with away(parts.postgres, "killed"):
        await flush(parts.redis.url)
        for pair in (alive, dead):
            assert_problem(await api.refresh(pair["refresh_token"]), *USER_STORE)
    await until_ready(service)
    await assert_alive(api, alive)
    await assert_dead(api, dead)


async def test_a_restarted_redis_is_not_believed_before_postgres_was_asked(
    service: ServiceProcess, parts: FaultStores, api: Api
) -> None:
    account = await api.new_account()
    pair = await api.new_session(account)
    assert (await api.me(pair["access_token"])).status_code == 200
    async with away(parts.postgres, "killed"):
        async with away(parts.redis, "killed"):
            pass
        # It may lack the newest endings, and nobody can say.
        assert_problem(await api.refresh(pair["refresh_token"]), *USER_STORE)
        assert_problem(await api.me(pair["access_token"]), *USER_STORE)
    await until_ready(service)
    await assert_alive(api, pair)


async def test_a_read_only_postgres_rebuilds_sessions(service: ServiceProcess, parts: FaultStores, api: Api) -> None:
    pair = await api.new_session(await api.new_account())
    async with read_only(parts.postgres):
        await flush(parts.redis.url)
        await assert_alive(api, pair)
