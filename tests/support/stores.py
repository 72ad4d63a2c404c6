"""Fixtures: the real stores, started when first asked for, once per run of pytest, and gone at its end.

A missing Java or Maven skips on a laptop and fails where CI is set: a green build has run everything.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from support.lock_order import watch_lock_order

from authd.config import Secret, Settings
from authd.embedded import KafkaBroker, PostgresServer, RedisCluster, RedisServer, fetch_libs, find_java_and_maven
from authd.infra.postgres.migrate import migrate

READ_S = 60.0


@pytest.fixture(scope="session")
def stores_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="authd-tests-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
async def postgres_server(anyio_backend: object, stores_folder: Path) -> AsyncIterator[PostgresServer]:
    async with PostgresServer(stores_folder / "postgres", durable=False) as server:
        yield server


@pytest.fixture(scope="session")
async def redis_server(anyio_backend: object, stores_folder: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(stores_folder / "redis", durable=False) as server:
        yield server


@pytest.fixture(scope="session")
async def redis_cluster(anyio_backend: object, stores_folder: Path) -> AsyncIterator[RedisCluster]:
    async with RedisCluster(stores_folder / "redis-cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
async def kafka_broker(anyio_backend: object, stores_folder: Path) -> AsyncIterator[KafkaBroker]:
    require_kafka()
    async with KafkaBroker(stores_folder / "kafka", await fetch_libs()) as broker:
        yield broker


def require_kafka() -> None:
    if missing := find_java_and_maven().missing:
        sentence = f"the real Kafka needs {missing}"
        if os.environ.get("CI"):
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence)


async def read_topic(bootstrap_servers: str, topic: str) -> list[ConsumerRecord]:
    """All that the topic, of one partition, holds now."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest")
    partition = TopicPartition(topic, 0)
    records: list[ConsumerRecord] = []
    with anyio.fail_after(READ_S):
        async with consumer:
            consumer.assign([partition])
            end = (await consumer.end_offsets([partition]))[partition]
            while await consumer.position(partition) < end:
                for batch in (await consumer.getmany(partition, timeout_ms=500)).values():
                    records += batch
    return records


@pytest.fixture(scope="session")
async def database_template(postgres_server: PostgresServer) -> str:
    return await make_template(postgres_server)


async def make_template(postgres: PostgresServer) -> str:
    """Make a migrated, empty database that watches the order of locks. Return its name."""
    name = "template_of_tests"
    url = client_url(await postgres.create_database(name))
    await migrate(Settings(database_url=Secret(url), redis_url=Secret("-"), secret=Secret("-")))
    await watch_lock_order(url)
    return name


def client_url(url: str) -> str:
    # With a password and without TLS, else asyncpg looks for files of the user at each connection.
    return url.replace("postgres@", "postgres:unused@") + "?sslmode=disable"
