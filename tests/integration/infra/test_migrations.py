"""Each migration from any version, rows kept; schema.sql is what they make together."""

import json
import re
import secrets
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import asyncpg
import pytest
from blockbuster import BlockBuster
from support.deployment import together
from support.stores import client_url

from authd.config import Secret, Settings
from authd.embedded import PostgresServer
from authd.infra.postgres.migrate import SchemaTooNew, migrate

NAMES = sorted(
    file.name for file in (files("authd.infra.postgres") / "migrations").iterdir() if file.name.endswith(".sql")
)
HEADER = re.compile(r"^-- (expand|contract: .+\.|expand: .+\.)$")
#: What some statement of an older authd would stumble over.
CONTRACTING = re.compile(
    r"\bDROP\s+(?:TABLE|COLUMN|FUNCTION|TYPE)\b|\bRENAME\b|\bSET\s+NOT\s+NULL\b|\bALTER\s+COLUMN\s+\w+\s+TYPE\b"
    r"|\bADD\s+COLUMN\s+\w+\s+\w+\s+NOT\s+NULL\s*[,;]",
    re.IGNORECASE,
)
#: A default of these makes another value in each database.
VOLATILE = ("now()", "gen_random_uuid()")

#: One query for each kind of thing that a schema has. Rows are compared as they are.
CATALOG = {
    "relations": """
        SELECT relname, relkind, relpersistence, relrowsecurity, reloptions
        FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1""",
    "columns": """
        SELECT c.relname, row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum) AS place, a.attname,
               format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull, a.attidentity, a.attgenerated,
               a.attcollation, pg_get_expr(d.adbin, d.adrelid) AS default_value
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm')
          AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1, 2""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2""",
    "indexes": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    "sequences": """
        SELECT sequencename, data_type, start_value, min_value, max_value, increment_by, cycle
        FROM pg_sequences WHERE schemaname = 'public' ORDER BY 1""",
    "functions": """
        SELECT proname, pg_get_functiondef(oid) FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND prokind IN ('f', 'p') ORDER BY 1, 2""",
    "triggers": """
        SELECT tgrelid::regclass::text, tgname, pg_get_triggerdef(oid), tgenabled FROM pg_trigger
        WHERE NOT tgisinternal ORDER BY 1, 2""",
    "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'public' ORDER BY 1",
    "types": """
        SELECT typname, typtype FROM pg_type
        WHERE typnamespace = 'public'::regnamespace AND typtype IN ('d', 'e', 'r') ORDER BY 1""",
    "policies": "SELECT tablename, policyname, cmd, qual, with_check FROM pg_policies ORDER BY 1, 2",
    "extensions": "SELECT extname FROM pg_extension ORDER BY 1",
}


def migration_text(name: str) -> str:
    return (files("authd.infra.postgres") / "migrations" / name).read_text("utf-8")


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


#: Rows for every table of the first version, as the authd of then wrote them; two tables bring theirs.
FIRST_ROWS = """
INSERT INTO users (username, username_key, full_name, password_hash, version, epoch, disabled_at)
SELECT n || '@Example.org', n || '@example.org', 'Number ' || n, '$2b$04$' || n, n, n, CASE n WHEN 3 THEN now() END
FROM generate_series(1, 3) n;
UPDATE revocation_heads SET last_number = 1 WHERE bucket BETWEEN 1 AND 4;
-- The user of the fourth is gone.
INSERT INTO revocations (bucket, number, user_id, session_id, epoch, reason, expires_at)
SELECT n, 1, n, CASE n % 2 WHEN 0 THEN decode(repeat('ab', 16), 'hex') END, CASE n % 2 WHEN 1 THEN n END, 'logout',
       now()
FROM generate_series(1, 4) n;
INSERT INTO keys (purpose, kid, sealed, active_at) VALUES
    ('mac', 'k1', 'sealed', now()), ('EdDSA', 'k2', 'sealed', now());
INSERT INTO outbox (lane, user_id, event_id, channel, type, version, value)
SELECT n, n, gen_random_uuid(), 'user_registered', 'user.registered', 1, '{}' FROM generate_series(1, 3) n;
"""


