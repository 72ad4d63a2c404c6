"""The stored key ring. Secrets come and go sealed; opening them is the business of authd.tokens.access.

Postgres's clock alone says when a key signs, is due and is over, since the replicas' clocks differ.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from authd.infra.postgres.database import Database
from authd.infra.postgres.queries import load_queries

_QUERIES = load_queries(__package__)


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed key. `purpose` is `mac`, `data` or the signing algorithm; it signs from `active_at`. `is_over`: the last
    token made with it has expired.
    """

    id: int
    purpose: str
    kid: str
    sealed: str
    active_at: datetime
    created_at: datetime
    is_over: bool


class NewKey(msgspec.Struct, frozen=True):
    purpose: str
    kid: str
    sealed: str


class Lives(msgspec.Struct, frozen=True):
    """How long after a key's successor began to sign the key may still be needed."""

    mac: timedelta
    signing: timedelta


class Keys:
    """Keys of purpose `data` are never over: what is kept depends on them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def time_s(self) -> float:
        """Read Postgres's clock in epoch seconds."""
        return await self._database.time_s()

    async def load(self, lives: Lives) -> list[StoredKey]:
        """Return all keys, oldest first."""
        return [StoredKey(**row) for row in await self._database.fetch(_QUERIES["list_keys"], lives.mac, lives.signing)]

    async def add(self, key: NewKey, publish: timedelta) -> None:
        """Add a key that signs `publish` from now."""
        await self._database.fetch(_QUERIES["insert_next_key"], key.purpose, key.kid, key.sealed, publish)

    async def add_if_due(self, key: NewKey, publish: timedelta, max_age: timedelta | None) -> None:
        """Add the key if it is the first of its purpose, or the newest is older than `max_age` (None: however old).
        Replicas that find it due together add one: the table is locked while one of them looks and adds.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_QUERIES["lock_keys"])
            await connection.execute(_QUERIES["insert_key_if_due"], key.purpose, key.kid, key.sealed, publish, max_age)

    async def delete_over(self, lives: Lives) -> None:
        """Delete the keys that are over now, whoever found them so and when."""
        await self._database.fetch(_QUERIES["delete_keys_over"], lives.mac, lives.signing)

    async def reseal(self, reseal: Callable[[StoredKey], str | None]) -> None:
        """Replace the seals of all keys for which there is a new one, in one transaction."""
        async with self._database.transaction() as connection:
            await connection.execute(_QUERIES["lock_keys"])
            rows = await connection.fetch(_QUERIES["list_keys"], timedelta(), timedelta())
            for key in (StoredKey(**row) for row in rows):
                sealed = reseal(key)
                if sealed is not None:
                    await connection.execute(_QUERIES["set_seal"], key.id, sealed)
