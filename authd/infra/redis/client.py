"""The connection to Redis, Sentinel or Redis Cluster, and the one way to run a script: by SHA, under a deadline.

A script that changes state gets its deadline in Redis's own time and answers `late` instead of acting after it: a
frozen Redis runs abandoned commands when it wakes, and no state may change that its client never hears of.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import anyio
import msgspec
import structlog
from redis import exceptions as redis_errors
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ResponseError

from authd.config import ConfigError, Settings
from authd.errors import Unavailable
from authd.infra.tasks.breaker import Breaker
from authd.infra.tasks.deadline import Deadline

CLOSE_TIMEOUT_S = 2.0
#: A lost connection is tried once more (redis-py's default is ten times); the deadline stands outside of both.
RETRIES = 1
#: Connections for what redis-py asks on its own, such as the slots of a cluster.
SPARE_CONNECTIONS = 8

#: Addresses of servers that are remembered. One that was forgotten counts as new, which is always safe.
SERVERS_MAX = 256

#: Errors that say "not now".
_UNAVAILABLE = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ClusterError,
    redis_errors.RedisClusterException,
    OSError,
    TimeoutError,
)
#: Errors of a server that answers, such as one without memory. They cost no wait, so they do not open the breaker,
#: which would refuse the reading requests too.
_REFUSED = (redis_errors.RedisError,)

_RUN_ID = re.compile(rb"run_id:([0-9a-f]+)")
_EVICTION = re.compile(rb"maxmemory_policy:([a-z-]+)")
#: The one policy under which Redis refuses what it has no memory for, and throws nothing away.
NO_EVICTION = "noeviction"
_log = structlog.get_logger()
T = TypeVar("T")

_INCLUDE = re.compile(r"^-- include: ([\w/]+)$", re.MULTILINE)


class Servers:
    """Notices that a connection leads to another server than before, or to one that was started again: what Redis had
    decided may be lost, and whoever follows the revocation log has to look at it again.
    """

    def __init__(self) -> None:
        self._run_ids: dict[object, str] = {}
        self.generation = 0
        #: What each server does when it has no memory left.
        self.eviction_policies: dict[object, str] = {}

    async def on_connect(self, connection: Any) -> None:
        await connection.on_connect()
        # One that nobody had: where it is not known, every connection counts as new.
        run_id = await _info(connection, "server", _RUN_ID) or secrets.token_hex(8)
        # Behind Sentinel all servers are one, for only the master is used; in a cluster each address has its slots.
        place = "" if isinstance(connection, SentinelManagedConnection) else (connection.host, connection.port)
        if self._run_ids.get(place) != run_id:
            self._remember(place, run_id)
            self.generation += 1
            policy = await _info(connection, "memory", _EVICTION) or NO_EVICTION
            self.eviction_policies[place] = policy
            if policy != NO_EVICTION:
                _log.warning("redis_evicts", policy=policy, server=f"{connection.host}:{connection.port}")

    def _remember(self, place: object, run_id: str) -> None:
        self._run_ids.pop(place, None)
        self._run_ids[place] = run_id
        if len(self._run_ids) > SERVERS_MAX:
            # The one whose last start is longest ago: in a cluster whose nodes come and go, addresses have no end.
            oldest = next(iter(self._run_ids))
            del self._run_ids[oldest]
            self.eviction_policies.pop(oldest, None)


async def _info(connection: Any, section: str, wanted: re.Pattern[bytes]) -> str | None:
    with suppress(ResponseError):  # a user who may not ask
        await connection.send_command("INFO", section)
        found = wanted.search(bytes(await connection.read_response(disable_decoding=True)))
        return found[1].decode() if found else None
    return None


class RedisSettings(msgspec.Struct, frozen=True):
    deployment: str
    redis_timeout_s: float
    redis_pool_per_worker: int


class RedisClient:
    """Runs scripts. Every method raises `Unavailable("session_store")` within `redis_timeout_s` when it cannot."""

    def __init__(self, client: Redis | RedisCluster, servers: Servers, settings: RedisSettings) -> None:
        self._client = client
        self._servers = servers
        self._timeout_s = settings.redis_timeout_s
        # The pools of a cluster and of Sentinel do not wait for a free connection, they raise.
        self._turns = asyncio.Semaphore(settings.redis_pool_per_worker)
        self._breakers: dict[str, Breaker] = {}
        self._prefix = f"authd:{settings.deployment}:"
        # What Redis's clock reads at monotonic zero, in ms, as last heard from each bucket's node. The reply has
        # travelled since, so it is never ahead, and a deadline made from it is never late.
        self._clock_ms: dict[int, int] = {}
        self._clock = self.script(__package__, "clock")

    @property
    def generation(self) -> int:
        """Raised whenever a server may have lost what it had decided."""
        return self._servers.generation

    @property
    def eviction_policies(self) -> set[str]:
        """Return what the servers that were met do when they have no memory left: `noeviction`, if all is well."""
        return set(self._servers.eviction_policies.values())

    def key(self, bucket: int, name: str) -> str:
        """Return a key in the bucket's slot."""
        return f"{self._prefix}{{{bucket}}}:{name}"

    def script(self, package: str, name: str) -> AsyncScript:
        """Return the script `<name>.lua` of the package. It is loaded into Redis when first used, and again whenever it
        was forgotten.
        """
        return self._client.register_script(load_script(package, name))

    async def read(self, script: AsyncScript, keys: Sequence[str], *arguments: Any) -> Any:
        """Run a script that may also run late or twice, since that does no harm."""
        return await self._call(keys[0], script(keys, arguments))

    async def decide(self, script: AsyncScript, bucket: int, keys: Sequence[str], *arguments: Any) -> list[Any]:
        """Run a script whose first argument is its deadline in ms of Redis's time, and whose reply begins with a status
        and Redis's time. The caller never sees the status `late`.
        """
        deadline_ms = int((time.monotonic() + self._timeout_s) * 1000)
        return await self._call(keys[0], self._decide(script, bucket, keys, deadline_ms, arguments))

    async def _decide(
        self, script: AsyncScript, bucket: int, keys: Sequence[str], deadline_ms: int, arguments: Sequence[Any]
    ) -> list[Any]:
        # The first call on a bucket, and the first after its clock jumped ahead, comes late and learns the clock.
        for _ in range(2):
            clock_ms = self._clock_ms.get(bucket, -deadline_ms)
            reply: list[Any] = await script(keys, (deadline_ms + clock_ms, *arguments))
            self._clock_ms[bucket] = int(reply[1]) - int(time.monotonic() * 1000)
            if reply[0] != b"late":
                return reply
        raise Unavailable("session_store")

    async def command(self, name: str, key: str, *arguments: Any) -> Any:
        """Run one command on one key."""
        return await self._call(key, self._client.execute_command(name, key, *arguments))

    async def commands(self, name: str, keys: Sequence[str]) -> list[Any]:
        """Run one command on each key, in one pipeline for each node."""
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.execute_command(name, key)
        return list(await self._call(keys[0], pipeline.execute()))

    async def ping(self) -> None:
        await self._call(self.key(0, ""), self._client.ping())

    async def time_s(self) -> float:
        """Read Redis's clock in epoch seconds; in a cluster that of the node which has bucket 0."""
        seconds, micros = await self.read(self._clock, [self.key(0, "clock")])
        return int(seconds) + int(micros) / 1_000_000

    async def _call(self, key: str, call: Awaitable[T]) -> T:
        """Return the result of one call, under a deadline and the breaker of the key's part, of which not the context
        manager is used: this is in the way of every request.
        """
        breaker = self._breaker(key)
        try:
            breaker.enter()
            with Deadline(self._timeout_s):
                async with self._turns:
                    result = await call
                breaker.succeeded()
                return result
            raise TimeoutError
        except _UNAVAILABLE as error:
            breaker.failed()
            raise Unavailable("session_store") from error
        except redis_errors.DataError:
            raise  # an argument that no server could take: a fault of ours
        except _REFUSED as error:
            raise Unavailable("session_store") from error
        except (AttributeError, RuntimeError) as error:
            if not _is_lost_connection(error):
                raise
            breaker.failed()
            raise Unavailable("session_store") from error
        finally:
            if isinstance(call, Coroutine):
                call.close()  # close the coroutine if the breaker refused it

    def _breaker(self, key: str) -> Breaker:
        # In a cluster a bucket stands for the node that holds it: one that is unavailable must not cost the others'
        # users.
        part = key.partition("}")[0] if isinstance(self._client, RedisCluster) else ""
        if part not in self._breakers:
            self._breakers[part] = Breaker(lambda: Unavailable("session_store"))
        return self._breakers[part]


