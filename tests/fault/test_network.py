"""The network between authd and a store: silent, slow, or gone, while both ends live."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.api import Api, assert_problem
from support.faults import SLOW_MAX, TIMEOUTS, FaultStores, assert_alive, until_ready, until_unready
from support.process import ServiceProcess
from support.proxy import Proxy, proxied
from support.request_matrix import SESSION_STORE, USER_STORE, WORKS, Expected, new_request_matrix, new_service_client
from support.waiting import eventually

pytestmark = pytest.mark.timeout(120)

STORES = ("postgres", "redis")
#: One way. A registration asks Postgres about ten times, a login asks Redis about eight times.
DELAY_S = 0.02
READS = {
    "refresh": (200, ""),
    "me, cached": (200, ""),
    "sessions": (200, ""),
    "introspect an access token": (200, "active"),
    "introspect a refresh token": (200, "active"),
}
WITHOUT: dict[str, Expected] = {
    "postgres": dict.fromkeys(WORKS, USER_STORE) | READS,
    "redis": dict.fromkeys(WORKS, SESSION_STORE) | {"register": (201, "")},
}
NAMES = {"postgres": "user_store", "redis": "session_store"}


@pytest.fixture(scope="module")
async def proxies(parts: FaultStores) -> AsyncIterator[dict[str, Proxy]]:
    async with proxied(parts.postgres.port) as postgres, proxied(parts.redis.port) as redis:
        yield {"postgres": postgres, "redis": redis}


@pytest.fixture(scope="module")
async def service(parts: FaultStores, proxies: dict[str, Proxy]) -> AsyncIterator[ServiceProcess]:
    async with parts.services.prepared(**TIMEOUTS, AUTHD_REFRESH_GRACE_S="60") as process:
        for name, store in (("AUTHD_DATABASE_URL", "postgres"), ("AUTHD_REDIS_URL", "redis")):
            upstream = getattr(parts, store).port
            process.settings[name] = process.settings[name].replace(f":{upstream}", f":{proxies[store].port}")
        await process.start()
        yield process


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("how", ["silent", "cut"])
async def test_a_network_that_is_gone_costs_bounded_waits_and_comes_back_without_a_restart(
    service: ServiceProcess, proxies: dict[str, Proxy], api: Api, store: str, how: str
) -> None:
    caller = await new_service_client(service, api)
    first, second, third = [await new_request_matrix(api, caller) for _ in range(3)]
    proxy = proxies[store]
    if how == "silent":
        proxy.freeze()
    else:
        proxy.cut()
    try:
        await first.play(WITHOUT[store])
        await second.play(WITHOUT[store])
        assert first.slow() + second.slow() <= SLOW_MAX
        await until_unready(service, NAMES[store])
    finally:
        proxy.mend()
    await until_ready(service)
    await third.play(WORKS)


async def test_a_slow_network_only_costs_time(service: ServiceProcess, proxies: dict[str, Proxy], api: Api) -> None:
    caller = await new_service_client(service, api)
    matrix = await new_request_matrix(api, caller)
    for proxy in proxies.values():
        proxy.delay_s = {"asked": DELAY_S, "answered": DELAY_S}
    try:
        await matrix.play(WORKS)
    finally:
        for proxy in proxies.values():
            proxy.mend()


@pytest.mark.parametrize("direction", ["asked", "answered"])
async def test_a_rotation_whose_question_or_answer_is_late_can_be_repeated(
    service: ServiceProcess, proxies: dict[str, Proxy], api: Api, direction: Any
) -> None:
    pair = await api.new_session(await api.new_account())
    proxy = proxies["redis"]
    # Longer than the client waits for Redis.
    proxy.delay_s[direction] = 1.5
    try:
        assert_problem(await api.refresh(pair["refresh_token"]), *SESSION_STORE)
    finally:
        proxy.mend()
    await until_ready(service)
    await assert_alive(api, pair)
    listed = await eventually(lambda: api.get("/auth/sessions", headers=api.bearer(pair["access_token"])))
    assert len(listed.json()["sessions"]) == 1
