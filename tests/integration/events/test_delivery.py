import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from blockbuster import BlockBuster
from prometheus_client import REGISTRY
from support.kafka import create_topics
from support.relaying import make_event
from support.stores import read_topic
from support.waiting import eventually

from authd.assembly.postgres import PostgresStores
from authd.config import BUCKETS, ConfigError, Settings, parse_settings
from authd.embedded import KafkaBroker, PostgresServer
from authd.events.contract import Event
from authd.events.postgres import LANE_ROWS, Outbox, add_events
from authd.events.publisher import Publisher, PublisherSettings, make_record
from authd.infra.kafka.producer import BrokerAway, KafkaSettings, Producer, RecordRefused
from authd.infra.postgres.database import Database, open_database
from authd.infra.postgres.migrate import migrate

pytestmark = pytest.mark.timeout(120)

ARRIVE_S = 60.0
POLL_S = 0.05
IMPATIENCE_S = 1.0
VALUES = {
    "AUTHD_DATABASE_URL": "postgresql://127.0.0.1:1/authd",
    "AUTHD_REDIS_URL": "redis://127.0.0.1:1",
    "AUTHD_SECRET": "s" * 32,
    "AUTHD_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
}


@pytest.fixture
async def settings(
    postgres_server: PostgresServer, kafka_broker: KafkaBroker, no_blocking: BlockBuster
) -> AsyncIterator[Settings]:
    """A database and a topic of the test's own. Also puts the shared servers right again after it."""
    name = f"delivery_{uuid.uuid4().hex}"
    # With a password and without TLS, else asyncpg looks for files of the user at each connection.
    url = (await postgres_server.create_database(name)).replace("postgres@", "postgres:unused@") + "?sslmode=disable"
    kafka = {
        "AUTHD_KAFKA_BOOTSTRAP_SERVERS": kafka_broker.bootstrap_servers,
        "AUTHD_KAFKA_REGISTRATION_TOPIC": name,
    }
    settings = parse_settings(VALUES | kafka | {"AUTHD_DATABASE_URL": url, "AUTHD_DATABASE_TIMEOUT_S": "2"})
    no_blocking.deactivate()  # migrate reads its files before the service is ready
    await migrate(settings)
    no_blocking.activate()
    yield settings
    await back(postgres_server)
    await back(kafka_broker)
    await postgres_server.drop_database(name)


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    """For tests in which a broker is away. The others are not to take a slow machine for that."""
    return msgspec.structs.replace(settings, kafka_timeout_s=IMPATIENCE_S)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with open_database(settings) as database:
        yield database


async def test_a_registration_arrives_as_its_contract_says(settings: Settings, database: Database) -> None:
    async with publisher(settings) as publishing:
        user = await PostgresStores(settings, database).creation.create(
            "Ann@Example.org", "ann@example.org", "", "hash"
        )
        assert user is not None
        publishing.offer(user.id % BUCKETS)
        await until_waiting(database, 0)
    [record] = await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_registration_topic)
    assert json.loads(record.value) == {
        "user_id": user.id,
        "username": "Ann@Example.org",
        "full_name": "",
        "created_at": user.created_at.isoformat(),
    }
    assert record.key == b"new_user"
    headers = dict(record.headers)
    assert headers.keys() == {"event_id", "event_type", "schema_version"}
    assert uuid.UUID(headers["event_id"].decode())
    assert (headers["event_type"], headers["schema_version"]) == (b"user.registered", b"1")


async def test_an_offer_is_sent_without_waiting_for_a_sweep(settings: Settings, database: Database) -> None:
    async with publisher(settings, sweep_s=3600) as publishing:
        for number in range(3):
            await add(database, 7, number)
            publishing.offer(7)
            await until_waiting(database, 0)
    assert await numbers_by_user(settings) == {7: [0, 1, 2]}


