"""Takes over the events born in Redis: to the outbox, and where a session ended, to the revocation log."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from authd.events import Event
from authd.postgres.database import Connection, Database
from authd.postgres.outbox import add_events
from authd.postgres.queries import load_queries
from authd.postgres.revocations import RevocationWriter, Revoked

_QUERIES = load_queries("relay.sql")
#: The first half of the advisory locks' keys; the second is the bucket.
ADVISORY_LOCKS = 0x61757273


class RelayedBucket:
    """A bucket while its lock is held: nobody else moves its events."""

    def __init__(self, connection: Connection, writer: RevocationWriter) -> None:
        self._connection = connection
        self._writer = writer

    async def add_events(self, events: Sequence[Event]) -> None:
        await add_events(self._connection, events)

    async def end_session(self, user_id: int, session_id: bytes, reason: str) -> Revoked | None:
        """Log the ending, unless the request that saw it did. None where the log has it."""
        await self._connection.execute(_QUERIES["lock_relayed_user"], user_id)
        if await self._connection.fetchrow(_QUERIES["find_relayed_revocation"], session_id) is not None:
            return None
        return await self._writer.end_session(self._connection, user_id, session_id, reason)


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