def _is_lost_connection(error: AttributeError | RuntimeError) -> bool:
    """Tell the errors of a connection that redis-py closed under the task which uses it, as it does while a cluster
    is down, from a fault: its writer is None, or uvloop refuses to write to its transport. And it walks through its
    nodes while they change.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__")) if trace is not None else ""
    if isinstance(error, AttributeError):
        return error.obj is None and module.startswith("redis.")
    return module.startswith(("uvloop.", "redis."))


def load_script(package: str, name: str) -> str:
    """Return the script's text with the files that it includes: those of its own package, or as `events/event_add`."""

    def read(found: re.Match[str]) -> str:
        other, _, include = found[1].rpartition("/")
        return (files(f"authd.{other}" if other else package) / f"{include}.lua").read_text("utf-8").rstrip()

    return _INCLUDE.sub(read, (files(package) / f"{name}.lua").read_text("utf-8"))


@asynccontextmanager
async def open_redis(settings: Settings) -> AsyncGenerator[RedisClient, None]:
    """Yield a client that connects when first used: authd starts, and says so, while Redis is unavailable."""
    servers = Servers()
    try:
        client = _make_client(settings, servers)
    except ValueError:  # redis-py's, of a parameter: its text may repeat the value
        raise ConfigError("AUTHD_REDIS_URL has a parameter with an unusable value.") from None
    try:
        yield RedisClient(client, servers, settings.section(RedisSettings))
    finally:
        with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await client.aclose()
            if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
                await client.connection_pool.sentinel_manager.aclose()


