"""A deployment for one test: a database and Redis keys of its own, and the real objects of its replicas.

Its fixtures are known to every test, as those of `stores` are.
"""

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
import pytest
from blockbuster import BlockBuster
from redis.asyncio import Redis, RedisCluster
from redis.commands.core import AsyncScript
from support.settings import settings_over
from support.stores import client_url
from support.waiting import eventually

from authd.assembly.postgres import PostgresStores
from authd.assembly.redis import RedisStores
from authd.assembly.services import Services
from authd.config import BUCKETS, Secret, Settings
from authd.embedded import PostgresServer
from authd.errors import RefreshRefused, Refusal, Unavailable, UserDisabled
from authd.events.contract import EndingReason
from authd.infra.caller import Caller
from authd.infra.postgres.database import Database, open_database
from authd.infra.redis.client import RedisClient, open_redis
from authd.infra.subject import Subject
from authd.login.redis import Throttle
from authd.passwords.formats import hash_password
from authd.passwords.hasher import Hasher
from authd.sessions.feed import RevocationFeed
from authd.sessions.postgres import Revocations
from authd.sessions.redis import Owner, SessionStore
from authd.sessions.relay import EventRelay
from authd.sessions.sessions import Sessions, TokenPair
from authd.tokens.access import TokenMint
from authd.tokens.refresh import RefreshToken
from authd.tokens.ring import DataKey, KeyRing, MacKey
from authd.tokens.seal import shared_signing_key
from authd.users.postgres import User, Users
from authd.users.redis import UserCache

PASSWORD = "correct horse"
COST = 4
PASSWORD_HASH = hash_password(PASSWORD, COST)
CLIENT = Caller("192.0.2.1", "a browser")
PATIENCE_S = 30.0
GRACE_S = 10
JWT_SECRET = Secret("j" * 32)
UNLOGGED, LOGGED, LIVE = 2, 3, 4
#: The offsets of session_format.lua's live value, old and new.
COUNTER, CREATED, ISSUED, EXPIRES = slice(9, 15), slice(15, 21), slice(21, 27), slice(27, 33)


@dataclass
class ScriptCall:
    """One run of a script, as redis-py was asked for it. `reply` is None where there was none."""

    script: AsyncScript
    keys: list[str]
    arguments: list[Any]
    reply: Any = None

    @property
    def status(self) -> str:
        return self.reply[0].decode() if isinstance(self.reply, list) else ""


#: The calls that this task and its children make, for a test that sets it.
heard: ContextVar[list[ScriptCall]] = ContextVar("heard")


@dataclass
class Replica:
    """The objects of one process."""

    settings: Settings
    ring: KeyRing
    database: Database
    redis: RedisClient
    clock: Callable[[], float] = time.time
    services: Services = field(init=False)
    mint: TokenMint = field(init=False)
    users: Users = field(init=False)
    store: SessionStore = field(init=False)
    cache: UserCache = field(init=False)
    throttle: Throttle = field(init=False)
    hasher: Hasher = field(init=False)
    revocations: Revocations = field(init=False)
    feed: RevocationFeed = field(init=False)
    relay: EventRelay = field(init=False)
    sessions: Sessions = field(init=False)

    def __post_init__(self) -> None:
        postgres, redis = PostgresStores(self.settings, self.database), RedisStores(self.settings, self.redis)
        self.services = Services(self.settings, postgres, redis, self.ring, clock=self.clock)
        self.users, self.revocations, self.disabling = postgres.users, postgres.revocations, postgres.disabling
        self.endings = postgres.endings
        self.store, self.cache = redis.sessions, redis.user_cache
        self.mint, self.throttle, self.hasher = self.services.mint, self.services.throttle, self.services.hasher
        self.feed, self.relay, self.sessions = self.services.feed, self.services.relay, self.services.sessions

    async def login(self, user: User, password: str = PASSWORD, caller: Caller = CLIENT) -> TokenPair:
        return await self.services.logins.log_in(user.username, password, caller)

    async def open(self, user: User, caller: Caller = CLIENT) -> TokenPair:
        """A login whose password is known to be right, for tests with thousands of them."""
        return await self.sessions.open(user, caller)

    async def refresh(self, refresh_token: str, caller: Caller = CLIENT) -> TokenPair:
        return await self.sessions.refresh(refresh_token, caller)

    async def outcome(self, refresh_token: str) -> str:
        """The code of a refresh's refusal, or `ok`."""
        try:
            await self.refresh(refresh_token)
        except (RefreshRefused, UserDisabled) as refusal:
            return refusal.code
        return "ok"

    async def bearer(self, access_token: str) -> str:
        """The code of an access token's refusal, or `ok`."""
        try:
            await self.services.profiles.read(access_token)
        except Refusal as refusal:
            return refusal.code
        return "ok"

    async def end_all(self, user: User, reason: EndingReason = "logout") -> None:
        """What every ending of all sessions does, with no session needed to ask for it."""
        row = await self.endings.end_all(user.subject, reason)
        assert row is not None
        await self.feed.wait_applied(row.bucket, row.number)

    async def set_disabled(self, user: User, reason: Any) -> None:
        row = await self.disabling.set_disabled(user.username, disabled=reason == "user_disabled")
        assert row is not None
        await self.feed.wait_applied(row.bucket, row.number)

    def token(self, pair: TokenPair) -> RefreshToken:
        return self.mint.read_refresh(pair.refresh_token)


