"""The pool, with a deadline around every use of it, and the difference between a Postgres that is unavailable and one
in which something is busy.

A replica may freeze between two statements. Its locks must not outlive that for long, so the server ends what the
replica does not: each connection has timeouts, all parts of `database_timeout_s`:

- a wait for a lock ends after a third, so that a transaction which waits for two of them still ends by itself;
- a statement ends after four fifths, before the deadline of the request;
- a transaction that sends nothing ends after the whole: no honest one is silent for longer, since that is its deadline;
- a peer that the network has lost is given up after twice that, on both sides.
"""

import asyncio
import math
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import anyio
import asyncpg
from asyncpg.pool import PoolConnectionProxy

from authd.config import Settings
from authd.errors import Unavailable
from authd.infra.tasks.breaker import Breaker

CLOSE_TIMEOUT_S = 2.0
#: Unanswered keepalives after which a peer is lost.
KEEPALIVES = 3
#: The longest wait for a lock, and the longest statement, as parts of the deadline.
LOCK_SHARE, STATEMENT_SHARE = 1 / 3, 0.8

#: A string: the class is generic only in its type stubs.
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
Record: TypeAlias = asyncpg.Record

#: Errors of a server that answers: something in it is in use. They say nothing about the server, so they do not open
#: the breaker: one held lock must not refuse the requests that do not need it.
_BUSY = (
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.DeadlockDetectedError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
#: Errors of a server that answers: it is full, out of disk, or read-only after a failover. They cost no wait, so they
#: do not open the breaker, which would refuse the reading requests too.
_REFUSED = (asyncpg.InsufficientResourcesError, asyncpg.ReadOnlySQLTransactionError)
#: Errors that say "not now": the server is unavailable or about to be.
_UNAVAILABLE = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.InvalidAuthorizationSpecificationError,
)


class Database:
    """A bounded pool. Every method raises `Unavailable("user_store")` within `database_timeout_s` when it cannot; its
    `is_busy` says that Postgres answers, and that only a lock or a connection was not free in time.
    """

    def __init__(self, pool: asyncpg.Pool, timeout_s: float, size: int) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._breaker = Breaker(lambda: Unavailable("user_store"))
        # A wait here is a wait for our own requests; a wait inside the pool is one for Postgres, which has not
        # confirmed the end of what was cancelled.
        self._slots = asyncio.Semaphore(size)
        # One for each bucket, made when first used.
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run one statement and return its rows."""
        async with self._connection(self._timeout_s) as connection:
            return await connection.fetch(query, *arguments)

    async def fetch_row(self, query: str, *arguments: Any) -> asyncpg.Record | None:
        """Run one statement and return its first row, None where it has none."""
        async with self._connection(self._timeout_s) as connection:
            return await connection.fetchrow(query, *arguments)

    async def ping(self) -> None:
        """Return if Postgres answers, on the connection that is kept for this: requests that fill the pool say nothing
        about Postgres.
        """
        async with self._connection(self._timeout_s, has_slot=True) as connection:
            await connection.fetchrow("SELECT")

    async def time_s(self) -> float:
        """Read Postgres's clock in epoch seconds."""
        [row] = await self.fetch("SELECT extract(epoch FROM clock_timestamp())::float8 AS now_s")
        return float(row["now_s"])

    @asynccontextmanager
    async def transaction(
        self, timeout_s: float | None = None, *, bucket: int | None = None
    ) -> AsyncGenerator[Connection, None]:
        """Run the body in a transaction whose every step, the commit too, is under one deadline.

        `bucket`: the one whose head in the revocation log the transaction will lock. Such transactions of a process
        take turns before they take a connection: those that wait for a held head would take the whole pool.
        """
        async with self._connection(timeout_s or self._timeout_s, bucket) as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def _connection(
        self, timeout_s: float, bucket: int | None = None, *, has_slot: bool = False
    ) -> AsyncGenerator[Connection, None]:
        self._breaker.enter()
        deadline = anyio.current_time() + timeout_s
        asked_at = math.inf
        try:
            # The deadline is outside of both acquire and query: asyncpg's own timeouts wait for a frozen server's
            # answer to their cancel request.
            with anyio.fail_after(timeout_s):
                async with AsyncExitStack() as stack:
                    if bucket is not None:
                        await stack.enter_async_context(self._turns[bucket])
                    if not has_slot:
                        await stack.enter_async_context(self._slots)
                    asked_at = anyio.current_time()
                    connection = await stack.enter_async_context(self._pooled())
                    with _losses_named(connection):
                        yield connection
        except _BUSY as error:
            raise Unavailable("user_store", is_busy=True) from error
        except _REFUSED as error:
            raise Unavailable("user_store") from error
        except TimeoutError as error:
            # What was spent on waiting for our own requests leaves Postgres less than its own timeouts.
            is_busy = deadline - asked_at < timeout_s * STATEMENT_SHARE
            if not is_busy:
                self._breaker.failed()
            raise Unavailable("user_store", is_busy=is_busy) from error
        except _UNAVAILABLE as error:
            self._breaker.failed()
            raise Unavailable("user_store") from error
        self._breaker.succeeded()

    @asynccontextmanager
    async def _pooled(self) -> AsyncGenerator[Connection, None]:
        connection = await self._pool.acquire()
        try:
            yield connection
        finally:
            # asyncpg ends a connection that it cannot reset, such as one that was cut off amid a statement. By then the
            # outcome of its use is decided, so that is no error of the request. And a task of its own holds the error:
            # a request that is cancelled once more would leave nobody to retrieve it.
            release = asyncio.ensure_future(self._pool.release(connection))
            release.add_done_callback(_retrieve)
            await asyncio.wait([release])


