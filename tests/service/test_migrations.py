import secrets
from collections.abc import AsyncIterator
from importlib.resources import files

import asyncpg
import pytest
from blockbuster import BlockBuster
from service.world import client_url, together

from authd.config import Secret, Settings
from authd.embedded import PostgresServer
from authd.infra.postgres.migrate import SchemaTooNew, migrate

NAMES = sorted(
    file.name for file in (files("authd.infra.postgres") / "migrations").iterdir() if file.name.endswith(".sql")
)


@pytest.fixture
async def empty(postgres_server: PostgresServer, no_blocking: BlockBuster) -> AsyncIterator[Settings]:
    """The settings of an empty database."""
    no_blocking.deactivate()  # migrations run before the service does
    name = f"migrations_{secrets.token_hex(8)}"
    url = client_url(await postgres_server.create_database(name))
    yield Settings(database_url=Secret(url), redis_url=Secret("-"), secret=Secret("-"))
    await postgres_server.drop_database(name)


async def run(settings: Settings, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(settings.database_url.reveal())
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


async def test_an_empty_database_gets_every_migration_in_order(empty: Settings) -> None:
    assert await migrate(empty) == NAMES
    assert len(NAMES) > 0
    assert [
        row["name"] for row in await run(empty, "SELECT name FROM authd_migrations ORDER BY applied_at, name")
    ] == NAMES
    assert (await run(empty, "SELECT count(*) FROM revocation_heads"))[0]["count"] == 256


async def test_a_second_run_does_nothing(empty: Settings) -> None:
    await migrate(empty)
    before = await run(empty, "SELECT * FROM authd_migrations")
    assert await migrate(empty) == []
    assert await run(empty, "SELECT * FROM authd_migrations") == before


async def test_replicas_that_start_together_run_each_migration_once(empty: Settings) -> None:
    async def start() -> list[str]:
        return await migrate(empty)

    runs = await together(start, start, start)
    assert sorted(runs) == [[], [], NAMES]


async def test_users_and_endings_of_before_get_their_incarnation(empty: Settings) -> None:
    connection = await asyncpg.connect(empty.database_url.reveal())
    await connection.execute(
        "CREATE TABLE authd_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())"
    )
    for name in [name for name in NAMES if name < "0005"]:
        await connection.execute((files("authd.infra.postgres") / "migrations" / name).read_text("utf-8"))
        await connection.execute("INSERT INTO authd_migrations VALUES ($1)", name)
    await connection.execute(
        "INSERT INTO users (username, username_key, full_name, password_hash)"
        " SELECT n::text, n::text, '', '' FROM generate_series(1, 3) n;"
        "INSERT INTO revocations (bucket, number, user_id, epoch, reason, expires_at)"
        " SELECT n, 1, n, 2, 'logout', now() FROM generate_series(1, 4) n"
    )
    await connection.close()
    assert await migrate(empty) == [name for name in NAMES if name >= "0005"]
    users = {row["id"]: row["incarnation"] for row in await run(empty, "SELECT id, incarnation FROM users")}
    assert len(set(users.values())) == 3 and all(0 < incarnation < 2**32 for incarnation in users.values())
    rows = await run(empty, "SELECT user_id, incarnation FROM revocations")
    # The user of the fourth is gone.
    assert {row["user_id"]: row["incarnation"] for row in rows} == users | {4: 0}


async def test_a_database_of_a_newer_authd_is_left_alone(empty: Settings) -> None:
    await migrate(empty)
    await run(empty, "INSERT INTO authd_migrations (name) VALUES ('9999_from_the_future.sql')")
    await run(empty, f"DELETE FROM authd_migrations WHERE name = '{NAMES[-1]}'")
    with pytest.raises(SchemaTooNew, match="9999_from_the_future"):
        await migrate(empty)
    names = [row["name"] for row in await run(empty, "SELECT name FROM authd_migrations")]
    assert NAMES[-1] not in names


async def test_a_migration_that_fails_leaves_nothing_behind(empty: Settings) -> None:
    await run(empty, "CREATE TABLE outbox ()")
    with pytest.raises(asyncpg.DuplicateTableError):
        await migrate(empty)
    assert (await run(empty, "SELECT to_regclass('users') AS users"))[0]["users"] is None
    await run(empty, "DROP TABLE outbox")
    assert await migrate(empty) == NAMES


async def test_a_role_that_may_only_read_and_write_can_start_on_a_migrated_database(
    empty: Settings, postgres_server: PostgresServer
) -> None:
    await migrate(empty)
    role = f"app_{secrets.token_hex(4)}"
    await run(empty, f"CREATE ROLE {role} LOGIN")
    await run(empty, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    url = empty.database_url.reveal().replace("postgres:unused@", f"{role}:unused@")
    assert await migrate(Settings(database_url=Secret(url), redis_url=Secret("-"), secret=Secret("-"))) == []
    await run(empty, f"DROP OWNED BY {role}")
    await run(empty, f"DROP ROLE {role}")


async def test_the_advisory_lock_is_free_after_a_run(empty: Settings) -> None:
    await migrate(empty)
    assert await run(empty, "SELECT FROM pg_locks WHERE locktype = 'advisory'") == []
