"""Redis loses all, or goes back in time, amid the use: nobody is logged out, and nothing that ended comes back."""

import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio import to_thread
from redis.asyncio import Redis
from support.api import Api, assert_problem
from support.faults import TIMEOUTS, FaultStores, assert_alive, assert_dead, away, flush, retried, seeded, until_ready
from support.process import ServiceProcess
from support.request_matrix import new_service_client

from authd.embedded import RedisServer

pytestmark = pytest.mark.timeout(120)

USERS, SESSIONS = 20, 10
RACE_LANES, RACE_ROUNDS = 10, 10
DUMP = "dump.rdb"

Pair = dict[str, Any]


@pytest.fixture(scope="module")
async def redis(anyio_backend: object, parts: FaultStores) -> AsyncIterator[RedisServer]:
    """One that loads a snapshot at its start, and keeps no other file."""
    async with RedisServer(parts.redis.folder.parent / "snapshots", durable=False) as server:
        yield server


@pytest.fixture(scope="module")
async def service(parts: FaultStores, redis: RedisServer) -> AsyncIterator[ServiceProcess]:
    async with parts.services.running(**TIMEOUTS, AUTHD_REDIS_URL=redis.url) as process:
        yield process


@asynccontextmanager
async def rolled_back(redis: RedisServer, snapshot: Path) -> AsyncIterator[None]:
    """Redis as it was when the snapshot was taken."""
    async with away(redis, "killed"):
        await to_thread.run_sync(shutil.copy, snapshot, redis.folder / DUMP)
    try:
        yield
    finally:
        (redis.folder / DUMP).unlink(missing_ok=True)


@contextmanager
def suspended(process: ServiceProcess) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


async def take_snapshot(redis: RedisServer) -> Path:
    async with Redis.from_url(redis.url) as client:
        await client.save()
    snapshot = redis.folder / "snapshot.rdb"
    await to_thread.run_sync(shutil.move, redis.folder / DUMP, snapshot)
    return snapshot


async def refreshed(api: Api, pair: Pair) -> Pair:
    answer = await retried(partial(api.refresh, pair["refresh_token"]))
    assert answer.status_code == 200, answer.text
    renewed: Pair = answer.json()
    return renewed


async def logout(api: Api, pair: Pair, scope: str) -> httpx.Response:
    return await api.post(f"/auth/logout?scope={scope}", headers=api.bearer(pair["access_token"]))


async def test_a_wipe_amid_two_hundred_sessions_costs_each_device_one_refresh_and_revives_none(
    service: ServiceProcess, redis: RedisServer, api: Api
) -> None:
    caller = await new_service_client(service, api)
    devices: list[Pair] = []
    revoked: list[Pair] = []
    for number in range(USERS):
        account = await api.new_account()
        pairs = [await api.new_session(account) for _ in range(SESSIONS)]
        if number < SESSIONS:
            # Ten sessions end, in each way there is; where all of the user's end, it logs in again.
            if number % 3 == 0:
                assert (await logout(api, pairs[0], "current")).status_code == 200
            elif number % 3 == 1:
                assert (await caller.revoke(pairs[0]["refresh_token"])).status_code == 200
            else:
                assert (await logout(api, pairs[0], "all")).status_code == 200
                pairs[1:] = [await api.new_session(account) for _ in pairs[1:]]
            revoked.append(pairs.pop(0))
        devices += pairs
    halfway = anyio.Event()
    count = 0

    async def use(pair: Pair) -> None:
        nonlocal count
        current = await refreshed(api, pair)
        count += 1
        if count == len(devices) // 2:
            halfway.set()
        bearer = await retried(partial(api.me, current["access_token"]))
        if bearer.status_code == 401:
            # The wipe came between: one refresh, and it goes on.
            current = await refreshed(api, current)
            bearer = await retried(partial(api.me, current["access_token"]))
        assert bearer.status_code == 200
        pair.update(current)

    limit = anyio.Semaphore(20)

    async def use_in_turn(pair: Pair) -> None:
        async with limit:
            await use(pair)

    async with anyio.create_task_group() as group:
        for pair in devices:
            group.start_soon(use_in_turn, pair)
        await halfway.wait()
        await flush(redis.url)
    for pair in devices:
        current = await refreshed(api, pair)
        assert (await api.me(current["access_token"])).status_code == 200
    for pair in revoked:
        await assert_dead(api, pair)


async def test_after_a_wipe_a_rotated_out_token_and_then_the_rightful_one_end_the_session(
    parts: FaultStores, redis: RedisServer
) -> None:
    settings = {"AUTHD_REFRESH_GRACE_S": "0", "AUTHD_REDIS_URL": redis.url}
    async with parts.services.running(**TIMEOUTS, **settings) as process, process.api() as api:
        for rotations in (1, 5):
            stolen = rightful = await api.new_session(await api.new_account())
            for _ in range(rotations):
                rightful = await refreshed(api, rightful)
            await flush(redis.url)
            thiefs = await refreshed(api, stolen)
            assert_problem(await api.refresh(rightful["refresh_token"]), 401, "refresh_token_reused")
            for pair in (stolen, rightful, thiefs):
                assert_problem(await api.refresh(pair["refresh_token"]), 401, "refresh_token_reused")
                assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
            await flush(redis.url)
            for pair in (stolen, rightful, thiefs):
                await assert_dead(api, pair)


