"""Ends sessions in the log. Each method is one transaction, and locks users before any bucket's head."""

from collections.abc import Sequence

from authd.events.contract import EndingReason
from authd.events.factory import EventFactory
from authd.events.postgres import add_events
from authd.infra.postgres.database import Database
from authd.infra.subject import Subject, bucket_of_user
from authd.sessions.postgres import Ending, RevocationWriter, Revoked
from authd.users.postgres import Users


class Endings:
    def __init__(self, database: Database, users: Users, writer: RevocationWriter, events: EventFactory) -> None:
        self._database = database
        self._users = users
        self._writer = writer
        self._events = events

    async def end_sessions(self, subject: Subject, session_ids: Sequence[bytes], reason: EndingReason) -> Revoked:
        """Log the ending of at least one session of a user, also where the user is deleted. Return the last row's
        place.

        :raises Unavailable:
        """
        async with self._database.transaction(bucket=bucket_of_user(subject.user_id)) as connection:
            await self._writer.lock_user(connection, subject.user_id)
            for session_id in session_ids:
                await add_events(connection, self._events.session_ended(subject.user_id, session_id, reason))
            return await self._writer.end_sessions(connection, _endings(subject, session_ids, reason))

    async def end_all(self, subject: Subject, reason: EndingReason) -> Revoked | None:
        """Raise the user's epoch and log it. Return the row's place, None where the user is deleted.

        :raises Unavailable:
        """
        async with self._database.transaction(bucket=bucket_of_user(subject.user_id)) as connection:
            epoch = await self._users.raise_epoch(connection, subject)
            return None if epoch is None else await self._writer.end_all(connection, subject, epoch, reason)

    async def record_sessions(
        self, subject: Subject, session_ids: Sequence[bytes], reason: EndingReason
    ) -> Revoked | None:
        """Log endings that Redis decided, where the log does not have them yet: their events come from Redis. Return
        the last row's place, None where the log has them all.

        :raises Unavailable:
        """
        async with self._database.transaction(bucket=bucket_of_user(subject.user_id)) as connection:
            await self._writer.lock_user(connection, subject.user_id)
            return await self._writer.end_new(connection, _endings(subject, session_ids, reason))

    async def enqueue_tombstones(self) -> int:
        """Enqueue tombstones for announced rows whose access tokens have all expired, of one user per call. Return the
        number of rows.

        :raises Unavailable:
        """
        async with self._database.transaction() as connection:
            return await self._writer.enqueue_tombstones(connection)


def _endings(subject: Subject, session_ids: Sequence[bytes], reason: EndingReason) -> list[Ending]:
    return [Ending(subject, session_id, reason) for session_id in session_ids]