def _retrieve(task: "asyncio.Future[None]") -> None:
    if not task.cancelled():
        task.exception()


@contextmanager
def _losses_named(connection: Connection) -> Generator[None, None, None]:
    """Raise a lost connection as one. asyncpg raises `InterfaceError` for it, and for a wrong number of arguments: a
    fault of ours, which must not look like an outage.
    """
    try:
        yield
    except asyncpg.InterfaceError as error:
        if not _is_lost(connection):
            raise
        raise ConnectionResetError("The connection to Postgres was lost.") from error


def _is_lost(connection: Connection) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True  # The pool has taken it back, as it does with what is lost.


class _PooledConnection(asyncpg.Connection):
    """A connection of a process that changes nothing in its session: `SET LOCAL`, transaction locks, no `LISTEN`."""

    def get_reset_query(self) -> str:
        """Return nothing to run. asyncpg's own would undo the timeouts, at the cost of a round trip for each use."""
        return ""


async def limit_session(connection: "asyncpg.Connection[asyncpg.Record]", timeout_s: float) -> None:
    """Set the session's timeouts, and the keepalives of both ends. By a statement: a pooler such as PgBouncer refuses
    them as parameters of the start.
    """
    lost_s = math.ceil(timeout_s)
    interval_s = math.ceil(timeout_s / KEEPALIVES)
    limits = {
        "lock_timeout": milliseconds(timeout_s * LOCK_SHARE),
        "statement_timeout": milliseconds(timeout_s * STATEMENT_SHARE),
        "idle_in_transaction_session_timeout": milliseconds(timeout_s),
        "tcp_keepalives_idle": str(lost_s),
        "tcp_keepalives_interval": str(interval_s),
        "tcp_keepalives_count": str(KEEPALIVES),
        "tcp_user_timeout": milliseconds(2 * timeout_s),
    }
    await connection.execute(";".join(f"SET {name} = {value}" for name, value in limits.items()))
    # asyncpg has no option for the socket.
    own = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    if own is None or own.family not in (socket.AF_INET, socket.AF_INET6):
        return
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": lost_s,
        "TCP_KEEPINTVL": interval_s,
        "TCP_KEEPCNT": KEEPALIVES,
        "TCP_USER_TIMEOUT": int(2000 * timeout_s),
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has them all
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def milliseconds(seconds: float) -> str:
    """Return a timeout as Postgres reads it; never 0, which would be none."""
    return str(max(1, int(seconds * 1000)))


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncGenerator[Database, None]:
    """Open a pool that connects when first used: authd starts, and says so, while Postgres is unavailable."""
    timeout_s = settings.database_timeout_s
    size = settings.database_pool_per_worker

    async def limit(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        await limit_session(connection, timeout_s)

    pool = asyncpg.create_pool(
        settings.database_url.reveal(),
        min_size=0,
        max_size=size + 1,  # for ping()
        timeout=timeout_s,
        command_timeout=2 * timeout_s,  # only a guard: see _connection()
        connection_class=_PooledConnection,
        init=limit,
        server_settings={"application_name": "authd"},
    )
    await pool
    try:
        yield Database(pool, timeout_s, size)
    finally:
        # A frozen server never answers a polite close.
        with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True) as closing:
            await pool.close()
        if closing.cancelled_caught:
            pool.terminate()
