"""The pool over a real Postgres: what its server ends by itself, and which errors mean that it is unavailable."""

import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from blockbuster import BlockBuster
from support.deployment import MakeWorld, unguarded
from support.waiting import eventually

import authd
from authd.config import Secret, Settings
from authd.errors import Unavailable
from authd.events.postgres import Outbox
from authd.infra.observe.health import Health
from authd.infra.postgres.database import Database, open_database
from authd.infra.postgres.migrate import ADVISORY_LOCK, migrate
from authd.infra.postgres.queries import load_queries
from authd.infra.tasks.breaker import FAILURES_MAX

TIMEOUT_S = 1.5
POOL = 4

AUTHD = Path(authd.__file__).parent


def settings_for(url: str, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "database_url": Secret(url),
        "redis_url": Secret("redis://unused"),
        "secret": Secret("s" * 32),
        "database_timeout_s": TIMEOUT_S,
        "database_pool_max": POOL,
    }
    return Settings(**values | changes)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(settings_for(database_url)) as database:
        yield database


@pytest.fixture
async def operator(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that is not authd's, without its limits."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close(timeout=5)


async def shown(database: Database, *names: str) -> list[str]:
    row = await database.fetch_row("SELECT " + ", ".join(f"current_setting('{name}')" for name in names))
    assert row is not None
    return list(row)


def is_open(database: Database) -> bool:
    """Whether the breaker refuses calls."""
    return database._breaker._failures >= FAILURES_MAX


# What the server ends


async def test_every_connection_has_its_limits_at_every_use_and_none_of_them_is_a_startup_parameter(
    database: Database,
) -> None:
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "tcp_user_timeout")
    # The second and third use follow what a pool does when it gets a connection back.
    for _ in range(3):
        assert await shown(database, *names) == ["500ms", "1200ms", "1500ms", "3000"]
        async with database.transaction() as connection:
            await connection.execute("SET LOCAL lock_timeout = 7")
    assert await shown(database, "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count") == [
        "2",
        "1",
        "3",
    ]
    # pg_settings tells where a value comes from: `client` is a startup parameter.
    sources = await database.fetch("SELECT name FROM pg_settings WHERE source = 'client' ORDER BY name")
    assert {row["name"] for row in sources} <= {"application_name", "client_encoding", "DateStyle", "TimeZone"}


async def test_a_connections_own_socket_has_keepalives(database: Database) -> None:
    async with database.transaction() as connection:
        own = connection._con._transport.get_extra_info("socket")
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000


def test_no_statement_changes_what_a_reset_would_have_to_undo(no_blocking: BlockBuster) -> None:
    """The pool resets nothing between two uses."""
    changes = re.compile(r"\A(SET(?! LOCAL)|LISTEN|PREPARE|DECLARE)\b|pg_(try_)?advisory_lock|set_config\([^)]*false")
    assert changes.search("SET lock_timeout = 1") and changes.search("SELECT pg_advisory_lock(1)")
    with unguarded(no_blocking):
        files = [path for path in AUTHD.rglob("*.sql") if path.parent.name != "migrations"]
        packages = [".".join(["authd", *path.parent.relative_to(AUTHD).parts]) for path in files]
        loaded = [load_queries(package, path.stem) for package, path in zip(packages, files, strict=True)]
        queries = {name: text for queries in loaded for name, text in queries.items()}
    assert len(queries) > 30
    assert {name for name, text in queries.items() if changes.search(re.sub(r"(?m)^--.*\n", "", text).strip())} == set()


async def test_a_silent_transaction_is_ended_and_its_locks_go(database: Database, operator: asyncpg.Connection) -> None:
    """The server's part of a frozen replica, whose own deadline does not run."""
    with pytest.raises(Unavailable) as refused:
        async with database.transaction(timeout_s=60) as connection:
            await connection.execute("SELECT FROM revocation_heads WHERE bucket = 7 FOR UPDATE")
            with anyio.fail_after(30):
                await operator.execute("SELECT FROM revocation_heads WHERE bucket = 7 FOR UPDATE")
            await connection.execute("SELECT")
    assert refused.value.__cause__ is not None
    # One lost connection: the next use has another.
    await database.ping()
    assert not is_open(database)


async def test_a_lane_may_be_silent_for_its_own_time_and_the_limit_of_others_comes_back(database: Database) -> None:
    outbox = Outbox(database)
    idle = "idle_in_transaction_session_timeout"
    for _ in range(2):
        async with outbox.lane(3, 44.0) as lane:
            assert lane is not None
            assert await lane._connection.fetchval(f"SHOW {idle}") == "44s"
    assert await shown(database, idle) == ["1500ms"]


# Busy is not unavailable


async def test_a_lock_or_a_statement_that_takes_too_long_is_busy_and_opens_no_breaker(
    database: Database, operator: asyncpg.Connection
) -> None:
    async with operator.transaction():
        await operator.execute("SELECT FROM revocation_heads WHERE bucket = 7 FOR UPDATE")
        for _ in range(FAILURES_MAX + 1):
            with pytest.raises(Unavailable) as refused:
                await database.fetch("UPDATE revocation_heads SET last_number = 1 WHERE bucket = 7")
            assert refused.value.is_busy
            assert isinstance(refused.value.__cause__, asyncpg.LockNotAvailableError)
    with pytest.raises(Unavailable) as refused:
        await database.fetch("SELECT pg_sleep(60)")
    assert refused.value.is_busy
    assert isinstance(refused.value.__cause__, asyncpg.QueryCanceledError)
    await database.ping()
    assert not is_open(database)


