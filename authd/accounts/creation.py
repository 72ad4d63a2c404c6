"""Creates users."""

from authd.events.factory import EventFactory
from authd.events.postgres import add_events
from authd.infra.postgres.database import Database
from authd.users.postgres import NewUser, Users


class Creation:
    """Adds the row of a user and its `user.registered` events in one transaction."""

    def __init__(self, database: Database, users: Users, events: EventFactory) -> None:
        self._database = database
        self._users = users
        self._events = events

    async def create(self, username: str, username_key: str, full_name: str, password_hash: str) -> NewUser | None:
        """Return the new user, None where the username is taken.

        :raises Unavailable:
        """
        async with self._database.transaction() as connection:
            user = await self._users.insert(connection, username, username_key, full_name, password_hash)
            if user is not None:
                made = self._events.user_registered(user.id, username, full_name, user.created_at)
                await add_events(connection, made)
        return user
