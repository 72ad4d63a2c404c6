"""Events of two replicas on a real broker that comes and goes."""

import json
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from blockbuster import BlockBuster
from support.relaying import header, make_settings, open_node
from support.stores import read_topic
from support.waiting import eventually

from authd.embedded import KafkaBroker, RedisServer

pytestmark = pytest.mark.timeout(120)


@pytest.mark.proof
async def test_each_users_first_deliveries_are_in_commit_order_while_the_broker_is_bounced(
    database_url: str, redis_server: RedisServer, kafka_broker: KafkaBroker, no_blocking: BlockBuster
) -> None:
    users, changes = 50, 40
    settings = make_settings(database_url, redis_server.url, kafka_broker.bootstrap_servers, kafka_timeout_s=1.0)
    async with (
        open_node(settings, no_blocking, publishes=True) as one,
        open_node(settings, no_blocking, publishes=True) as other,
    ):
        done = 0

        async def change(user: int) -> None:
            nonlocal done
            for number in range(changes):
                node = (one, other)[(user + number) % 2]
                await node.end_all(user, str(number))
                done += 1

        async with anyio.create_task_group() as group:
            for _ in range(users):
                group.start_soon(change, await one.register())
            await eventually(lambda: is_at_least(lambda: done, users * changes // 4))
            await kafka_broker.stop()
            await eventually(lambda: is_at_least(lambda: done, users * changes // 2))
            await kafka_broker.start()
        await one.until_published()
    told = first_deliveries(await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_events_topic))
    assert len(told) == users
    for values in told.values():
        assert [value["reason"] for value in values if "reason" in value] == [str(number) for number in range(changes)]
    last = {
        record.key: json.loads(record.value)
        for record in await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_revocations_topic)
    }
    assert {value["reason"] for value in last.values()} == {str(changes - 1)}


@pytest.mark.proof
async def test_kafka_away_for_the_whole_run_fails_nothing_fills_no_redis_and_loses_nothing(
    database_url: str, redis_server: RedisServer, kafka_broker: KafkaBroker, no_blocking: BlockBuster
) -> None:
    settings = make_settings(
        database_url, redis_server.url, kafka_broker.bootstrap_servers, kafka_timeout_s=1.0, stream_max=10
    )
    await kafka_broker.stop()
    try:
        async with (
            open_node(settings, no_blocking, publishes=True) as one,
            open_node(settings, no_blocking, publishes=True) as other,
        ):
            expected: dict[int, list[str]] = {}
            for _ in range(10):
                user = await one.register()
                expected[user] = ["user.registered"]
                sessions = [await (one, other)[each % 2].open(user) for each in range(5)]
                expected[user] += ["session.opened"] * 3 + ["session.evicted", "session.opened"] * 2
                await one.until_relayed()  # Redis is empty again and again
                await other.end(user, sessions[-1])
                expected[user].append("session.ended")
            assert await one.decided.streams.filled() == {}
            await kafka_broker.start()
            await one.until_published()
    finally:
        if not kafka_broker.is_running:
            await kafka_broker.start()
    told: dict[int, dict[str, str]] = {}
    for record in await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_events_topic):
        told.setdefault(json.loads(record.value)["user_id"], {})[header(record, "event_id")] = header(
            record, "event_type"
        )
    assert {user: list(types.values()) for user, types in told.items()} == expected
    registered = await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_registration_topic)
    assert {json.loads(record.value)["user_id"] for record in registered} == expected.keys()


async def is_at_least(number: Callable[[], int], wanted: int) -> bool:
    return number() >= wanted


def first_deliveries(records: list[Any]) -> dict[int, list[Any]]:
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        value = json.loads(record.value)
        found.setdefault(value["user_id"], {}).setdefault(header(record, "event_id"), value)
    return {user: list(values.values()) for user, values in found.items()}
