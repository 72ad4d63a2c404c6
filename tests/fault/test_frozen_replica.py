"""A replica that is frozen inside a transaction, as by a pause of its machine: SIGSTOP, with its locks held. What it
holds up is free again within a stated time, with nobody's help.
"""

import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import asyncpg
import httpx
import psutil
import pytest
from support.faults import PUBLISHED_S, FaultStores, assert_dead, away, retried, until_ready
from support.kafka import create_topics, events_in, topics
from support.process import ServiceProcess
from support.services import until_published
from support.waiting import eventually

from authd.embedded import KafkaBroker
from authd.events.publisher import LANE_SEND_S, SWEEP_S
from authd.infra.kafka.producer import END_TIMEOUT_S

pytestmark = pytest.mark.timeout(120)

#: Long enough to freeze a replica while it waits for a lock: it does so for a third of this.
DATABASE_TIMEOUT_S = 6.0
#: docs/settings.md: what a frozen replica had begun is over within twice the deadline.
RELEASED_WITHIN_S = 2 * DATABASE_TIMEOUT_S
KAFKA_TIMEOUT_S, LANE_DATABASE_TIMEOUT_S = 6.0, 1.2
LANE_RELEASED_WITHIN_S = LANE_SEND_S + KAFKA_TIMEOUT_S + 2 * END_TIMEOUT_S + 2 * LANE_DATABASE_TIMEOUT_S


@asynccontextmanager
async def frozen(process: ServiceProcess) -> AsyncIterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


async def transactions_of(process: ServiceProcess, state: str, query: str) -> list[int]:
    """The backends of this process that are in such a state after such a statement."""
    ports = {connection.laddr.port for connection in psutil.Process(process.pid).net_connections("tcp")}
    rows = await process.query(
        "SELECT pid, client_port FROM pg_stat_activity WHERE datname = current_database()"
        " AND (state = $1 OR wait_event_type = $1) AND query LIKE $2",
        state,
        query,
    )
    return [row["pid"] for row in rows if row["client_port"] in ports]


async def test_a_replica_frozen_in_a_logout_keeps_nobody_else_from_logging_out(parts: FaultStores) -> None:
    settings = {"AUTHD_DATABASE_TIMEOUT_S": str(DATABASE_TIMEOUT_S)}
    async with (
        parts.services.running(**settings) as stopped,
        parts.services.replica(stopped) as healthy,
        stopped.api() as api,
        healthy.api() as other,
    ):
        account = await api.new_account()
        pair = await api.new_session(account)
        # A neighbour: another user of the same bucket, with the same password.
        neighbour = f"{uuid.uuid4().hex}@example.com"
        await stopped.query(
            "INSERT INTO users (id, username, username_key, full_name, password_hash) OVERRIDING SYSTEM VALUE"
            " SELECT id + 256, $2, $2, '', password_hash FROM users WHERE id = $1",
            account.user_id,
            neighbour,
        )
        login = await other.login(neighbour, account.password)
        assert login.status_code == 200
        held = await asyncpg.connect(stopped.database_url)
        cut: list[httpx.Response] = []

        async def logout() -> None:
            cut.append(await api.logout(pair["access_token"]))

        async with anyio.create_task_group() as group:
            try:
                # Held by hand until the replica is frozen, so that it freezes with the next statement's locks.
                transaction = held.transaction()
                await transaction.start()
                lock = "SELECT FROM revocation_heads WHERE bucket = $1 FOR UPDATE"
                await held.execute(lock, account.user_id % 256)
                group.start_soon(logout)
                await eventually(lambda: transactions_of(stopped, "Lock", "%revocation_heads%"))
                async with frozen(stopped):
                    await transaction.rollback()
                    await eventually(lambda: transactions_of(stopped, "idle in transaction", "%revocation_heads%"))
                    with pytest.raises(asyncpg.LockNotAvailableError):
                        await held.execute(f"{lock} NOWAIT", account.user_id % 256)
                    ended = await retried(lambda: other.logout(login.json()["access_token"]), RELEASED_WITHIN_S)
                    assert ended.status_code == 200
                    # And nobody was refused for it who did not need that lock.
                    assert (await other.new_session(await other.new_account()))["access_token"]
                    assert not healthy.lines("part_away")
            finally:
                await held.close(timeout=5)
        # The frozen replica wakes, knows that its logout did not happen, and serves.
        assert [answer.status_code for answer in cut] == [503]
        await until_ready(stopped)
        assert (await retried(lambda: api.logout(pair["access_token"]))).status_code == 200
        await assert_dead(other, pair)


async def test_a_replica_frozen_in_a_lane_keeps_no_event_for_ever(parts: FaultStores, broker: KafkaBroker) -> None:
    settings = topics(f"t{uuid.uuid4().hex[:12]}") | {
        "AUTHD_DATABASE_TIMEOUT_S": str(LANE_DATABASE_TIMEOUT_S),
        "AUTHD_KAFKA_TIMEOUT_S": str(KAFKA_TIMEOUT_S),
        "AUTHD_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
    }
    await create_topics(
        broker.bootstrap_servers, [value for name, value in settings.items() if name.endswith("_TOPIC")]
    )
    async with (
        parts.services.running(**settings) as stopped,
        parts.services.replica(stopped) as healthy,
        stopped.api() as api,
    ):
        for process in (stopped, healthy):
            async with process.api() as each:

                async def is_connected(each: httpx.AsyncClient = each) -> bool:
                    return bool((await each.get("/readyz")).json()["parts"]["events"])

                await eventually(is_connected)
        async with away(broker, "frozen"):
            account = await api.new_account()
            await eventually(lambda: transactions_of(stopped, "idle in transaction", "%FROM outbox%"), 5)
            stopped.signal(signal.SIGSTOP)
        try:
            assert await stopped.query("SELECT FROM outbox WHERE user_id = $1", account.user_id)
            assert await transactions_of(stopped, "idle in transaction", "%FROM outbox%")
            with anyio.fail_after(LANE_RELEASED_WITHIN_S + 2 * SWEEP_S):
                await until_published(healthy, PUBLISHED_S)
            told = await events_in(broker, healthy.topic)
            assert account.user_id in [value["user_id"] for _, value in told]
        finally:
            stopped.signal(signal.SIGCONT)
        await until_ready(stopped)
