"""Takes over the events born in Redis: to the outbox, and where a session ended, to the revocation log."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import msgspec

from authd.events.contract import Event
from authd.events.postgres import add_events
from authd.infra.postgres.database import Connection, Database
from authd.infra.postgres.queries import load_queries
from authd.sessions.postgres import Ending, RevocationWriter, Revoked

_QUERIES = load_queries(__package__, "relay_store")
#: The first half of the advisory locks' keys; the second is the bucket.
ADVISORY_LOCKS = 0x61757273


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
        """Promise the events, and log the endings that the requests which saw them did not: the last row's place, None
        where the log has them all.
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
