import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from anyio import to_thread
from redis.asyncio import Redis
from redis.asyncio import RedisCluster as ClusterClient
from support.waiting import eventually

from authd.embedded import KafkaBroker, PostgresServer, RedisCluster, RedisServer, StoreError, processes
from authd.embedded.processes import is_alive

ORPHANED_S = 10

#: Starts both stores, prints their pids, and waits to be killed. Without the death signal its stores outlive it,
#: as they do on a Mac.
OWNER = """
import sys, anyio
from pathlib import Path
from authd.embedded import PostgresServer, RedisServer, processes

async def main(folder):
    async with PostgresServer(folder / "postgres") as postgres, RedisServer(folder / "redis") as redis:
        print(postgres.pid, redis.pid, flush=True)
        await anyio.sleep_forever()

processes.DEATH_SIGNAL = int(sys.argv[2])
anyio.run(main, Path(sys.argv[1]))
"""


async def test_postgres_keeps_its_data_and_port_over_stop_and_kill(tmp_path: Path) -> None:
    async with PostgresServer(tmp_path) as server:
        url = server.url
        await _query(server, "CREATE TABLE seen (id int)")
        await server.stop()
        assert not server.is_running
        await server.start()
        await _query(server, "INSERT INTO seen VALUES (7)")
        await server.kill()
        await server.start()
        assert server.url == url
        assert await _query(server, "SELECT id FROM seen") == 7


async def test_postgres_databases_are_cloned_and_dropped(postgres_server: PostgresServer) -> None:
    await postgres_server.create_database("Original")
    await _query(postgres_server, "CREATE TABLE seen AS SELECT 7 AS id", database="Original")
    await postgres_server.create_database("clone", template="Original")
    assert await _query(postgres_server, "SELECT id FROM seen", database="clone") == 7
    await postgres_server.drop_database("clone")
    await postgres_server.drop_database("Original")
    await postgres_server.drop_database("Original")
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await _query(postgres_server, "SELECT 1", database="Original")


async def test_postgres_runs_below_a_folder_only_root_can_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    async with PostgresServer(closed / "postgres", durable=False) as server:
        assert await _query(server, "SELECT 1") == 1
    assert closed.stat().st_mode & 0o777 == 0o700


async def test_a_paused_postgres_answers_nobody_until_it_is_resumed(tmp_path: Path) -> None:
    async with PostgresServer(tmp_path, durable=False) as server:
        connection = await asyncpg.connect(server.url)
        await server.pause()
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT 1", timeout=0.3)
        with pytest.raises(TimeoutError):
            await asyncpg.connect(server.url, timeout=0.3)
        await server.resume()
        assert await _query(server, "SELECT 1") == 1
        await connection.close(timeout=5)


async def test_a_paused_server_can_be_stopped(tmp_path: Path) -> None:
    async with RedisServer(tmp_path) as server:
        await server.pause()
        await server.stop()
        assert not server.is_running


@pytest.mark.parametrize(("durable", "expected"), [(True, b"7"), (False, None)])
async def test_redis_keeps_its_data_only_when_asked(tmp_path: Path, durable: bool, expected: bytes | None) -> None:
    async with RedisServer(tmp_path, durable=durable) as server:
        url = server.url
        async with Redis.from_url(url) as client:
            await client.set("seen", 7)
        await server.kill()
        await server.start()
        assert server.url == url
        async with Redis.from_url(url) as client:
            assert await client.get("seen") == expected


@pytest.mark.parametrize("death_signal", [signal.SIGKILL, 0], ids=["dies with its owner", "outlives its owner"])
async def test_the_stores_of_a_killed_owner_are_replaced(tmp_path: Path, death_signal: int) -> None:
    owner, orphans = await to_thread.run_sync(_start_owner, tmp_path, int(death_signal))
    owner.kill()
    await to_thread.run_sync(owner.communicate)
    try:
        if death_signal and sys.platform == "linux":

            async def are_gone() -> bool:
                return not await to_thread.run_sync(_live, orphans)

            await eventually(are_gone, ORPHANED_S)
        async with PostgresServer(tmp_path / "postgres") as postgres, RedisServer(tmp_path / "redis") as redis:
            assert await _query(postgres, "SELECT 1") == 1
            assert {postgres.pid, redis.pid}.isdisjoint(process.pid for process in orphans)
            assert not await to_thread.run_sync(_live, orphans)
    finally:
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                process.kill()


async def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    async with RedisServer(tmp_path) as server:
        with pytest.raises(StoreError, match="another running process"):
            await RedisServer(tmp_path).start()
        assert server.is_running


def test_no_port_is_given_twice_before_all_were() -> None:
    given = [processes.free_port() for _ in range(len(processes.PORTS) // 2)]
    assert len(set(given)) == len(given)
    # What is taken is passed over.
    with socket.create_server(("127.0.0.1", given[0])):
        assert given[0] not in [processes.free_port() for _ in processes.PORTS]


async def test_a_port_taken_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with RedisServer(tmp_path / "first") as first:
        free = processes.free_port()
        ports = iter([first.port, free])
        monkeypatch.setattr(processes, "free_port", lambda: next(ports))
        async with RedisServer(tmp_path / "second") as second:
            assert second.port == free


async def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, config={"maxmemory-policy": "nonsense"})
    with pytest.raises(StoreError, match="maxmemory-policy"):
        await server.start()
    assert not server.is_running


async def test_a_cluster_of_three_serves_every_slot(redis_cluster: RedisCluster) -> None:
    async with ClusterClient.from_url(redis_cluster.url) as client:
        keys = [f"seen:{number}" for number in range(30)]
        for key in keys:
            await client.set(key, key)
        assert [await client.get(key) for key in keys] == [key.encode() for key in keys]
        assert len(client.get_primaries()) == 3


async def test_a_killed_cluster_node_comes_back(redis_cluster: RedisCluster) -> None:
    await redis_cluster.nodes[1].kill()
    await redis_cluster.nodes[1].start()
    with anyio.fail_after(15):
        await redis_cluster.wait_whole()


async def test_a_record_goes_through_kafka(kafka_broker: KafkaBroker) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka_broker.bootstrap_servers, acks="all") as producer:
        await producer.send_and_wait("embedded", value=b"value", key=b"key")
    consumer = AIOKafkaConsumer(
        "embedded", bootstrap_servers=kafka_broker.bootstrap_servers, auto_offset_reset="earliest"
    )
    async with consumer:
        with anyio.fail_after(20):
            record = await consumer.getone()
    assert (record.key, record.value) == (b"key", b"value")


async def _query(server: PostgresServer, statement: str, database: str = "authd") -> Any:
    connection = await asyncpg.connect(server.database_url(database))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def _start_owner(folder: Path, death_signal: int) -> tuple["subprocess.Popen[str]", list[psutil.Process]]:
    command = [sys.executable, "-c", OWNER, str(folder), str(death_signal)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]


def _live(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if is_alive(process)]
