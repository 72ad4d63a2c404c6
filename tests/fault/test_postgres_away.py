"""Postgres away, read-only or full: the column of the failure matrix, for every request, with the real server."""

from collections.abc import AsyncIterator
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
    disk_full,
    read_only,
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
from support.waiting import eventually

pytestmark = pytest.mark.timeout(120)

#: Redis decides alone what it can: rotations, and who is there.
AWAY: Expected = WORKS | dict.fromkeys(
    (
        "register",
        "login",
        "login, wrong password",
        "me, not cached",
        "logout, current",
        "logout, all",
        "end a session",
        "revoke an access token",
        "revoke a refresh token",
    ),
    USER_STORE,
)
#: Who can be read can log in; what must be remembered is refused.
UNWRITABLE: Expected = WORKS | dict.fromkeys(
    (
        "register",
        "logout, current",
        "logout, all",
        "end a session",
        "revoke an access token",
        "revoke a refresh token",
    ),
    USER_STORE,
)


@pytest.fixture(scope="module")
async def service(parts: FaultStores) -> AsyncIterator[ServiceProcess]:
    async with parts.services.running(**TIMEOUTS) as process:
        yield process


@pytest.fixture(scope="module")
async def client(service: ServiceProcess) -> AsyncIterator[ServiceClient]:
    async with service.api() as api:
        yield await new_service_client(service, api)


async def users_of(service: ServiceProcess) -> int:
    return int((await service.query("SELECT count(*) AS n FROM users"))[0]["n"])


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_without_postgres_sessions_go_on_and_postgres_back_is_in_use_without_a_restart(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api, how: Any
) -> None:
    first, second, third = [await new_request_matrix(api, client) for _ in range(3)]
    before = await users_of(service)
    async with away(parts.postgres, how):
        await first.play(AWAY)
        await second.play(AWAY)
        assert first.slow() + second.slow() <= SLOW_MAX
        await until_unready(service, "user_store")
    await until_ready(service)
    assert await users_of(service) == before
    for pair in (*first.ended.values(), *second.ended.values()):
        await assert_alive(api, pair)
    await third.play(WORKS)
    for pair in third.ended.values():
        await assert_dead(api, pair)


async def test_a_hundred_requests_at_once_wait_for_a_frozen_postgres_once(
    service: ServiceProcess, parts: FaultStores, api: Api
) -> None:
    account = await api.new_account()
    answers: list[httpx.Response] = []

    async def register(number: int) -> None:
        answers.append(await api.register(f"frozen-{number}@example.com", "a pass phrase"))

    async with away(parts.postgres, "frozen"):
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(register, number)
        codes = {assert_problem(answer, 503)["code"] for answer in answers}
        # On a busy machine the last of the hundred are told before they are hashed.
        assert USER_STORE[1] in codes
        assert codes <= {USER_STORE[1], "login_busy"}
    await until_ready(service)
    login = await retried(lambda: api.login(account.username, account.password))
    assert login.status_code == 200


@pytest.mark.parametrize("how", ["read-only", "full disk"])
async def test_a_postgres_that_only_reads_lets_users_in_and_out_of_nothing(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api, how: str
) -> None:
    first, second = [await new_request_matrix(api, client) for _ in range(2)]
    before = await users_of(service)
    async with read_only(parts.postgres) if how == "read-only" else disk_full(service):
        await first.play(UNWRITABLE)
        # A Postgres that answers is asked: what it refuses to write costs the reading requests nothing.
        for _ in range(10):
            assert_problem(await first.requests["register"](), *USER_STORE)
        assert (await first.requests["login"]()).status_code == 200
        ready = await api.get("/readyz")
        assert ready.status_code == 200, ready.text
    assert await users_of(service) == before
    for pair in first.ended.values():
        await assert_alive(api, pair)
    await second.play(WORKS)


@pytest.mark.parametrize("how", ["read-only", "frozen"])
async def test_a_reuse_that_postgres_cannot_log_ends_the_session_at_once_and_for_good(
    parts: FaultStores, how: str
) -> None:
    async with parts.services.running(**TIMEOUTS, AUTHD_REFRESH_GRACE_S="0") as process, process.api() as api:
        account = await api.new_account()
        stolen = await api.new_session(account)
        rightful = await assert_alive(api, stolen)
        async with read_only(parts.postgres) if how == "read-only" else away(parts.postgres, "frozen"):
            assert_problem(await api.refresh(stolen["refresh_token"]), 401, "refresh_token_reused")
            for pair in (rightful, stolen):
                assert_problem(await api.refresh(pair["refresh_token"]), 401, "refresh_token_reused")
                assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
        await until_ready(process)

        async def is_logged() -> bool:
            return bool(await process.query("SELECT FROM revocations WHERE reason = 'reused'"))

        await eventually(is_logged)
        await process.wipe_redis()
        for pair in (rightful, stolen):
            assert_problem(await api.refresh(pair["refresh_token"]), 401, "refresh_token_reused")


async def test_an_eviction_that_postgres_cannot_log_ends_the_session_at_once_and_for_good(parts: FaultStores) -> None:
    async with parts.services.running(**TIMEOUTS) as process, process.api() as api:
        account = await api.new_account()
        pairs = [await api.new_session(account) for _ in range(10)]
        async with read_only(parts.postgres):
            pairs.append(await api.new_session(account))
            assert_problem(await api.refresh(pairs[0]["refresh_token"]), 401, "session_evicted")
            assert_problem(await api.me(pairs[0]["access_token"]), 401, "token_invalid")

        async def is_logged() -> bool:
            return bool(await process.query("SELECT FROM revocations WHERE reason = 'evicted'"))

        await eventually(is_logged)
        await process.wipe_redis()
        assert_problem(await api.refresh(pairs[0]["refresh_token"]), 401, "session_evicted")
        for pair in pairs[1:]:
            await assert_alive(api, pair)


async def test_both_stores_frozen_cost_a_bounded_wait(
    service: ServiceProcess, parts: FaultStores, client: ServiceClient, api: Api
) -> None:
    matrix = await new_request_matrix(api, client)
    async with away(parts.postgres, "frozen"), away(parts.redis, "frozen"):
        for name in ("register", "login", "refresh", "me, cached"):
            problem = assert_problem(await matrix.requests[name](), 503)
            assert problem["code"] in (USER_STORE[1], SESSION_STORE[1])
        assert (await api.get("/livez")).status_code == 200
    await until_ready(service)
    await matrix.play(WORKS)


async def test_a_start_waits_for_postgres_and_ends_with_a_sentence_where_it_does_not_come(parts: FaultStores) -> None:
    async with parts.services.prepared(**TIMEOUTS, AUTHD_START_TIMEOUT_S="3") as process:
        async with away(parts.postgres, "killed"):
            done = await process.run("serve")
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            await process.launch()
            await eventually(lambda: process.lines("postgres_away"))
        await until_listening(process)


async def until_listening(process: ServiceProcess) -> None:
    async with process.api() as api:

        async def is_ready() -> bool:
            try:
                return (await api.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(is_ready)
