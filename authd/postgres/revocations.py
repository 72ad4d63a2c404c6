"""The revocation log: every ending of a session, numbered without gaps in its bucket."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from authd.postgres.database import Connection, Database
from authd.postgres.queries import load_queries

_QUERIES = load_queries("revocations.sql")
#: Rows read in one statement while Redis catches up.
CATCH_UP_ROWS = 500
#: Expired rows deleted in one statement.
DELETE_ROWS = 1000


class Revoked(msgspec.Struct, frozen=True):
    """The place of a row in the log."""

    bucket: int
    number: int


class Revocation(msgspec.Struct, frozen=True, kw_only=True):
    """A row: one session that ended, or the epoch below which all of the user's did."""

    number: int
    user_id: int
    session_id: bytes | None
    epoch: int | None
    reason: str
    expires_at: datetime


class Revocations:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_sessions(
        self, bucket: int, user_id: int, session_ids: Sequence[bytes], reason: str, keep: timedelta
    ) -> Revoked:
        """Log the ending of at least one session of a user in one transaction; the last row's place."""
        async with self._database.transaction() as connection:
            for session_id in session_ids:
                row = await add_revocation(
                    connection,
                    bucket=bucket,
                    user_id=user_id,
                    session_id=session_id,
                    epoch=None,
                    reason=reason,
                    keep=keep,
                )
        return row

    async def heads(self) -> dict[int, int]:
        """The last number of each bucket that has one."""
        return {row["bucket"]: row["last_number"] for row in await self._database.fetch(_QUERIES["list_heads"])}

    async def after(self, bucket: int, number: int) -> tuple[int, list[Revocation]]:
        """The bucket's head and its rows after `number`, oldest first, at most CATCH_UP_ROWS."""
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


async def add_revocation(
    connection: Connection,
    *,
    bucket: int,
    user_id: int,
    session_id: bytes | None,
    epoch: int | None,
    reason: str,
    keep: timedelta,
) -> Revoked:
    """Log an ending in the caller's transaction, which locks the user's row before, if it locks it at all."""
    row = await connection.fetchrow(_QUERIES["add_revocation"], bucket, user_id, session_id, epoch, reason, keep)
    if row is None:
        raise RuntimeError(f"revocation_heads has no bucket {bucket}")
    return Revoked(bucket, row["number"])
