"""Kafka away: no request notices, and every event arrives when it is back."""

import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from support.api import Api
from support.faults import KAFKA_SLOW_S, PUBLISHED_S, TIMEOUTS, FaultStores, away
from support.kafka import (
    StrictBroker,
    allow_writing,
    configure_topic,
    create_topics,
    events_in,
    forbid_writing,
    topics,
)
from support.process import ServiceProcess
from support.request_matrix import WORKS, new_request_matrix, new_service_client
from support.services import until_published
from support.stores import require_kafka
from support.waiting import eventually

from authd.embedded import KafkaBroker, fetch_libs

pytestmark = pytest.mark.timeout(120)

#: A record of an average user fits, one with the longest full name does not.
MESSAGE_BYTES = 600
LONG_NAME = "🦊" * 200


@pytest.fixture(scope="module")
async def broker(anyio_backend: object, stores_folder: Any) -> AsyncIterator[KafkaBroker]:
    require_kafka()
    async with StrictBroker(stores_folder / f"strict-{uuid.uuid4().hex[:8]}", await fetch_libs()) as server:
        yield server


def kafka_settings(broker: KafkaBroker) -> dict[str, str]:
    name = f"t{uuid.uuid4().hex[:12]}"
    return TIMEOUTS | topics(name) | {"AUTHD_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers}


def topic_names(process: ServiceProcess) -> list[str]:
    return [value for name, value in process.settings.items() if name.endswith("_TOPIC")]


async def assert_all_told(process: ServiceProcess, broker: KafkaBroker) -> Counter[str]:
    """Each user has one event in both topics, and each ending its record for verifiers. Returns what was told."""
    users = {row["id"] for row in await process.query("SELECT id FROM users")}
    contract = await events_in(broker, process.topic)
    assert sorted(value["user_id"] for _, value in contract) == sorted(users)
    told = await events_in(broker, process.settings["AUTHD_KAFKA_EVENTS_TOPIC"])
    assert sorted(value["user_id"] for kind, value in told if kind == "user.registered") == sorted(users)
    endings = await process.query("SELECT count(*) AS n FROM revocations")
    revoked = await events_in(broker, process.settings["AUTHD_KAFKA_REVOCATIONS_TOPIC"])
    assert len(revoked) == endings[0]["n"]
    return Counter(kind for kind, _ in told)


async def test_with_kafka_frozen_every_request_works_and_every_event_arrives_later(
    parts: FaultStores, broker: KafkaBroker
) -> None:
    settings = kafka_settings(broker)
    await create_topics(
        broker.bootstrap_servers, [value for name, value in settings.items() if name.endswith("_TOPIC")]
    )
    async with parts.services.running(**settings) as process, process.api() as api:
        client = await new_service_client(process, api)
        first, second = [await new_request_matrix(api, client) for _ in range(2)]
        await until_published(process, PUBLISHED_S)
        async with away(broker, "frozen"):
            await first.play(WORKS)
            await second.play(WORKS)
            assert first.slow(KAFKA_SLOW_S) + second.slow(KAFKA_SLOW_S) == 0
            await eventually(lambda: process.lines("lane_given_up"))
            await until_degraded(api)
        await until_published(process, PUBLISHED_S)
        assert_decks_told(await assert_all_told(process, broker), 2)


async def test_a_kafka_that_is_killed_and_comes_back_after_the_whole_run_gets_everything(
    parts: FaultStores, broker: KafkaBroker
) -> None:
    settings = kafka_settings(broker)
    await create_topics(
        broker.bootstrap_servers, [value for name, value in settings.items() if name.endswith("_TOPIC")]
    )
    async with parts.services.running(**settings) as process:
        async with away(broker, "killed"):
            async with process.api() as api:
                client = await new_service_client(process, api)
                for matrix in [await new_request_matrix(api, client) for _ in range(5)]:
                    await matrix.play(WORKS)
                    assert matrix.slow(KAFKA_SLOW_S) == 0
                await until_degraded(api)
            # It stops in order with nobody to tell, and what Redis decided is in the outbox too.
            assert await process.stop() == 0
        await process.start()
        await until_published(process, PUBLISHED_S)
        assert_decks_told(await assert_all_told(process, broker), 5)


def assert_decks_told(told: Counter[str], decks: int) -> None:
    """A matrix opens eight sessions and logs in once more; it ends four one by one, and all of a user's once."""
    assert told["session.opened"] == 9 * decks
    assert told["session.ended"] == 4 * decks
    assert told["sessions.ended"] == decks


async def until_degraded(api: Api) -> None:
    """Events wait: that is no reason to send requests elsewhere."""

    async def is_degraded() -> bool:
        answer = await api.get("/readyz")
        return answer.status_code == 200 and answer.json()["status"] == "degraded"

    await eventually(is_degraded)


async def test_a_record_that_is_too_large_holds_up_nobody_else(parts: FaultStores, broker: KafkaBroker) -> None:
    settings = kafka_settings(broker)
    names = [value for name, value in settings.items() if name.endswith("_TOPIC")]
    await create_topics(broker.bootstrap_servers, names[1:])
    await create_topics(broker.bootstrap_servers, names[:1], **{"max.message.bytes": str(MESSAGE_BYTES)})
    async with parts.services.running(**settings) as process, process.api() as api:
        large = await api.new_account(full_name=LONG_NAME)
        await eventually(lambda: process.lines("event_refused"))
        others = [await api.new_account() for _ in range(20)]

        async def others_arrived() -> bool:
            await anyio.sleep(0.1)
            told = {value["user_id"] for _, value in await events_in(broker, process.topic)}
            return told == {account.user_id for account in others}

        await eventually(others_arrived, 40)
        await configure_topic(broker.bootstrap_servers, process.topic, **{"max.message.bytes": "1000000"})
        await until_published(process, PUBLISHED_S)
        users = [value["user_id"] for _, value in await events_in(broker, process.topic)]
        assert sorted(users) == sorted([large.user_id, *(account.user_id for account in others)])


async def test_events_of_topics_that_are_not_there_wait_for_them(parts: FaultStores, broker: KafkaBroker) -> None:
    settings = kafka_settings(broker)
    async with parts.services.running(**settings) as process, process.api() as api:
        client = await new_service_client(process, api)
        matrix = await new_request_matrix(api, client)
        await eventually(lambda: process.lines("topic_unusable"))
        await matrix.play(WORKS)
        assert matrix.slow(KAFKA_SLOW_S) == 0
        await create_topics(broker.bootstrap_servers, topic_names(process))
        await until_published(process, PUBLISHED_S)
        await assert_all_told(process, broker)


@pytest.mark.parametrize("fault", ["missing", "forbidden", "hidden"])
async def test_a_topic_that_takes_nothing_holds_up_no_other_and_gets_its_events_in_order_when_it_does(
    parts: FaultStores, broker: KafkaBroker, fault: str
) -> None:
    settings = kafka_settings(broker)
    bad = settings["AUTHD_KAFKA_EVENTS_TOPIC"]
    await create_topics(
        broker.bootstrap_servers,
        [value for name, value in settings.items() if name.endswith("_TOPIC") and value != bad],
    )
    if fault != "missing":
        await create_topics(broker.bootstrap_servers, [bad])
        await forbid_writing(broker, bad, is_hidden=fault == "hidden")
    async with parts.services.running(**settings) as process, process.api() as api:
        accounts = [await api.new_account()]
        await eventually(lambda: process.lines("topic_unusable"))
        accounts += [await api.new_account() for _ in range(20)]
        for account in accounts:
            pair = await api.new_session(account)
            assert (await api.logout(pair["access_token"])).status_code == 200

        async def others_arrived() -> bool:
            waiting = await process.query("SELECT DISTINCT channel FROM outbox")
            return [row["channel"] for row in waiting] == ["events"]

        await eventually(others_arrived, 40)
        assert {line["topic"] for line in process.lines("topic_unusable")} == {bad}
        assert not process.lines("lane_given_up")
        assert f'authd_kafka_topic_unusable{{topic="{bad}"}} 1.0' in (await api.get("/metrics")).text
        told = await events_in(broker, process.topic)
        assert sorted(value["user_id"] for _, value in told) == sorted(account.user_id for account in accounts)

        await (create_topics(broker.bootstrap_servers, [bad]) if fault == "missing" else allow_writing(broker, bad))
        await until_published(process, PUBLISHED_S)
        await assert_all_told(process, broker)
        usable = await eventually(lambda: process.lines("topic_usable"))
        assert [line["topic"] for line in usable] == [bad]
        assert f'authd_kafka_topic_unusable{{topic="{bad}"}} 0.0' in (await api.get("/metrics")).text
        of_postgres = [
            (value["user_id"], kind)
            for kind, value in await events_in(broker, bad)
            if kind in ("user.registered", "sessions.ended")
        ]
        for account in accounts:
            kinds = [kind for user_id, kind in of_postgres if user_id == account.user_id]
            assert kinds == ["user.registered", "sessions.ended"]