async def test_two_publishers_keep_each_users_order_and_send_nothing_twice(
    settings: Settings, database: Database
) -> None:
    users, events = range(20), range(40)

    async def commit(user: int, *publishers: Publisher) -> None:
        # Three users to a lane, so that lanes are shared by users and contended by publishers.
        user_id = user // 3 + BUCKETS * (user % 3)
        for number in events:
            await add(database, user_id, number)
            publishers[number % 2].offer(user_id % BUCKETS)

    async with publisher(settings) as one, publisher(settings) as other:
        async with anyio.create_task_group() as group:
            for user in users:
                group.start_soon(commit, user, one, other)
        await until_waiting(database, 0)
    found = await numbers_by_user(settings)
    assert len(found) == len(users)
    assert all(numbers == list(events) for numbers in found.values())


async def test_more_rows_than_one_lane_transaction_takes_all_arrive_in_order(
    settings: Settings, database: Database
) -> None:
    events = range(450)
    for number in events:
        await add(database, 1, number)
    async with publisher(settings):
        await until_waiting(database, 0)
    assert await numbers_by_user(settings) == {1: list(events)}


@pytest.mark.proof
async def test_events_wait_for_a_broker_that_is_not_there_yet(
    impatient: Settings, database: Database, kafka_broker: KafkaBroker
) -> None:
    await kafka_broker.stop()
    async with publisher(impatient) as publishing:
        for user in range(5):
            await add(database, user, 0)
            publishing.offer(user)
        await until_waiting(database, 5)
        await kafka_broker.start()
        await until_waiting(database, 0)
    assert await numbers_by_user(impatient) == {user: [0] for user in range(5)}


@pytest.mark.proof
@pytest.mark.parametrize("fault", ["pause", "kill", "stop"])
async def test_every_event_arrives_in_order_over_a_fault_of_the_broker(
    impatient: Settings, database: Database, kafka_broker: KafkaBroker, fault: str
) -> None:
    users = range(12)
    counts = dict.fromkeys(users, 0)
    is_over = anyio.Event()

    async def commit(user: int, *publishers: Publisher) -> None:
        while not is_over.is_set():
            await add(database, user, counts[user])
            publishers[counts[user] % 2].offer(user)
            counts[user] += 1
            await anyio.sleep(POLL_S)

    async with publisher(impatient) as one, publisher(impatient) as other, anyio.create_task_group() as group:
        for user in users:
            group.start_soon(commit, user, one, other)
        await eventually(lambda: min(counts.values()) >= 5)
        await getattr(kafka_broker, fault)()
        await anyio.sleep(3 * IMPATIENCE_S)
        await back(kafka_broker)
        after = min(counts.values())
        await eventually(lambda: min(counts.values()) >= after + 5)
        is_over.set()
        await until_waiting(database, 0)
    assert await first_deliveries(impatient) == {user: list(range(count)) for user, count in counts.items()}
    # Nor does a repeated event arrive behind a later one of its user.
    assert all(numbers == sorted(numbers) for numbers in (await numbers_by_user(impatient)).values())


async def test_a_row_leaves_the_outbox_only_when_acknowledged(
    impatient: Settings, database: Database, kafka_broker: KafkaBroker
) -> None:
    async with publisher(impatient) as publishing:
        await add(database, 1, 0)
        publishing.offer(1)
        await until_waiting(database, 0)
        await kafka_broker.pause()
        failures = failed("broker_away")
        await add(database, 1, 1)
        publishing.offer(1)
        await eventually(lambda: failed("broker_away") > failures)
        assert (await Outbox(database).backlog()).events == 1
        await kafka_broker.resume()
        await until_waiting(database, 0)
    assert await first_deliveries(impatient) == {1: [0, 1]}


@pytest.mark.proof
@pytest.mark.parametrize("is_killed", [False, True], ids=["frozen", "killed"])
async def test_postgres_away_loses_nothing(
    impatient: Settings, database: Database, postgres_server: PostgresServer, is_killed: bool
) -> None:
    async with publisher(impatient) as publishing:
        for user in range(5):
            await add(database, user, 0)
        await (postgres_server.kill() if is_killed else postgres_server.pause())
        failures = failed("postgres_away")
        publishing.offer(0)
        await eventually(lambda: failed("postgres_away") > failures)
        await back(postgres_server)
        await until_waiting(database, 0)
    assert await first_deliveries(impatient) == {user: [0] for user in range(5)}