async def test_a_pool_that_is_taken_is_busy_and_health_stays_as_it_was(database: Database) -> None:
    health = Health({"user_store": database.ping}, lambda: True)
    async with AsyncExitStack() as stack:
        for _ in range(POOL):
            await stack.enter_async_context(database.transaction(timeout_s=60))
        for _ in range(FAILURES_MAX + 1):
            with pytest.raises(Unavailable) as refused:
                await database._connection(0.01).__aenter__()
            assert refused.value.is_busy
        await health._probe_all()
        assert health.report().parts["user_store"]
        assert not is_open(database)
        with suppress(Unavailable):  # silent for too long by now
            await stack.aclose()


async def test_with_a_buckets_head_held_its_logouts_are_busy_and_everybody_else_is_served(
    make_world: MakeWorld, operator: asyncpg.Connection
) -> None:
    world = await make_world(database_timeout_s=TIMEOUT_S, database_pool_max=POOL)
    users = [await world.register() for _ in range(2)]
    held, other = users
    async with operator.transaction():
        await operator.execute("SELECT FROM revocation_heads WHERE bucket = $1 FOR UPDATE", held.id % 256)
        outcomes: list[Unavailable] = []
        async with anyio.create_task_group() as group:

            async def logout(end: Callable[[], Any]) -> None:
                with pytest.raises(Unavailable) as refused:
                    await end()
                outcomes.append(refused.value)

            for number in range(10):
                ends = [
                    lambda: world.endings.end_all(held.subject, "logout"),
                    lambda: world.endings.end_sessions(held.subject, [bytes(16)], "logout"),
                ]
                group.start_soon(logout, ends[number % 2])

            async def one_waits_for_the_lock() -> bool:
                return bool(await waiting_for_locks(operator))

            await eventually(one_waits_for_the_lock)
            while len(outcomes) < 10:
                assert await waiting_for_locks(operator) <= 1
                assert await world.users.find(*other.subject) is not None
                row = await world.endings.end_all(other.subject, "logout")
                assert row is not None
                await world.database.ping()
        assert all(outcome.is_busy for outcome in outcomes)
        assert not is_open(world.database)
    assert await world.endings.end_all(held.subject, "logout") is not None


async def waiting_for_locks(operator: asyncpg.Connection) -> int:
    count: int = await operator.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    return count


# Faults are not outages


@pytest.mark.parametrize(
    ("statement", "arguments", "error"),
    [
        ("SELECT $1::int", (), asyncpg.InterfaceError),  # too few arguments
        ("SELECT $1::int", ("text",), asyncpg.DataError),
        ("SELECT nothing", (), asyncpg.UndefinedColumnError),
    ],
)
async def test_a_programming_error_is_raised_as_it_is_and_opens_no_breaker(
    database: Database, statement: str, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    for _ in range(FAILURES_MAX + 1):
        with pytest.raises(error):
            await database.fetch(statement, *arguments)
        with pytest.raises(error):
            async with database.transaction() as connection:
                await connection.fetch(statement, *arguments)
    await database.ping()
    assert not is_open(database)


async def test_a_connection_that_is_lost_inside_a_transaction_is_unavailable(
    database: Database, operator: asyncpg.Connection
) -> None:
    for _ in range(FAILURES_MAX):
        with pytest.raises(Unavailable) as refused:
            async with database.transaction() as connection:
                pid = await connection.fetchval("SELECT pg_backend_pid()")
                await operator.execute("SELECT pg_terminate_backend($1)", pid)

                async def is_noticed() -> bool:
                    try:
                        return bool(connection.is_closed())
                    except asyncpg.InterfaceError:
                        return True

                await eventually(is_noticed)
                await connection.fetch("SELECT")
        assert not refused.value.is_busy
    assert is_open(database)


# Migrations


async def test_a_migration_waits_for_no_lock_for_long(
    operator: asyncpg.Connection, database_url: str, no_blocking: BlockBuster
) -> None:
    await operator.execute("DELETE FROM authd_migrations WHERE name >= '0004'")
    async with operator.transaction():
        # As of somebody's long transaction: everybody who reads users would queue behind the migration's lock.
        await operator.execute("LOCK TABLE users IN ACCESS SHARE MODE")
        with unguarded(no_blocking), pytest.raises(asyncpg.LockNotAvailableError):
            await migrate(settings_for(database_url))
    assert await operator.fetchval("SELECT count(*) FROM authd_migrations WHERE name >= '0004'") == 0


async def test_a_migrator_waits_for_another_one_for_longer_than_for_a_lock(
    operator: asyncpg.Connection, database_url: str, no_blocking: BlockBuster
) -> None:
    await operator.execute("SELECT pg_advisory_lock($1)", ADVISORY_LOCK)
    done: list[list[str]] = []

    async def run() -> None:
        done.append(await migrate(settings_for(database_url, database_timeout_s=0.3)))

    with unguarded(no_blocking):
        async with anyio.create_task_group() as group:
            group.start_soon(run)

            async def waits() -> bool:
                return bool(
                    await operator.fetchval(
                        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
                        " AND datname = current_database() AND now() - query_start > interval '0.4 s'"
                    )
                )

            await eventually(waits)
            assert not done
            await operator.execute("SELECT pg_advisory_unlock($1)", ADVISORY_LOCK)
    assert done == [[]]
