"""The revocation log: every ending of a session, numbered without gaps in its bucket."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import msgspec

from authd.events.contract import EndingReason, Event
from authd.events.factory import EventFactory, revocation_record
from authd.events.postgres import add_events
from authd.infra.postgres.database import Connection, Database, Record
from authd.infra.postgres.queries import load_queries
from authd.infra.subject import Subject, bucket_of_user

_QUERIES = load_queries(__package__)
#: The first half of the advisory locks' keys; the second is the bucket.
ADVISORY_LOCKS = 0x61757273
#: Rows read in one statement while Redis catches up.
CATCH_UP_ROWS = 500
#: Expired rows deleted in one statement.
DELETE_ROWS = 1000


class Revoked(msgspec.Struct, frozen=True):
    """The place of a row in the log."""

    bucket: int
    number: int


class Revocation(msgspec.Struct, frozen=True, kw_only=True):
    """A row: one session that ended, or the epoch below which all of the user's did. An incarnation of 0 is that of a
    user who was gone when rows began to have one.
    """

    number: int
    user_id: int
    incarnation: int
    session_id: bytes | None
    epoch: int | None
    reason: str

    @property
    def subject(self) -> Subject:
        return Subject(self.user_id, self.incarnation)


class Ending(msgspec.Struct, frozen=True):
    """A session that ended."""

    subject: Subject
    session_id: bytes
    reason: EndingReason


class RevocationWriter:
    """Adds rows to the log, and their events, in a transaction of the caller, who has locked the user's row. `keep`:
    the longest life of a session.
    """

    def __init__(self, events: EventFactory, keep: timedelta) -> None:
        self._events = events
        self._keep = keep

    async def end_sessions(self, connection: Connection, endings: Sequence[Ending]) -> Revoked:
        """Log at least one ending, of users of one bucket, and return the last row's place."""
        bucket = bucket_of_user(endings[0].subject.user_id)
        events = [self._events.revoked(each.subject.user_id, each.session_id, None, each.reason) for each in endings]
        await add_events(connection, [event for group in events for event in group])
        rows = await connection.fetch(
            _QUERIES["add_session_revocations"],
            bucket,
            [each.subject.user_id for each in endings],
            [each.subject.incarnation for each in endings],
            [each.session_id for each in endings],
            [each.reason for each in endings],
            self._keep,
            self._events.announced_for,
        )
        return _place(bucket, rows)

    async def end_new(self, connection: Connection, endings: Sequence[Ending]) -> Revoked | None:
        """Log the endings that the log does not have, once each. Return the last row's place, None where it has them
        all.
        """
        ids = [each.session_id for each in endings]
        logged = {row["session_id"] for row in await connection.fetch(_QUERIES["find_session_revocations"], ids)}
        new = {each.session_id: each for each in endings if each.session_id not in logged}
        return await self.end_sessions(connection, list(new.values())) if new else None

    async def end_all(self, connection: Connection, subject: Subject, epoch: int, reason: EndingReason) -> Revoked:
        await add_events(connection, self._events.sessions_ended(subject.user_id, epoch, reason))
        await add_events(connection, self._events.revoked(subject.user_id, None, epoch, reason))
        bucket = bucket_of_user(subject.user_id)
        rows = await connection.fetch(
            _QUERIES["add_epoch_revocation"],
            bucket,
            *subject,
            epoch,
            reason,
            self._keep,
            self._events.announced_for,
        )
        return _place(bucket, rows)

    async def lock_user(self, connection: Connection, user_id: int) -> None:
        """Lock the user's row, if there is one."""
        await connection.execute(_QUERIES["lock_user"], user_id)

    async def enqueue_tombstones(self, connection: Connection) -> int:
        """Enqueue tombstones for rows whose access tokens have all expired, of one user. Return the number of rows. The
        caller has locked no row: which user it is, is found here.
        """
        user_id = await connection.fetchval(_QUERIES["find_user_announced_over"])
        if user_id is None:
            return 0
        await self.lock_user(connection, user_id)
        # Where another replica was faster, there is nothing left to take.
        rows = await connection.fetch(_QUERIES["take_announced_over"], user_id)
        # A newer ending of the same key is still announced: the tombstone would take away its record.
        newer = await connection.fetch(_QUERIES["list_announced"], user_id)
        keys = {row["session_id"] for row in rows} - {row["session_id"] for row in newer}
        await add_events(connection, [revocation_record(user_id, key, None) for key in keys])
        return len(rows)


class Revocations:
    """What the log says, and its upkeep."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def heads(self) -> dict[int, int]:
        """Return the last number of each bucket that has one."""
        return {row["bucket"]: row["last_number"] for row in await self._database.fetch(_QUERIES["list_heads"])}

    async def after(self, bucket: int, number: int) -> tuple[int, list[Revocation]]:
        """Return the bucket's head and its rows after `number`, oldest first, at most CATCH_UP_ROWS."""
        rows = await self._database.fetch(_QUERIES["list_revocations_after"], bucket, number, CATCH_UP_ROWS)
        if not rows:
            return 0, []
        found = [Revocation(**{k: v for k, v in row.items() if k != "head"}) for row in rows if row["number"]]
        return rows[0]["head"], found

    async def delete_expired(self) -> int:
        """Delete at most DELETE_ROWS rows that concern no living token, and return how many."""
        async with self._database.transaction() as connection:
            status = await connection.execute(_QUERIES["delete_expired_revocations"], DELETE_ROWS)
        return int(status.rpartition(" ")[2])


class Relayed(msgspec.Struct, frozen=True):
    """What one entry of a stream becomes: its events, and the ending, if Redis decided one. `user_id` is 0 where it is
    about no known user.
    """

    user_id: int
    events: list[Event]
    ending: Ending | None


class RelayedBucket:
    """A bucket while its lock is held: nobody else moves its events."""

    def __init__(self, connection: Connection, writer: RevocationWriter) -> None:
        self._connection = connection
        self._writer = writer

    async def add(self, relayed: Sequence[Relayed]) -> Revoked | None:
        """Enqueue the events, and log the endings that the log does not have. Return the last row's place, None where
        it has them all.
        """
        users = {item.user_id for item in relayed} - {0}
        await self._connection.execute(_QUERIES["lock_relayed_users"], list(users))
        await add_events(self._connection, [event for item in relayed for event in item.events])
        endings = [item.ending for item in relayed if item.ending is not None]
        return await self._writer.end_new(self._connection, endings) if endings else None


class RelayStore:
    def __init__(self, database: Database, writer: RevocationWriter) -> None:
        self._database = database
        self._writer = writer

    @asynccontextmanager
    async def bucket(self, bucket: int) -> AsyncGenerator[RelayedBucket | None, None]:
        """Hold the bucket for one transaction; None while another replica does."""
        async with self._database.transaction() as connection:
            if await connection.fetchval(_QUERIES["lock_relay"], ADVISORY_LOCKS, bucket):
                yield RelayedBucket(connection, self._writer)
            else:
                yield None


def _place(bucket: int, rows: Sequence[Record]) -> Revoked:
    if not rows:
        raise RuntimeError(f"revocation_heads has no bucket {bucket}")
    return Revoked(bucket, max(row["number"] for row in rows))
