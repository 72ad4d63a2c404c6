import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import anyio
import pytest
from blockbuster import BlockBuster
from support.deployment import answers
from support.relaying import make_event
from support.waiting import eventually

from authd.config import BUCKETS, Settings, parse_settings
from authd.embedded import PostgresServer
from authd.errors import Unavailable
from authd.events.contract import Event
from authd.events.postgres import LANE_ROWS, Outbox, add_events
from authd.infra.postgres.database import Database, open_database
from authd.infra.postgres.migrate import migrate

LANE_S = 5.0
#: For what must happen at once.
SOON_S = 2.0


@pytest.fixture
async def settings(postgres_server: PostgresServer, no_blocking: BlockBuster) -> AsyncIterator[Settings]:
    name = f"outbox_{uuid.uuid4().hex}"
    # With a password and without TLS, else asyncpg looks for files of the user at each connection.
    url = (await postgres_server.create_database(name)).replace("postgres@", "postgres:unused@") + "?sslmode=disable"
    settings = parse_settings(
        {
            "AUTHD_DATABASE_URL": url,
            "AUTHD_REDIS_URL": "redis://127.0.0.1:1",
            "AUTHD_SECRET": "s" * 32,
            "AUTHD_DATABASE_TIMEOUT_S": "2",
        }
    )
    no_blocking.deactivate()  # migrate reads its files before the service is ready
    await migrate(settings)
    no_blocking.activate()
    yield settings
    await postgres_server.drop_database(name)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with open_database(settings) as database:
        yield database


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database)


async def test_a_lane_shows_its_events_as_they_were_added(database: Database, outbox: Outbox) -> None:
    events = [make_event(user) for user in (3, 3 + BUCKETS, 3)]
    for event in [*events, make_event(4)]:
        await add(database, event)
    async with outbox.lane(3, LANE_S) as lane:
        assert lane is not None
        assert [row.event for row in lane.rows] == events
        assert [row.id for row in lane.rows] == sorted(row.id for row in lane.rows)


async def test_an_event_of_a_rolled_back_transaction_never_was(database: Database, outbox: Outbox) -> None:
    with pytest.raises(RuntimeError, match="no commit"):
        async with database.transaction() as connection:
            await add_events(connection, [make_event(1)])
            raise RuntimeError("no commit")
    assert await outbox.waiting_lanes() == []


async def test_a_lane_is_held_by_one_replica_and_the_others_are_free(
    settings: Settings, database: Database, outbox: Outbox
) -> None:
    await add(database, make_event(1))
    await add(database, make_event(2))
    async with open_database(settings) as other_database:
        other = Outbox(other_database)
        async with outbox.lane(1, LANE_S) as held:
            assert held is not None
            with anyio.fail_after(SOON_S):
                async with other.lane(1, LANE_S) as refused:
                    assert refused is None
                async with other.lane(2, LANE_S) as free:
                    assert free is not None
        async with other.lane(1, LANE_S) as held:
            assert held is not None


async def test_rows_are_added_to_a_lane_while_it_is_held(database: Database, outbox: Outbox) -> None:
    await add(database, make_event(1))
    async with outbox.lane(1, LANE_S) as lane:
        assert lane is not None
        with anyio.fail_after(SOON_S):
            await add(database, make_event(1))
        await lane.delete([row.id for row in lane.rows])
    assert (await outbox.backlog()).events == 1


async def test_what_is_deleted_is_gone_and_the_rest_stays(database: Database, outbox: Outbox) -> None:
    for _ in range(3):
        await add(database, make_event(1))
    async with outbox.lane(1, LANE_S) as lane:
        assert lane is not None
        first, second, third = (row.id for row in lane.rows)
        await lane.delete([first, third])
    async with outbox.lane(1, LANE_S) as lane:
        assert lane is not None
        assert [row.id for row in lane.rows] == [second]


async def test_a_lane_left_by_a_cancellation_keeps_its_rows_and_is_free(database: Database, outbox: Outbox) -> None:
    await add(database, make_event(1))
    with anyio.CancelScope() as scope:
        async with outbox.lane(1, LANE_S) as lane:
            assert lane is not None
            await lane.delete([row.id for row in lane.rows])
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught

    async def rows_of_the_free_lane() -> int:
        async with outbox.lane(1, LANE_S) as lane:
            return len(lane.rows) if lane is not None else 0

    # Postgres learns from the closed connection that the transaction is over.
    assert await eventually(rows_of_the_free_lane) == 1


async def test_a_lane_held_too_long_is_taken_away(database: Database, outbox: Outbox) -> None:
    await add(database, make_event(1))
    with anyio.fail_after(SOON_S), pytest.raises(Unavailable):
        async with outbox.lane(1, 0.1) as lane:
            assert lane is not None
            await lane.delete([row.id for row in lane.rows])
            await anyio.sleep_forever()
    assert (await outbox.backlog()).events == 1


async def test_a_lane_shows_a_bounded_number_of_rows_and_leaves_waiting_users_out(
    database: Database, outbox: Outbox
) -> None:
    async with database.transaction() as connection:
        for _ in range(LANE_ROWS + 1):
            await add_events(connection, [make_event(1)])
        await add_events(connection, [make_event(1 + BUCKETS)])
    async with outbox.lane(1, LANE_S) as lane:
        assert lane is not None
        assert len(lane.rows) == LANE_ROWS
        await lane.refuse(lane.rows[0].id, "no", timedelta(hours=1))
    async with outbox.lane(1, LANE_S) as lane:
        assert lane is not None
        assert [row.event.user_id for row in lane.rows] == [1 + BUCKETS]


async def test_the_backlog_counts_what_waits_and_how_long(database: Database, outbox: Outbox) -> None:
    empty = await outbox.backlog()
    assert (empty.events, empty.oldest_s) == (0, 0.0)
    await add(database, make_event(1))
    await add(database, make_event(7))
    await add(database, make_event(7))
    await database.fetch("UPDATE outbox SET created_at = now() - interval '1 hour' WHERE user_id = 1")
    backlog = await outbox.backlog()
    assert backlog.events == 3
    assert 3600 <= backlog.oldest_s < 3700
    assert sorted(await outbox.waiting_lanes()) == [1, 7]


async def test_an_outbox_without_its_database_says_that_it_is_unavailable(
    database: Database, outbox: Outbox, postgres_server: PostgresServer
) -> None:
    await postgres_server.pause()
    try:
        with anyio.fail_after(LANE_S + SOON_S):
            for use in (outbox.waiting_lanes, outbox.backlog):
                with pytest.raises(Unavailable):
                    await use()
            with pytest.raises(Unavailable):
                async with outbox.lane(1, 0.2):
                    pytest.fail("a frozen server gave a lane")
    finally:
        await postgres_server.resume()
    # The breaker looks again after a second.
    await eventually(partial(answers, outbox.waiting_lanes), SOON_S)
    assert await outbox.waiting_lanes() == []


async def add(database: Database, event: Event) -> None:
    async with database.transaction() as connection:
        await add_events(connection, [event])