async def test_a_snapshot_from_before_a_logout_revives_nobody_at_any_replica(
    service: ServiceProcess, parts: FaultStores, redis: RedisServer, api: Api
) -> None:
    async with parts.services.replica(service) as other, other.api() as there:
        account, second = await api.new_account(), await api.new_account()
        ended, kept = [await api.new_session(account) for _ in range(2)]
        everything = await api.new_session(second)
        for pair in (ended, kept, everything):
            assert (await there.me(pair["access_token"])).status_code == 200
        snapshot = await take_snapshot(redis)
        with suspended(other):
            assert (await logout(api, ended, "current")).status_code == 200
            assert (await logout(api, everything, "all")).status_code == 200
            async with rolled_back(redis, snapshot):
                pass
        # It has heard of no logout, and its connections are to a server that is gone.
        for pair in (ended, everything):
            await assert_dead(there, pair)
            await assert_dead(api, pair)
        await assert_alive(there, kept)
        await until_ready(service)


async def test_a_token_ahead_of_a_redis_that_went_back_is_adopted(
    service: ServiceProcess, redis: RedisServer, api: Api
) -> None:
    first = await api.new_session(await api.new_account())
    snapshot = await take_snapshot(redis)
    second = await refreshed(api, first)
    async with rolled_back(redis, snapshot):
        third = await refreshed(api, second)
        assert (await api.me(third["access_token"])).status_code == 200
        await assert_alive(api, third)
    await until_ready(service)


async def test_a_rebuild_that_races_a_logout_leaves_no_live_token(
    service: ServiceProcess, redis: RedisServer, api: Api
) -> None:
    dice = seeded()
    seen: set[int] = set()

    async def race(account: Any) -> None:
        victim, other = [await api.new_session(account) for _ in range(2)]
        await forget(service, redis, account.user_id)
        other = await refreshed(api, other)
        answers: dict[str, httpx.Response] = {}

        async def refresh() -> None:
            await anyio.sleep(dice.uniform(0, 0.02))
            answers["refresh"] = await api.refresh(victim["refresh_token"])

        async def end() -> None:
            await anyio.sleep(dice.uniform(0, 0.02))
            answers["logout"] = await logout(api, other, "all")

        async with anyio.create_task_group() as group:
            group.start_soon(refresh)
            group.start_soon(end)
        assert answers["logout"].status_code == 200
        pairs = [victim, other]
        seen.add(answers["refresh"].status_code)
        if answers["refresh"].status_code == 200:
            pairs.append(answers["refresh"].json())
        for pair in pairs:
            await assert_dead(api, pair)

    async def lane() -> None:
        account = await api.new_account()
        for _ in range(RACE_ROUNDS):
            await race(account)

    async with anyio.create_task_group() as group:
        for _ in range(RACE_LANES):
            group.start_soon(lane)
    assert seen == {200, 401}


async def test_after_a_wipe_ten_of_eleven_devices_live(service: ServiceProcess, redis: RedisServer, api: Api) -> None:
    account = await api.new_account()
    pairs = [await api.new_session(account) for _ in range(10)]
    await flush(redis.url)
    pairs.append(await api.new_session(account))
    outcomes = [(await api.refresh(pair["refresh_token"])).status_code for pair in pairs[:-1]]
    assert outcomes == [200] * 10
    # The eleventh that came had to evict the oldest.
    assert_problem(await api.refresh(pairs[0]["refresh_token"]), 401, "session_evicted")
    listed = await api.get("/auth/sessions", headers=api.bearer(pairs[-1]["access_token"]))
    assert len(listed.json()["sessions"]) == 10
    # Wiped again: who was evicted stays so.
    await flush(redis.url)
    assert_problem(await api.refresh(pairs[0]["refresh_token"]), 401, "session_evicted")
    await assert_alive(api, pairs[-1])


async def test_a_redis_frozen_past_the_timeout_rotates_nothing_when_it_wakes(
    parts: FaultStores, redis: RedisServer
) -> None:
    # Without a grace a rotation that nobody heard of would make the next refresh a theft.
    settings = {"AUTHD_REFRESH_GRACE_S": "0", "AUTHD_REDIS_URL": redis.url}
    async with parts.services.running(**TIMEOUTS, **settings) as process, process.api() as api:
        accounts = [await api.new_account() for _ in range(3)]
        pairs = [await api.new_session(account) for account in accounts for _ in range(7)]
        statuses: list[int] = []

        async def refresh(pair: Pair) -> None:
            statuses.append((await api.refresh(pair["refresh_token"])).status_code)

        async with away(redis, "frozen"), anyio.create_task_group() as group:
            for pair in pairs:
                group.start_soon(refresh, pair)
        assert statuses == [503] * len(pairs)
        await until_ready(process)
        for pair in pairs:
            await assert_alive(api, pair)


async def forget(service: ServiceProcess, redis: RedisServer, user_id: int) -> None:
    """Redis loses one user's sessions."""
    async with Redis.from_url(redis.url) as client:
        await client.delete(await service.sessions_key(user_id))
