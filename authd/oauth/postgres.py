"""The registered service clients."""

from datetime import datetime

import msgspec

from authd.infra.postgres.database import Database
from authd.infra.postgres.queries import load_queries

_QUERIES = load_queries(__package__)


class StoredClient(msgspec.Struct, frozen=True, kw_only=True):
    client_id: str
    name: str
    created_at: datetime


class Clients:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, client_id: str, name: str, secret_hash: bytes) -> None:
        await self._database.fetch(_QUERIES["insert_client"], client_id, name, secret_hash)

    async def find_secret_hash(self, client_id: str) -> bytes | None:
        row = await self._database.fetch_row(_QUERIES["find_client_secret_hash"], client_id)
        return row["secret_hash"] if row is not None else None

    async def list_all(self) -> list[StoredClient]:
        return [StoredClient(**row) for row in await self._database.fetch(_QUERIES["list_clients"])]

    async def delete(self, client_id: str) -> bool:
        """Delete the client. Return whether there was one."""
        return await self._database.fetch_row(_QUERIES["delete_client"], client_id) is not None
