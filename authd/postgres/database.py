"""The pool, with a deadline around every use of it and one meaning for "Postgres is away"."""

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import anyio
import asyncpg
from asyncpg.pool import PoolConnectionProxy

from authd.breaker import Breaker
from authd.config import Settings
from authd.errors import Unavailable

CLOSE_TIMEOUT_S = 2.0

#: A string: the class is generic only in its type stubs.
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

#: Errors that say "not now": the server is away or going.
_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.InvalidAuthorizationSpecificationError,
)
#: Errors of a server that answers: it is full, out of disk, or read-only after a failover. They cost no wait, so they
#: do not open the breaker, which would refuse the reading requests too.
_REFUSED = (
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.DeadlockDetectedError,
)


class Database:
    """A bounded pool. Every method raises `Unavailable("user_store")` within `database_timeout_s` when it cannot."""

    def __init__(self, pool: asyncpg.Pool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._breaker = Breaker(lambda: Unavailable("user_store"))

    async def fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        with self._guard(), anyio.fail_after(self._timeout_s):
            async with self._pool.acquire() as connection:
                return await connection.fetch(query, *arguments)

    async def fetch_row(self, query: str, *arguments: Any) -> asyncpg.Record | None:
        with self._guard(), anyio.fail_after(self._timeout_s):
            async with self._pool.acquire() as connection:
                return await connection.fetchrow(query, *arguments)

    async def ping(self) -> None:
        await self.fetch_row("SELECT")

    @asynccontextmanager
    async def transaction(self, timeout_s: float | None = None) -> AsyncGenerator[Connection, None]:
        """A transaction whose every step, the commit too, is under one deadline."""
        # The deadline stands around both acquire and query: asyncpg's own timeouts wait for a frozen server's answer
        # to their cancel request.
        with self._guard(), anyio.fail_after(timeout_s or self._timeout_s):
            async with self._pool.acquire() as connection, connection.transaction():
                yield connection

    @contextmanager
    def _guard(self) -> Generator[None, None, None]:
        try:
            with self._breaker.call(_AWAY):
                yield
        except (*_AWAY, *_REFUSED) as error:
            raise Unavailable("user_store") from error


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncGenerator[Database, None]:
    """A pool that connects when first used: authd starts, and says so, while Postgres is away."""
    timeout_s = settings.database_timeout_s
    pool = asyncpg.create_pool(
        settings.database_url.reveal(),
        min_size=0,
        max_size=settings.database_pool_per_worker,
        timeout=timeout_s,
        command_timeout=2 * timeout_s,  # only a guard: see transaction()
        server_settings={"application_name": "authd"},
    )
    await pool
    try:
        yield Database(pool, timeout_s)
    finally:
        # A frozen server never answers a polite close.
        with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True) as closing:
            await pool.close()
        if closing.cancelled_caught:
            pool.terminate()
