"""The users, and the endings of sessions that a change of the user brings."""

from datetime import datetime

import msgspec

from authd.infra.postgres.database import Connection, Database
from authd.infra.postgres.queries import load_queries
from authd.infra.subject import Subject

_QUERIES = load_queries(__package__)


class User(msgspec.Struct, frozen=True, kw_only=True):
    """A user's row. `password_version` is raised by each other password and by whatever else ends the use of device
    tokens, `version` by each change. `revocation` is the bucket's last revocation number, read in the same snapshot.
    """

    id: int
    incarnation: int
    username: str
    full_name: str
    password_hash: str
    password_version: int
    version: int
    epoch: int
    disabled: bool
    created_at: datetime
    revocation: int

    @property
    def subject(self) -> Subject:
        return Subject(self.id, self.incarnation)

    @property
    def registered_ms(self) -> int:
        """When it registered, in ms since the epoch, rounded down as Redis does it."""
        return int(self.created_at.timestamp() * 1000)

    def __repr__(self) -> str:
        return f"User({self.id})"


class NewUser(msgspec.Struct, frozen=True, kw_only=True):
    """What a registration wrote."""

    id: int
    username: str
    full_name: str
    created_at: datetime


class Users:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(
        self, connection: Connection, username: str, username_key: str, full_name: str, password_hash: str
    ) -> NewUser | None:
        """Add the user in the caller's transaction. Return it, None where the username is taken."""
        row = await connection.fetchrow(_QUERIES["insert_user"], username, username_key, full_name, password_hash)
        if row is None:
            return None
        return NewUser(id=row["id"], username=username, full_name=full_name, created_at=row["created_at"])

    async def find_by_username_key(self, username_key: str) -> User | None:
        row = await self._database.fetch_row(_QUERIES["find_user_by_username_key"], username_key)
        return User(**row) if row is not None else None

    async def find(self, user_id: int, incarnation: int | None) -> User | None:
        """Return the user of this incarnation; with None whoever has the id now, who need not be whom a token of before
        incarnations is about.
        """
        row = await self._database.fetch_row(_QUERIES["find_user"], user_id, incarnation)
        return User(**row) if row is not None else None

    async def find_of_session(self, subject: Subject, session_id: bytes) -> tuple[User | None, str | None]:
        """Return the user, and the reason of the session's ending if the log has one."""
        row = await self._database.fetch_row(_QUERIES["find_user_of_session"], *subject, session_id)
        if row is None:
            return None, None
        fields = dict(row)
        ended = fields.pop("ended")
        return User(**fields), ended

    async def set_password_hash(self, user_id: int, old: str, new: str) -> bool:
        """Renew the hash of the same password; False where another renewed or changed it meanwhile."""
        return await self._database.fetch_row(_QUERIES["set_password_hash"], user_id, old, new) is not None

    async def raise_epoch(self, connection: Connection, subject: Subject) -> int | None:
        """Raise the epoch in the caller's transaction, which locks the row. Return it, None where the user is gone."""
        row = await connection.fetchrow(_QUERIES["raise_epoch"], *subject)
        return row["epoch"] if row is not None else None

    async def set_disabled(
        self, connection: Connection, username_key: str, *, disabled: bool
    ) -> tuple[Subject, int] | None:
        """Disable or enable the user in the caller's transaction, and raise its epoch. Return whom and the epoch, None
        where there is no such user or nothing changed. Locks the row.
        """
        row = await connection.fetchrow(_QUERIES["disable_user" if disabled else "enable_user"], username_key)
        return (Subject(row["id"], row["incarnation"]), row["epoch"]) if row is not None else None
