"""Stores that a module may break, and the ways to break and fix them."""

import random
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import asyncpg
import httpx
import pytest
from redis.asyncio import Redis
from support.api import Api, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.stores import make_template, require_kafka
from support.waiting import eventually

from authd.embedded import KafkaBroker, PostgresServer, RedisServer, fetch_libs
from authd.embedded.processes import EmbeddedServer
from authd.infra.tasks.breaker import FAILURES_MAX

#: All clients of these tests are one address.
NO_ADDRESS_LIMIT = {"AUTHD_ADDRESS_MAX_FAILURES": "100000"}
#: Shorter than the defaults, so that a frozen part costs the tests less; long enough for a busy machine.
TIMEOUTS = {"AUTHD_REDIS_TIMEOUT_S": "0.8", "AUTHD_DATABASE_TIMEOUT_S": "1.2", "AUTHD_KAFKA_TIMEOUT_S": "3"}
KAFKA_SLOW_S = float(TIMEOUTS["AUTHD_KAFKA_TIMEOUT_S"])
#: The requests that may have waited while a part is frozen: those that open the breaker, and those that it lets
#: through to find out. The health task, and not a request, is mostly the one that does.
SLOW_MAX = FAILURES_MAX + 3
#: For all events, once the stores are back.
PUBLISHED_S = 60.0
RETRY_FIRST_S, RETRY_MAX_S = 0.02, 0.5
Absence = Literal["killed", "frozen"]


@dataclass
class FaultStores:
    """A Postgres and a Redis of the module's own. What a test breaks it mends."""

    postgres: PostgresServer
    redis: RedisServer
    services: Services


@pytest.fixture(scope="module")
async def parts(anyio_backend: object, stores_folder: Any) -> AsyncIterator[FaultStores]:
    folder = stores_folder / f"fault-{uuid.uuid4().hex[:8]}"
    async with (
        PostgresServer(folder / "postgres", durable=False) as postgres,
        # Durable, so that a kill loses nothing: a wipe is a test of its own.
        RedisServer(folder / "redis", durable=True) as redis,
    ):
        yield FaultStores(postgres, redis, Services(postgres, redis, await make_template(postgres), NO_ADDRESS_LIMIT))


@pytest.fixture(scope="module")
async def broker(anyio_backend: object, stores_folder: Any) -> AsyncIterator[KafkaBroker]:
    """A broker of the module's own, which makes topics when they are first used."""
    require_kafka()
    async with KafkaBroker(stores_folder / f"fault-{uuid.uuid4().hex[:8]}", await fetch_libs()) as server:
        yield server


def seeded(seed: int | None = None) -> random.Random:
    """Chance that can be repeated: the seed stands in the output of a test that failed."""
    seed = secrets.randbits(32) if seed is None else seed
    print(f"seed: {seed}")  # noqa: T201
    return random.Random(seed)


# Breaking and mending


@asynccontextmanager
async def away(server: EmbeddedServer, how: Absence) -> AsyncIterator[None]:
    """Killed: nothing listens. Frozen: the kernel accepts and nothing answers."""
    await (server.kill() if how == "killed" else server.pause())
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await (server.start() if how == "killed" else server.resume())


@asynccontextmanager
async def refusing(server: RedisServer) -> AsyncIterator[None]:
    """Redis answers every command with an error: it wants a password that nobody has."""
    async with Redis.from_url(server.url) as client:
        await client.config_set("requirepass", "nobody-knows")
        await client.client_kill_filter(_type="normal", skipme=True)
        try:
            yield
        finally:
            await client.config_set("requirepass", "")


@asynccontextmanager
async def full(server: RedisServer) -> AsyncIterator[None]:
    """Redis has no memory left: it reads, and refuses what would take more."""
    async with Redis.from_url(server.url) as client:
        await client.config_set("maxmemory", "1mb")
        try:
            yield
        finally:
            await client.config_set("maxmemory", "0")


@asynccontextmanager
async def read_only(server: PostgresServer) -> AsyncIterator[None]:
    """As after a failover to a standby: Postgres reads, and refuses what would write."""
    await _set_read_only(server, "on")
    try:
        yield
    finally:
        await _set_read_only(server, "off")


async def _set_read_only(server: PostgresServer, value: str) -> None:
    connection = await asyncpg.connect(server.url, ssl=False)
    try:
        # ALTER SYSTEM runs in a read-only session, too.
        await connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()


@asynccontextmanager
async def disk_full(process: ServiceProcess) -> AsyncIterator[None]:
    """Postgres answers every insert as it does on a full disk, by SQLSTATE 53100. A disk that is full indeed takes a
    file system of a size of our own, which needs rights that a developer's machine and most CI do not give.
    """
    await process.query(
        "CREATE FUNCTION fail_full() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END$$"
    )
    tables = ("users", "revocations", "outbox")
    for table in tables:
        await process.query(
            f"CREATE TRIGGER full_disk BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION fail_full()"
        )
    try:
        yield
    finally:
        await process.query("DROP FUNCTION fail_full() CASCADE")


async def flush(url: str) -> None:
    async with Redis.from_url(url) as client:
        await client.flushall()


async def until_ready(process: ServiceProcess, within_s: float = 20.0) -> None:
    """A part that is back is in use again, with no restart."""
    async with process.api() as api:

        async def is_ready() -> bool:
            answer = await api.get("/readyz")
            return answer.status_code == 200 and all(_required(answer.json()["parts"]).values())

        await eventually(is_ready, within_s)


async def until_unready(process: ServiceProcess, part: str) -> None:
    """/readyz names the part, and the process lives."""
    async with process.api() as api:

        async def is_named() -> bool:
            answer = await api.get("/readyz")
            assert (await api.get("/livez")).status_code == 200
            parts = _required(answer.json()["parts"])
            return answer.status_code == 503 and [name for name, answers in parts.items() if not answers] == [part]

        await eventually(is_named)


def _required(reported: dict[str, bool]) -> dict[str, bool]:
    return {name: answers for name, answers in reported.items() if name != "events"}


async def retried(call: Callable[[], Awaitable[httpx.Response]], within_s: float = 20.0) -> httpx.Response:
    """What a good client does: the same request again after a 503, until the deadline."""
    delay_s = RETRY_FIRST_S
    with anyio.fail_after(within_s):
        while True:
            answer = await call()
            if answer.status_code != 503:
                return answer
            assert int(answer.headers["Retry-After"]) >= 1
            await anyio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_MAX_S)


async def assert_dead(api: Api, pair: dict[str, Any]) -> None:
    """Neither token of the pair does anything, and the refusal is final."""
    bearer = await retried(lambda: api.me(pair["access_token"]))
    assert_problem(bearer, 401, "token_invalid")
    refreshed = await retried(lambda: api.refresh(pair["refresh_token"]))
    assert_problem(refreshed, 401)


async def assert_alive(api: Api, pair: dict[str, Any]) -> dict[str, Any]:
    """Both tokens of the pair work. Returns the next pair."""
    answer = await retried(lambda: api.refresh(pair["refresh_token"]))
    assert answer.status_code == 200, answer.text
    renewed: dict[str, Any] = answer.json()
    answer = await retried(lambda: api.me(renewed["access_token"]))
    assert answer.status_code == 200, answer.text
    return renewed
