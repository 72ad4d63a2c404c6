"""The outbox: events that a commit enqueued and the broker has not yet acknowledged, and those that the broker refuses,
parked for an operator to decide.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import msgspec

from authd.events.contract import Event
from authd.infra.postgres.database import Connection, Database, Record, milliseconds
from authd.infra.postgres.queries import load_queries
from authd.infra.subject import bucket_of_user

_QUERIES = load_queries(__package__)
#: Rows sent in one transaction.
LANE_ROWS = 200
#: The backlog is counted up to here; more are reported as this many.
COUNTED_MAX = 1_000_000
#: Parked rows shown at once.
PARKED_ROWS = 1000


class OutboxRow(msgspec.Struct, frozen=True):
    """`attempts`: how often the broker refused it."""

    id: int
    event: Event
    attempts: int


class Backlog(msgspec.Struct, frozen=True):
    """What waits: a number of events (at most COUNTED_MAX), and the age of the oldest in seconds. Those that are
    parked wait for nothing.
    """

    events: int
    oldest_s: float
    parked: int


class ParkedRow(msgspec.Struct, frozen=True):
    """A parked row, without its value. `age_s`: seconds since it was enqueued."""

    id: int
    type: str
    channel: str
    user_id: int
    attempts: int
    last_error: str
    age_s: float


class Unparked(msgspec.Struct, frozen=True):
    """`retried` wait for the broker again; `overtaken` are deleted, since a newer record says more than they do."""

    retried: list[int]
    overtaken: list[int]


class Lane:
    """A lane while its lock is held: nobody else sends its rows."""

    def __init__(self, connection: Connection, rows: list[OutboxRow]) -> None:
        self._connection = connection
        self.rows = rows

    async def delete(self, ids: Sequence[int]) -> None:
        """Forget rows that the broker has acknowledged."""
        await self._connection.execute(_QUERIES["delete_events"], list(ids))

    async def refuse(self, row_id: int, error: str, retry_in: timedelta | None) -> None:
        """Count a refusal. The row and its user's later ones wait that long; with None it is parked, and they go on."""
        await self._connection.execute(_QUERIES["note_refusal"], row_id, error, retry_in)

    async def postpone(self, row_id: int, retry_in: timedelta) -> None:
        """Let the row and its user's later ones wait."""
        await self._connection.execute(_QUERIES["postpone_event"], row_id, retry_in)


class Outbox:
    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def lane(
        self, lane: int, timeout_s: float, without: Collection[str] = ()
    ) -> AsyncGenerator[Lane | None, None]:
        """Hold the lane for at most `timeout_s` and see its first LANE_ROWS rows, without those of users who wait; None
        while another replica holds it. Rows of the channels `without` are left out. Postgres too ends it after that
        time: a replica that froze keeps no lane.
        """
        async with self._database.transaction(timeout_s) as connection:
            if await connection.fetchrow(_QUERIES["lock_lane"], lane, milliseconds(timeout_s)) is None:
                yield None
                return
            records = await connection.fetch(_QUERIES["list_lane"], lane, LANE_ROWS, list(without))
            yield Lane(connection, [_row(record) for record in records])

    async def waiting_lanes(self, without: Collection[str] = ()) -> list[int]:
        """Return the lanes that have rows of other channels than `without`."""
        return [row["lane"] for row in await self._database.fetch(_QUERIES["list_waiting_lanes"], list(without))]

    async def backlog(self) -> Backlog:
        row = await self._database.fetch_row(_QUERIES["backlog"], COUNTED_MAX)
        return Backlog(**row) if row is not None else Backlog(0, 0.0, 0)

    async def parked(self) -> list[ParkedRow]:
        """Return the parked rows, oldest first, at most PARKED_ROWS."""
        return [ParkedRow(**row) for row in await self._database.fetch(_QUERIES["list_parked"], PARKED_ROWS)]

    async def unpark(self, connection: Connection, ids: Sequence[int] | None = None) -> Unparked:
        """Give parked rows (None: all) their attempts again, in the caller's transaction. They are sent before
        their users' later rows, which for those that were sent meanwhile comes too late; so what would replace a newer
        record is deleted instead.
        """
        chosen = None if ids is None else list(ids)
        await connection.execute(_QUERIES["lock_users_of_parked"], chosen)
        overtaken = await connection.fetch(_QUERIES["delete_overtaken"], chosen)
        retried = await connection.fetch(_QUERIES["unpark_events"], chosen)
        return Unparked([row["id"] for row in retried], [row["id"] for row in overtaken])

    async def drop(self, ids: Sequence[int]) -> list[int]:
        """Delete parked rows, and no others. Return the ids of those that there were."""
        return [row["id"] for row in await self._database.fetch(_QUERIES["drop_parked"], list(ids))]


async def add_events(connection: Connection, events: Sequence[Event]) -> None:
    """Enqueue the events in the caller's transaction, which holds the lock of the user's row: so ids are in commit
    order for each user.
    """
    await connection.executemany(
        _QUERIES["add_event"],
        [
            (
                bucket_of_user(event.user_id),
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


def _row(record: Record) -> OutboxRow:
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
        record["attempts"],
    )
