"""The outbox: events that are promised by a commit and not yet acknowledged by the broker."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import msgspec

from authd.config import BUCKETS
from authd.events import Event
from authd.postgres.database import Connection, Database
from authd.postgres.queries import load_queries

_QUERIES = load_queries("outbox.sql")
#: Rows sent in one transaction.
LANE_ROWS = 200


class OutboxRow(msgspec.Struct, frozen=True):
    id: int
    event: Event


class Backlog(msgspec.Struct, frozen=True):
    """What waits: a number of events, and the age of the oldest in seconds."""

    events: int
    oldest_s: float


class Lane:
    """A lane while its lock is held: nobody else sends its rows."""

    def __init__(self, connection: Connection, rows: list[OutboxRow]) -> None:
        self._connection = connection
        self.rows = rows

    async def delete(self, ids: Sequence[int]) -> None:
        """Forget rows that the broker has acknowledged."""
        await self._connection.execute(_QUERIES["delete_events"], list(ids))


class Outbox:
    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def lane(
        self, lane: int, timeout_s: float, without_users: Sequence[int] = ()
    ) -> AsyncGenerator[Lane | None, None]:
        """Hold the lane for at most `timeout_s` and see the first LANE_ROWS rows of all but `without_users`, who would
        else fill it up; None while another replica holds it.
        """
        async with self._database.transaction(timeout_s) as connection:
            if await connection.fetchrow(_QUERIES["lock_lane"], lane) is None:
                yield None
                return
            records = await connection.fetch(_QUERIES["list_lane"], lane, LANE_ROWS, list(without_users))
            yield Lane(connection, [_row(record) for record in records])

    async def waiting_lanes(self) -> list[int]:
        return [row["lane"] for row in await self._database.fetch(_QUERIES["list_waiting_lanes"])]

    async def backlog(self) -> Backlog:
        row = await self._database.fetch_row(_QUERIES["backlog"])
        return Backlog(**row) if row is not None else Backlog(0, 0.0)


async def add_events(connection: Connection, events: Sequence[Event]) -> None:
    """Promise the events in the caller's transaction, which holds the lock of the user's row: so ids are in commit
    order for each user.
    """
    await connection.executemany(
        _QUERIES["add_event"],
        [
            (
                event.user_id % BUCKETS,
                event.user_id,
                event.id,
                event.channel,
                event.type,
                event.version,
                event.key,
                event.value,
            )
            for event in events
        ],
    )


def _row(record: asyncpg.Record) -> OutboxRow:
    return OutboxRow(
        record["id"],
        Event(
            id=record["event_id"],
            channel=record["channel"],
            type=record["type"],
            version=record["version"],
            user_id=record["user_id"],
            key=record["message_key"],
            value=record["value"],
        ),
    )