def _make_client(settings: Settings, servers: Servers) -> Redis | RedisCluster:
    """`redis://host:port/db` (`rediss://` for TLS), `redis://a:1,b:2,c:3` for a cluster, and
    `redis+sentinel://a:1,b:2/service` (`rediss+sentinel://`) for Sentinel.
    """
    url = urlsplit(settings.redis_url.reveal())
    credentials, _, hosts = url.netloc.rpartition("@")
    nodes = [host.strip() for host in hosts.split(",") if host.strip()]
    prefix = f"{credentials}@" if credentials else ""
    if url.scheme not in ("redis", "rediss", "redis+sentinel", "rediss+sentinel") or not nodes:
        raise ConfigError("AUTHD_REDIS_URL must be redis://, rediss:// or redis+sentinel:// with at least one host.")
    limits: dict[str, Any] = {
        "socket_timeout": settings.redis_timeout_s,
        "socket_connect_timeout": settings.redis_timeout_s,
        "retry": Retry(NoBackoff(), RETRIES),
        "max_connections": settings.redis_pool_per_worker + SPARE_CONNECTIONS,
    }
    if url.scheme.endswith("+sentinel"):
        plain = urlunsplit((url.scheme.split("+")[0], prefix + nodes[0], "", url.query, ""))
        limits["redis_connect_func"] = servers.on_connect
        return _make_sentinel_client(plain, nodes, url.path.strip("/") or "mymaster", limits)
    if len(nodes) > 1:
        seeds = [ClusterNode(*_host_and_port(node, 6379)) for node in nodes]
        first = urlunsplit((url.scheme, prefix + nodes[0], url.path, url.query, ""))
        # A slot that moved is learned alone. By default, every fifth closes all connections, in use or not.
        cluster = RedisCluster.from_url(first, startup_nodes=seeds, reinitialize_steps=0, **limits)
        for kwargs in (cluster.nodes_manager.connection_kwargs, *(seed.connection_kwargs for seed in seeds)):
            kwargs["redis_connect_func"] = servers.on_connect
        return cluster
    limits["redis_connect_func"] = servers.on_connect
    # Each call is under a deadline of ours and has a turn; redis-py's own of both would cost a task and a lock.
    options = limits | {"socket_timeout": None}
    return Redis.from_pool(ConnectionPool.from_url(settings.redis_url.reveal(), **options))


def _make_sentinel_client(url: str, nodes: Sequence[str], service: str, limits: dict[str, Any]) -> Redis:
    """Return a client that asks for the master's address at each new connection: a failover needs no restart."""
    options = {name: value for name, value in parse_url(url).items() if name not in ("host", "port")}
    options["ssl"] = options.pop("connection_class", None) is not None
    # A sentinel that is unavailable leaves time to ask each of the others and to reach the master.
    timeout_s = limits["socket_timeout"] / (len(nodes) + 1)
    impatience = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": Retry(NoBackoff(), 0)}
    # The credentials are the master's.
    of_sentinels = {name: value for name, value in options.items() if name not in ("username", "password")}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [_host_and_port(node, 26379) for node in nodes], sentinel_kwargs=of_sentinels | impatience
    )
    return sentinel.master_for(service, **limits | options)  # type: ignore[no-any-return]


def _host_and_port(node: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{node}")
    return parts.hostname or "127.0.0.1", parts.port or default_port
