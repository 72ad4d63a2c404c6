"""The stored key ring. Secrets come and go sealed; opening them is the business of authd.tokens."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from authd.postgres.database import Database
from authd.postgres.queries import load_queries

_QUERIES = load_queries("keys.sql")


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed key. `purpose` is `mac` or the signing algorithm; it counts from `active_at`."""

    id: int
    purpose: str
    kid: str
    sealed: str
    active_at: datetime
    created_at: datetime


class NewKey(msgspec.Struct, frozen=True):
    purpose: str
    kid: str
    sealed: str


class Keys:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[StoredKey]:
        """All keys, oldest first."""
        return [StoredKey(**row) for row in await self._database.fetch(_QUERIES["list_keys"])]

    async def add(self, key: NewKey, publish: timedelta) -> None:
        """Add a key that counts `publish` from now."""
        await self._database.fetch(_QUERIES["insert_next_key"], key.purpose, key.kid, key.sealed, publish)

    async def add_if_due(self, key: NewKey, publish: timedelta, max_age: timedelta) -> None:
        """Add the key if it is the first of its purpose, or the newest is older than `max_age`. Replicas that find it
        due together add one: the table is locked while one of them looks and adds.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_QUERIES["lock_keys"])
            await connection.execute(_QUERIES["insert_key_if_due"], key.purpose, key.kid, key.sealed, publish, max_age)

    async def delete(self, ids: Sequence[int]) -> None:
        await self._database.fetch(_QUERIES["delete_keys"], list(ids))