async def test_a_refused_event_holds_up_its_user_and_nobody_else(
    settings: Settings, database: Database, kafka_broker: KafkaBroker
) -> None:
    await create_topics(
        settings.kafka_bootstrap_servers[0], [settings.kafka_registration_topic], **{"max.message.bytes": "2000"}
    )
    poisoned, *others = range(1, 1 + 31 * BUCKETS, BUCKETS)  # in one lane, and in one batch for Kafka
    await add(database, poisoned, 0)
    await add(database, poisoned, 1, padding=5000)
    for number in range(2, LANE_ROWS):
        await add(database, poisoned, number)
    for user in others:
        for number in range(3):
            await add(database, user, number)
    refused = failed("refused")
    async with publisher(settings, retry_first_s=3600):
        await until_waiting(database, LANE_ROWS - 1)
        assert failed("refused") - refused == 1
    assert await first_deliveries(settings) == {poisoned: [0], **{user: [0, 1, 2] for user in others}}


async def test_an_event_of_an_unknown_channel_waits_for_a_newer_replica(settings: Settings, database: Database) -> None:
    newer = msgspec.structs.replace(numbered(1, 0), channel="from-the-future")
    async with database.transaction() as connection:
        await add_events(connection, [newer])
    await add(database, 1 + BUCKETS, 0)
    async with publisher(settings):
        await until_waiting(database, 1)
    assert await numbers_by_user(settings) == {1 + BUCKETS: [0]}


async def test_a_drained_publisher_has_sent_what_was_offered(settings: Settings, database: Database) -> None:
    async with publisher(settings) as publishing:
        for user in range(50):
            await add(database, user, 0)
            publishing.offer(user)
        with anyio.fail_after(15):
            await publishing.drain()
        assert (await Outbox(database).backlog()).events == 0


async def test_a_publisher_drained_while_the_broker_is_away_returns_at_once(
    impatient: Settings, database: Database, kafka_broker: KafkaBroker
) -> None:
    await kafka_broker.kill()
    await add(database, 1, 0)
    async with publisher(impatient) as publishing:
        publishing.offer(1)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(1):
            await publishing.drain()
    assert (await Outbox(database).backlog()).events == 1


async def test_a_send_without_an_answer_ends_its_producer_before_it_raises(
    impatient: Settings, kafka_broker: KafkaBroker
) -> None:
    await create_topics(impatient.kafka_bootstrap_servers[0], [impatient.kafka_registration_topic])
    others = asyncio.all_tasks()
    async with used_producer(impatient) as send:
        await kafka_broker.kill()
        with pytest.raises(BrokerAway), anyio.fail_after(3 * IMPATIENCE_S):
            await send(numbered(1, 1))
    # Nothing of aiokafka is left that could still send the record.
    await anyio.wait_all_tasks_blocked()
    assert asyncio.all_tasks() - others == set()
    await kafka_broker.start()
    assert await numbers_by_user(impatient) == {1: [0]}


async def test_a_topic_that_nobody_can_be_asked_about_is_not_said_to_be_missing(
    impatient: Settings, kafka_broker: KafkaBroker
) -> None:
    await create_topics(impatient.kafka_bootstrap_servers[0], [impatient.kafka_registration_topic])
    producer = Producer(impatient.section(KafkaSettings))
    async with anyio.create_task_group() as group:
        await group.start(producer.run)
        with anyio.fail_after(ARRIVE_S):
            await producer.wait_connected()
        await kafka_broker.pause()
        with pytest.raises(BrokerAway):
            await producer.send(make_record(numbered(1, 0), f"{impatient.kafka_registration_topic}.other", b"key"))
        assert not await producer.has_topic(impatient.kafka_registration_topic)
        group.cancel_scope.cancel()