class World(Replica):
    """The deployment, seen from its first replica, and the ways to look at it and to break it."""

    raw: "Redis | RedisCluster"
    is_cluster: bool
    stack: AsyncExitStack
    guard: BlockBuster

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Who registered last with an id.
        self._subjects: dict[int, Subject] = {}

    async def replica(self, *, clock: Callable[[], float] = time.time, **changes: Any) -> Replica:
        """Another process of the deployment, or one with other settings."""
        settings = msgspec.structs.replace(self.settings, **changes)
        return await self.stack.enter_async_context(_opened(Replica, settings, self.ring, self.guard, clock))

    async def register(self, name: str = "") -> User:
        key = name or f"{secrets.token_hex(8)}@example.org"
        user = await self.services.postgres.creation.create(key, key, "Some Body", PASSWORD_HASH)
        assert user is not None
        found = await self.users.find(user.id, None)
        assert found is not None
        self._subjects[found.id] = found.subject
        return found

    async def find(self, user: User) -> User:
        """The user as its row is now."""
        found = await self.users.find(*user.subject)
        assert found is not None
        return found

    async def now_ms(self) -> int:
        seconds, micros = await self.raw.eval("return redis.call('TIME')", 1, "any")
        return int(seconds) * 1000 + int(micros) // 1000

    async def until_ms(self, time_ms: float) -> None:
        """Wait until Redis's clock is past a time."""

        async def is_past() -> bool:
            return await self.now_ms() > time_ms

        await eventually(is_past)

    async def until_grace_is_over(self, pair: TokenPair) -> None:
        await self.until_ms(self.token(pair).issued_ms + self.settings.refresh_grace_s * 1000)

    def hash_key(self, user_id: int) -> str:
        return self.redis.key(user_id % BUCKETS, f"user:{self._subjects[user_id]}")

    def applied_key(self, user_id: int) -> str:
        return self.redis.key(user_id % BUCKETS, "applied")

    async def applied(self, user_id: int) -> int:
        return int(await self.raw.get(self.applied_key(user_id)) or 0)

    async def values(self, user_id: int) -> dict[bytes, bytes]:
        """The user's sessions and tombstones, packed."""
        fields: dict[Any, Any] = await self.raw.hgetall(self.hash_key(user_id))
        return {k: v for k, v in fields.items() if k != b"e"}

    async def live(self, user_id: int) -> dict[bytes, bytes]:
        return {k: v for k, v in (await self.values(user_id)).items() if v[0] == LIVE}

    async def change(self, user_id: int, session_id: bytes, **numbers: int) -> None:
        """Set numbers of a live value in Redis: `counter`, `created`, `issued`, `expires`."""
        value = bytearray((await self.values(user_id))[session_id])
        for name, number in numbers.items():
            place = {"counter": COUNTER, "created": CREATED, "issued": ISSUED, "expires": EXPIRES}[name]
            value[place] = number.to_bytes(6, "big")
        await self.raw.hset(self.hash_key(user_id), session_id, bytes(value))

    async def rows(self, user_id: int) -> list[tuple[bytes | None, int | None, str]]:
        """The revocation log of a user: session id, epoch and reason, in order."""
        records = await self.database.fetch(
            "SELECT session_id, epoch, reason FROM revocations WHERE user_id = $1 ORDER BY number", user_id
        )
        return [(r["session_id"], r["epoch"], r["reason"]) for r in records]

    async def until_rows(self, user_id: int, count: int) -> list[tuple[bytes | None, int | None, str]]:
        rows: list[tuple[bytes | None, int | None, str]] = []

        async def are_there() -> bool:
            nonlocal rows
            # A busy machine exceeds the short timeouts of some worlds.
            with suppress(Unavailable):
                rows = await self.rows(user_id)
            return len(rows) >= count

        await eventually(are_there)
        return rows

    async def keys(self) -> list[str]:
        pattern = f"authd:{self.settings.deployment}:*"
        return sorted([key.decode() async for key in self.raw.scan_iter(match=pattern, count=1000)])

    async def wipe(self) -> None:
        """What is left of the deployment when Redis came back empty."""
        for key in await self.keys():
            await self.raw.delete(key)

    async def dump(self) -> dict[str, tuple[bytes | dict[bytes, bytes], int]]:
        """Every key with its value and the time it expires at."""
        found: dict[str, tuple[bytes | dict[bytes, bytes], int]] = {}
        for key in await self.keys():
            value: Any
            match await self.raw.type(key):
                case b"hash":
                    value = await self.raw.hgetall(key)
                case b"stream":
                    value = repr(await self.raw.xrange(key)).encode()
                case _:
                    value = await self.raw.get(key)
            found[key] = (value, await self.raw.pexpiretime(key))
        return found


