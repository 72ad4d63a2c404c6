"""What is true of the deployment as a whole."""

from datetime import datetime
from uuid import UUID

import msgspec

from authd.infra.postgres.database import Database
from authd.infra.postgres.queries import load_queries

_QUERIES = load_queries(__package__, "deployment")
#: More users than can have registered since the backup was made.
IDS_SKIPPED = 1_000_000


class Restored(msgspec.Struct, frozen=True):
    """What `mark_restored` wrote. No user gets an id of `last_user_id` or below any more."""

    last_user_id: int
    restored_at: datetime
    log_id: UUID


class Deployment:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def mark_restored(self) -> Restored:
        """Let the user ids go on above all that may have been given since the backup, and note the time of the restore
        and that the log of endings is another one now. Each run skips ids anew.

        :raises Unavailable:
        """
        async with self._database.transaction() as connection:
            last_user_id = await connection.fetchval(_QUERIES["move_user_ids"], IDS_SKIPPED)
            [row] = await connection.fetch(_QUERIES["mark_restored"])
        return Restored(last_user_id, row["restored_at"], row["log_id"])
