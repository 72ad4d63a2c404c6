"""Brings the schema up to date: numbered SQL files, forward only, one transaction each, under an advisory lock."""

from importlib.resources import files

import anyio
import asyncpg

from authd.config import Settings
from authd.infra.postgres.database import limit_session, milliseconds

#: Any number that no other user of the database takes: replicas that start together migrate one after the other.
ADVISORY_LOCK = 0x61757468
MIGRATE_TIMEOUT_S = 300


class SchemaTooNew(Exception):
    """The database was migrated by a newer authd than this one."""


#: Postgres is unavailable, starting, has no such database yet, or somebody's transaction is in the way: worth another
#: try.
NOT_READY = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.LockNotAvailableError,
)
#: What `migrate` raises. ClientConfigurationError: a parameter of AUTHD_DATABASE_URL, such as an unknown sslmode.
MIGRATION_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.ClientConfigurationError, SchemaTooNew)


async def migrate(settings: Settings) -> list[str]:
    """Run the migrations that the database lacks and return their file names.

    :raises SchemaTooNew: when the database knows a migration that this authd does not.
    :raises OSError, asyncpg.PostgresError: when Postgres is unavailable or refuses.
    """
    with anyio.fail_after(MIGRATE_TIMEOUT_S):
        connection = await asyncpg.connect(settings.database_url.reveal(), timeout=settings.database_timeout_s)
        try:
            await limit_session(connection, settings.database_timeout_s)
            # Its statements are long, and it waits for the migrators before it. But one that freezes, between two
            # statements or two transactions, holds up no start for longer than the silence that others may keep.
            await connection.execute(
                f"SET statement_timeout = {milliseconds(MIGRATE_TIMEOUT_S)}; SET lock_timeout = 0;"
                f"SET idle_session_timeout = {milliseconds(settings.database_timeout_s)}"
            )
            await connection.execute("SELECT pg_advisory_lock($1)", ADVISORY_LOCK)
            # All who use a table queue behind a migration that waits for it.
            await connection.execute(f"SET lock_timeout = {milliseconds(settings.database_timeout_s / 3)}")
            return await _run_missing(connection)
        finally:
            await connection.close(timeout=settings.database_timeout_s)


async def _run_missing(connection: asyncpg.Connection) -> list[str]:
    exists = await connection.fetchval("SELECT to_regclass('authd_migrations') IS NOT NULL")
    if not exists:
        # Asked first: a role that may not create tables can serve a database that is up to date.
        await connection.execute(
            "CREATE TABLE authd_migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
    done = {row["name"] for row in await connection.fetch("SELECT name FROM authd_migrations")}
    known = {file.name: file for file in (files(__package__) / "migrations").iterdir() if file.name.endswith(".sql")}
    if done - known.keys():
        raise SchemaTooNew(f"The database has migrations that this authd does not know: {sorted(done - known.keys())}")
    missing = sorted(known.keys() - done)
    for name in missing:
        async with connection.transaction():
            await connection.execute(known[name].read_text("utf-8"))
            await connection.execute("INSERT INTO authd_migrations (name) VALUES ($1)", name)
    return missing
