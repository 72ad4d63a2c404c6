"""Disables and enables users."""

from authd.events.contract import EndingReason
from authd.events.factory import EventFactory
from authd.events.postgres import add_events
from authd.infra.postgres.database import Database
from authd.sessions.postgres import RevocationWriter, Revoked
from authd.users.postgres import Users


class Disabling:
    """Changes the user's row and ends all its sessions in one transaction, which locks the row before the bucket's
    head. What it returns is to be applied to Redis: see `RevocationFeed.wait_applied`.
    """

    def __init__(self, database: Database, users: Users, writer: RevocationWriter, events: EventFactory) -> None:
        self._database = database
        self._users = users
        self._writer = writer
        self._events = events

    async def set_disabled(self, username_key: str, *, disabled: bool) -> Revoked | None:
        """Disable or enable the user. Return the place of its row in the log, None where there is no such user or
        nothing changed.

        :raises Unavailable:
        """
        reason: EndingReason = "user_disabled" if disabled else "user_enabled"
        async with self._database.transaction() as connection:
            changed = await self._users.set_disabled(connection, username_key, disabled=disabled)
            if changed is None:
                return None
            subject, epoch = changed
            await add_events(connection, self._events.user_changed(subject.user_id, is_disabled=disabled))
            return await self._writer.end_all(connection, subject, epoch, reason)
