"""The client of Redis: which errors mean that it is unavailable, and which are faults that must not look like it."""

import secrets
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.connection import Connection

from authd.config import Secret, Settings
from authd.errors import Unavailable
from authd.infra.redis.client import SERVERS_MAX, RedisClient, Servers, open_redis
from authd.infra.tasks.breaker import FAILURES_MAX

PATIENCE_S = 45.0
LOSSES = 500


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[RedisClient]:
    settings = Settings(
        database_url=Secret("-"),
        redis_url=Secret(redis_url),
        secret=Secret("-"),
        deployment=f"t-{secrets.token_hex(8)}",
        redis_timeout_s=5.0,
    )
    async with open_redis(settings) as client:
        yield client


async def test_connections_that_are_closed_under_their_tasks_are_unavailable_and_no_fault(client: RedisClient) -> None:
    """As redis-py does while a cluster is down. Any other error would end the task group."""
    causes: Counter[type] = Counter()
    is_cluster = not isinstance(client._client, Redis)
    # What a cluster's client breaks with, by the version of Python one or both; a single one's names the loss.
    wanted = {AttributeError, RuntimeError} if is_cluster else {redis_errors.ConnectionError}
    done = False

    async def use(number: int) -> None:
        while not done:
            try:
                await client.command("SET", client.key(number, "used"), "v" * 20_000)
            except Unavailable as error:
                causes[type(error.__cause__)] += 1
            client._breakers.clear()  # refused calls would use no connection
            await anyio.lowlevel.checkpoint()

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(use, number)
            # Which error a task meets is chance, and mostly it is the loss by its name.
            while not wanted & causes.keys() and causes.total() < LOSSES:
                await anyio.sleep(0.005)
                used: Any = client._client
                pools = list(used.nodes_manager.nodes_cache.values()) if is_cluster else [used.connection_pool]
                for pool in pools:
                    await pool.disconnect()
            done = True
    assert causes
    for number in range(40):
        await client.command("DEL", client.key(number, "used"))


class OurFault:
    """Calls that fail by errors of ours, of the kinds that redis-py breaks with."""

    async def attribute(self) -> None:
        None.nothing  # type: ignore[attr-defined]  # noqa: B018

    async def runtime(self) -> None:
        raise RuntimeError("a bug")


@pytest.mark.parametrize(("name", "error"), [("attribute", AttributeError), ("runtime", RuntimeError)])
async def test_a_programming_error_is_raised_as_it_is_and_opens_no_breaker(
    client: RedisClient, name: str, error: type[Exception]
) -> None:
    for _ in range(FAILURES_MAX + 1):
        with pytest.raises(error):
            await client._call(client.key(0, "any"), getattr(OurFault(), name)())
    await client.ping()


async def test_an_argument_that_redis_cannot_take_is_a_fault(client: RedisClient) -> None:
    for _ in range(FAILURES_MAX + 1):
        with pytest.raises(redis_errors.DataError):
            await client.command("SET", client.key(0, "any"), None)
    await client.ping()


async def test_servers_are_remembered_up_to_a_bound_and_a_forgotten_one_counts_as_new(redis_server: Any) -> None:
    servers = Servers()
    connection = Connection(host="127.0.0.1", port=redis_server.port)
    try:
        for number in range(SERVERS_MAX + 10):
            # A node that came back under another address.
            await connection.connect()
            connection.host = f"10.0.{number // 256}.{number % 256}"
            await servers.on_connect(connection)
            connection.host = "127.0.0.1"
        assert len(servers._run_ids) == len(servers.eviction_policies) == SERVERS_MAX
        assert servers.generation == SERVERS_MAX + 10
        for host, is_new in (("10.0.1.9", False), ("10.0.0.0", True)):
            before = servers.generation
            connection.host = host
            await servers.on_connect(connection)
            assert (servers.generation > before) is is_new
    finally:
        connection.host = "127.0.0.1"
        await connection.disconnect()