async def test_a_cancelled_send_leaves_nothing_behind(impatient: Settings, kafka_broker: KafkaBroker) -> None:
    await create_topics(impatient.kafka_bootstrap_servers[0], [impatient.kafka_registration_topic])
    others = asyncio.all_tasks()
    async with used_producer(impatient) as send:
        await kafka_broker.pause()
        native = asyncio.ensure_future(send(numbered(1, 1)))
        with anyio.move_on_after(0.2):
            await send(numbered(1, 2))
        native.cancel()
        await asyncio.wait([native])
    await anyio.wait_all_tasks_blocked()
    assert asyncio.all_tasks() - others == set()


async def test_a_record_too_large_for_any_broker_is_refused_and_the_producer_stays(settings: Settings) -> None:
    async with used_producer(settings) as send:
        with pytest.raises(RecordRefused):
            await send(numbered(1, 1, padding=2_000_000))
        await send(numbered(1, 2))
    assert await numbers_by_user(settings) == {1: [0, 2]}


@pytest.mark.parametrize("bad", [("BOOTSTRAP_SERVERS", "localhost:port"), ("CA_FILE", "/nowhere/ca.pem")])
async def test_kafka_settings_that_cannot_work_stop_the_start(bad: tuple[str, str]) -> None:
    name = f"AUTHD_KAFKA_{bad[0]}"
    with pytest.raises(ConfigError, match=name):
        Producer(parse_settings(VALUES | {"AUTHD_KAFKA_SECURITY_PROTOCOL": "SSL", name: bad[1]}).section(KafkaSettings))


@asynccontextmanager
async def used_producer(settings: Settings) -> AsyncIterator[Callable[[Event], Coroutine[Any, Any, None]]]:
    """What sends by a producer that has sent event 0 of user 1."""
    producer = Producer(settings.section(KafkaSettings))

    async def send(event: Event) -> None:
        await producer.send(make_record(event, settings.kafka_registration_topic, b"key"))

    async with anyio.create_task_group() as group:
        await group.start(producer.run)
        with anyio.fail_after(ARRIVE_S):
            await producer.wait_connected()
        await send(numbered(1, 0))
        yield send
        group.cancel_scope.cancel()


@asynccontextmanager
async def publisher(settings: Settings, **intervals: float) -> AsyncIterator[Publisher]:
    """A publisher that runs, with a pool and a producer of its own: what a replica has."""
    async with open_database(settings) as database, anyio.create_task_group() as group:
        producer = Producer(settings.section(KafkaSettings))
        publishing = Publisher(settings.section(PublisherSettings), Outbox(database), producer, **intervals)
        await group.start(producer.run)
        await group.start(publishing.run)
        yield publishing
        group.cancel_scope.cancel()


def numbered(user_id: int, number: int, padding: int = 0) -> Event:
    return make_event(user_id, json.dumps({"user_id": user_id, "number": number, "padding": "x" * padding}).encode())


async def add(database: Database, user_id: int, number: int, padding: int = 0) -> None:
    async with database.transaction() as connection:
        await add_events(connection, [numbered(user_id, number, padding)])


async def first_deliveries(settings: Settings) -> dict[int, list[int]]:
    """Each user's numbers without their repetitions."""
    return {user: list(dict.fromkeys(numbers)) for user, numbers in (await numbers_by_user(settings)).items()}


async def numbers_by_user(settings: Settings) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for record in await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_registration_topic):
        value = json.loads(record.value)
        found.setdefault(value["user_id"], []).append(value["number"])
    return found


def failed(reason: str) -> float:
    return REGISTRY.get_sample_value("authd_publish_failures_total", {"reason": reason}) or 0.0


async def back(server: PostgresServer | KafkaBroker) -> None:
    if server.is_running:
        await server.resume()
    else:
        await server.start()


async def until_waiting(database: Database, events: int) -> None:
    async def are_waiting() -> bool:
        return (await Outbox(database).backlog()).events == events

    await eventually(are_waiting)