async def rows_by_table(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table but the list of migrations, in the order of its first column."""
    tables = await run(
        settings, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'authd_migrations'"
    )
    return {
        table: [
            json.loads(row["row"])
            for row in await run(settings, f"SELECT to_jsonb(t)::text AS row FROM {table} t ORDER BY 1")
        ]
        for table in sorted(row["tablename"] for row in tables)
    }


async def test_a_filled_database_of_the_first_version_keeps_its_rows(empty: Settings) -> None:
    connection = await asyncpg.connect(empty.database_url.reveal())
    await connection.execute(
        "CREATE TABLE authd_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())"
    )
    await connection.execute(migration_text(NAMES[0]))
    await connection.execute("INSERT INTO authd_migrations VALUES ($1)", NAMES[0])
    await connection.execute(FIRST_ROWS)
    await connection.close()
    before = await rows_by_table(empty)
    assert all(before.values()), "a table of the first version has no row"

    assert await migrate(empty) == NAMES[1:]
    after = await rows_by_table(empty)
    for table, rows in before.items():
        columns = rows[0].keys()
        kept = [{name: row[name] for name in columns} for row in after[table]]
        assert sorted(map(str, kept)) == sorted(map(str, rows)), table

    assert all(user["password_version"] == 1 for user in after["users"])
    incarnations = {user["id"]: user["incarnation"] for user in after["users"]}
    assert len(set(incarnations.values())) == 3 and all(0 < number < 2**32 for number in incarnations.values())
    assert {row["user_id"]: row["incarnation"] for row in after["revocations"]} == incarnations | {4: 0}
    assert {row["announced_until"] for row in after["revocations"]} == {None}
    for row in after["outbox"]:
        assert [row[name] for name in ("attempts", "message_key", "last_error", "retry_at", "parked_at")] == [
            0,
            *[None] * 4,
        ]
    assert len(after["deployment_state"]) == 1 and after["clients"] == []

    # It goes on where it was: the next ending has the next number, the next user an id of its own.
    await run(empty, "DELETE FROM users WHERE id = 1")
    [row] = await run(empty, "SELECT number, epoch, incarnation FROM revocations WHERE reason = 'user_deleted'")
    assert tuple(row) == (2, 2, incarnations[1])
    [row] = await run(
        empty,
        "INSERT INTO users (username, username_key, full_name, password_hash) VALUES ('x', 'x', 'x', 'x') RETURNING id",
    )
    assert row["id"] == 4


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


async def dump(connection: asyncpg.Connection) -> dict[str, list[tuple[object, ...]]]:
    """Return every definition, and every row but for what differs in each database."""
    found = {kind: [tuple(row) for row in await connection.fetch(query)] for kind, query in CATALOG.items()}
    volatile: dict[str, list[str]] = {str(name): [] for name, kind, *_ in found["relations"] if kind == b"r"}
    for table, _, column, *_, default in found["columns"]:
        if default in VOLATILE:
            volatile[str(table)].append(str(column))
    del volatile["authd_migrations"]  # which of them ran is not the schema
    for table, columns in volatile.items():
        rows = await connection.fetch(f'SELECT (to_jsonb(t) - $1::text[])::text FROM "{table}" t ORDER BY 1', columns)
        found[f"rows of {table}"] = [tuple(json.loads(row[0]).items()) for row in rows]
    return found


async def test_the_schema_file_is_what_the_migrations_make(empty: Settings, postgres_server: PostgresServer) -> None:
    await migrate(empty)
    connection = await asyncpg.connect(empty.database_url.reveal())
    migrated = await dump(connection)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.execute((files("authd.infra.postgres") / "schema.sql").read_text("utf-8"))
    written = await dump(connection)
    await connection.close()
    for kind, rows in migrated.items():
        assert written[kind] == rows, kind
    assert written.keys() == migrated.keys()
    assert len(migrated["rows of revocation_heads"]) == 256 and migrated["triggers"] and migrated["functions"]


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE users ADD COLUMN more text",
        "ALTER TABLE users ALTER COLUMN epoch SET DEFAULT 2",
        "ALTER TABLE users ALTER COLUMN full_name DROP NOT NULL",
        "ALTER TABLE keys DROP CONSTRAINT keys_kid_key",
        "DROP INDEX outbox_retry",
        "DROP TRIGGER user_deleted ON users",
        "ALTER FUNCTION end_sessions_of_deleted_user RESET search_path",
        "DELETE FROM outbox_lanes WHERE lane = 7",
        "CREATE VIEW everybody AS SELECT * FROM users",
    ],
)
async def test_the_comparison_sees_each_kind_of_difference(empty: Settings, change: str) -> None:
    await migrate(empty)
    connection = await asyncpg.connect(empty.database_url.reveal())
    before = await dump(connection)
    await connection.execute(change)
    assert await dump(connection) != before
    await connection.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_migration_says_whether_an_older_authd_can_go_on_running(name: str, no_blocking: BlockBuster) -> None:
    """`expand`: every statement of the authd before it still works. `contract`: not so, and why."""
    text = migration_text(name)
    [header] = re.findall(HEADER, text.splitlines()[0]) or [None]
    assert header, f"{name} begins with neither `-- expand` nor `-- contract: <why>.`"
    statements = re.sub(r"--.*", "", text)
    if header.startswith("expand"):
        assert CONTRACTING.findall(statements) == []


def test_the_last_contracting_migration_is_seen_as_such() -> None:
    assert [name for name in NAMES if CONTRACTING.search(migration_text(name))] == ["0005_incarnations.sql"]