def owner(user: User) -> Owner:
    return Owner(user.subject, user.epoch, user.registered_ms)


MakeWorld = Callable[..., Awaitable[World]]


async def answers(ask: Callable[[], Awaitable[object]]) -> bool:
    try:
        await ask()
    except Unavailable:
        return False
    return True


async def together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Make all calls at once and return their results in order; a refusal is a result."""
    results: list[Any] = [None] * len(calls)

    async def keep(index: int) -> None:
        try:
            results[index] = await calls[index]()
        except Refusal as refusal:
            results[index] = refusal

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(keep, index)
    return results


def make_ring() -> KeyRing:
    return KeyRing(
        [shared_signing_key(JWT_SECRET)],
        [MacKey(1, secrets.token_bytes(32), 0.0)],
        [DataKey(2, secrets.token_bytes(32))],
    )


@contextmanager
def unguarded(guard: BlockBuster) -> Iterator[None]:
    """What the service does once at its start may block."""
    guard.deactivate()
    try:
        yield
    finally:
        guard.activate()


@asynccontextmanager
async def _opened(
    kind: type[Replica], settings: Settings, ring: KeyRing, guard: BlockBuster, clock: Callable[[], float] = time.time
) -> AsyncIterator[Any]:
    async with open_database(settings) as database, open_redis(settings) as redis:
        with unguarded(guard):
            replica = kind(settings, ring, database, redis, clock)
        async with anyio.create_task_group() as tree:
            await tree.start(replica.feed.run)
            await tree.start(replica.hasher.run)
            yield replica
            tree.cancel_scope.cancel()


def cluster_url(urls: tuple[str, ...]) -> str:
    return "redis://" + ",".join(url.removeprefix("redis://") for url in urls)


def open_raw(redis_url: str) -> Redis | RedisCluster:
    """A client that is not authd's own."""
    first = redis_url.split(",")[0]
    return RedisCluster.from_url(first) if "," in redis_url else Redis.from_url(first)


@asynccontextmanager
async def open_world(database_url: str, redis_url: str, guard: BlockBuster, **changes: Any) -> AsyncIterator[World]:
    defaults = {
        "jwt_algorithm": "HS256",
        "jwt_secret": JWT_SECRET,
        "bcrypt_cost": COST,
        "redis_timeout_s": 10.0,
        "database_timeout_s": 10.0,
        "refresh_grace_s": GRACE_S,
        "max_login_attempts": 1000,
    }
    settings = settings_over(database_url, redis_url, **(defaults | changes))
    async with AsyncExitStack() as stack:
        world: World = await stack.enter_async_context(_opened(World, settings, make_ring(), guard))
        world.is_cluster = "," in redis_url
        world.raw = await stack.enter_async_context(open_raw(redis_url))
        world.stack, world.guard = stack, guard
        yield world
        await world.wipe()


@pytest.fixture
async def database_url(postgres_server: PostgresServer, database_template: str) -> AsyncIterator[str]:
    """A database of the test's own."""
    name = f"world_{secrets.token_hex(8)}"
    yield client_url(await postgres_server.create_database(name, database_template))
    await postgres_server.resume()
    await postgres_server.drop_database(name)


@pytest.fixture(scope="session", params=["single", "cluster"])
def redis_url(request: pytest.FixtureRequest) -> str:
    if request.param == "single":
        return str(request.getfixturevalue("redis_server").url)
    return cluster_url(request.getfixturevalue("redis_cluster").urls)


@pytest.fixture
async def make_world(database_url: str, redis_url: str, no_blocking: BlockBuster) -> AsyncIterator[MakeWorld]:
    """Makes the test's world, with settings of the test's own."""
    async with AsyncExitStack() as stack:

        async def make(**changes: Any) -> World:
            return await stack.enter_async_context(open_world(database_url, redis_url, no_blocking, **changes))

        yield make


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()


@pytest.fixture
def script_calls(monkeypatch: pytest.MonkeyPatch) -> list[ScriptCall]:
    """Every run of a script from now on, with its reply."""
    calls: list[ScriptCall] = []
    run = AsyncScript.__call__

    async def recorded(self: AsyncScript, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        call = ScriptCall(self, list(keys), list(args))
        calls.append(call)
        heard.get([]).append(call)
        call.reply = await run(self, keys, args, client)
        return call.reply

    monkeypatch.setattr(AsyncScript, "__call__", recorded)
    return calls
