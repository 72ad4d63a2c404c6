"""The stored key ring. Secrets come and go sealed; opening them is the business of authd.tokens."""

from datetime import datetime

import msgspec

from authd.postgres.database import Connection, Database
from authd.postgres.queries import load_queries

_QUERIES = load_queries("keys.sql")


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed key. `purpose` is `mac` or the signing algorithm; it counts from `active_at`."""

    id: int
    purpose: str
    kid: str
    sealed: str
    active_at: datetime


class NewKey(msgspec.Struct, frozen=True):
    purpose: str
    kid: str
    sealed: str


class Keys:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[StoredKey]:
        return [StoredKey(**row) for row in await self._database.fetch(_QUERIES["list_keys"])]

    async def ensure(self, candidates: list[NewKey]) -> list[StoredKey]:
        """Add each candidate whose purpose has no key yet and return all keys. Replicas that start together on an
        empty database agree: the table is locked while one of them looks and adds.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_QUERIES["lock_keys"])
            present = {key.purpose for key in await _list(connection)}
            for key in candidates:
                if key.purpose not in present:
                    await connection.execute(_QUERIES["insert_first_key"], key.purpose, key.kid, key.sealed)
            return await _list(connection)


async def _list(connection: Connection) -> list[StoredKey]:
    return [StoredKey(**row) for row in await connection.fetch(_QUERIES["list_keys"])]
