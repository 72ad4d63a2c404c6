"""The objects of a replica that carry events, over real stores."""

import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from aiokafka import ConsumerRecord
from blockbuster import BlockBuster
from support.deployment import make_ring, unguarded
from support.settings import settings_over
from support.waiting import eventually

from authd.assembly.postgres import PostgresStores
from authd.assembly.redis import RedisStores
from authd.assembly.services import Intervals, Services
from authd.config import BUCKETS, Settings
from authd.events.contract import EndingReason, Event
from authd.infra.caller import Caller
from authd.infra.postgres.database import Database, open_database
from authd.infra.redis.client import RedisClient, open_redis
from authd.infra.subject import Subject
from authd.login.redis import Throttle
from authd.sessions.feed import RevocationFeed
from authd.sessions.redis import LiveSession, Opened, Owner
from authd.sessions.relay import EventRelay
from authd.tokens.refresh import SESSION_ID_BYTES, RefreshToken

PATIENCE_S = 60.0
CLIENT = Caller("192.0.2.1", "a browser")
KEY_ID = 1


@dataclass
class Node:
    """What one process has of events. Its relay runs, and its publisher where it was asked for."""

    services: Services
    settings: Settings = field(init=False)
    database: Database = field(init=False)
    redis: RedisClient = field(init=False)
    remembered: PostgresStores = field(init=False)
    decided: RedisStores = field(init=False)
    throttle: Throttle = field(init=False)
    feed: RevocationFeed = field(init=False)
    relay: EventRelay = field(init=False)
    _subjects: dict[int, Subject] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.settings, self.remembered, self.decided = (
            self.services.settings,
            self.services.postgres,
            self.services.redis,
        )
        self.database, self.redis = self.remembered.database, self.decided.client
        self.throttle, self.feed, self.relay = self.services.throttle, self.services.feed, self.services.relay

    def offer_lane(self, lane: int) -> None:
        self.services.offer_lane(lane)

    async def register(self, full_name: str = "") -> int:
        """A new user's id."""
        name = f"{secrets.token_hex(8)}@example.org"
        user = await self.remembered.creation.create(name, name, full_name, "hash")
        assert user is not None
        self.offer_lane(user.id % BUCKETS)
        await self.subject(user.id)
        return user.id

    async def add_user(self, user_id: int) -> int:
        """A user with an id of the test's choice, for what shares a bucket."""
        await self.database.fetch(
            "INSERT INTO users (id, username, username_key, full_name, password_hash) OVERRIDING SYSTEM VALUE "
            "VALUES ($1, $2, $2, '', 'hash')",
            user_id,
            f"{user_id}@example.org",
        )
        await self.subject(user_id)
        return user_id

    async def subject(self, user_id: int) -> Subject:
        """Who has the id, known from the registration on, for Postgres may be away later."""
        if user_id not in self._subjects:
            (row,) = await self.database.fetch("SELECT incarnation FROM users WHERE id = $1", user_id)
            self._subjects[user_id] = Subject(user_id, row["incarnation"])
        return self._subjects[user_id]

    async def open(self, user_id: int, epoch: int = 1, *, offer: bool = True) -> LiveSession:
        """What a login does in Redis; what it evicts is left to the relay."""
        session_id = secrets.token_bytes(SESSION_ID_BYTES)
        owner = Owner(await self.subject(user_id), epoch, 0)
        answer = await self.decided.sessions.open(owner, session_id, KEY_ID, CLIENT, 0)
        assert isinstance(answer, Opened), answer
        if offer:
            self.relay.offer(user_id % BUCKETS)
        return answer.session

    async def reuse(self, user_id: int, session: LiveSession) -> None:
        """Rotate a session and present the old token again. Needs a grace of 0."""
        token = RefreshToken(
            key_id=KEY_ID,
            user_id=user_id,
            incarnation=(await self.subject(user_id)).incarnation,
            session_id=session.id,
            epoch=1,
            counter=session.counter,
            created_ms=session.created_ms,
            issued_ms=session.issued_ms,
            expires_ms=session.expires_ms,
            authenticated_s=session.authenticated_s,
        )
        await self.decided.sessions.rotate(token, KEY_ID, CLIENT, 0)

        async def is_reused() -> bool:
            answer = await self.decided.sessions.rotate(token, KEY_ID, CLIENT, 0)
            return getattr(answer, "status", "") in ("reused", "ended")

        await eventually(is_reused)

    async def end(self, user_id: int, session: LiveSession) -> None:
        await self.remembered.endings.end_sessions(await self.subject(user_id), [session.id], "logout")
        self.offer_lane(user_id % BUCKETS)

    async def end_all(self, user_id: int, reason: EndingReason = "logout") -> None:
        assert await self.remembered.endings.end_all(await self.subject(user_id), reason) is not None
        self.offer_lane(user_id % BUCKETS)

    async def rows(self, channel: str = "events", user_id: int | None = None) -> list[Any]:
        """What waits in the outbox, in its order."""
        return await self.database.fetch(
            "SELECT * FROM outbox WHERE channel = $1 AND ($2::bigint IS NULL OR user_id = $2) ORDER BY id",
            channel,
            user_id,
        )

    async def ended(self, user_id: int) -> list[tuple[bytes | None, str]]:
        rows = await self.database.fetch(
            "SELECT session_id, reason FROM revocations WHERE user_id = $1 ORDER BY number", user_id
        )
        return [(row["session_id"], row["reason"]) for row in rows]

    async def until_relayed(self) -> None:
        async def is_relayed() -> bool:
            return not await self.decided.streams.filled()

        await eventually(is_relayed)

    async def until_published(self) -> None:
        async def is_published() -> bool:
            return (await self.remembered.outbox.backlog()).events == 0

        await eventually(is_published)


def make_settings(database_url: str, redis_url: str, brokers: str = "127.0.0.1:1", **changes: Any) -> Settings:
    """Of a deployment of the test's own. By default its events are enqueued, and no publisher can send them."""
    name = f"t-{secrets.token_hex(8)}"
    defaults = {
        "deployment": name,
        "kafka_bootstrap_servers": (brokers,),
        "kafka_registration_topic": f"{name}.registrations",
        "kafka_events_topic": f"{name}.events",
        "kafka_revocations_topic": f"{name}.revocations",
        "kafka_timeout_s": 3.0,
        "redis_timeout_s": 5.0,
        "database_timeout_s": 5.0,
        "refresh_grace_s": 0,
        "max_active_sessions": 3,
    }
    return settings_over(database_url, redis_url, **(defaults | changes))


@asynccontextmanager
async def open_node(
    settings: Settings,
    guard: BlockBuster,
    *,
    relays: bool = True,
    publishes: bool = False,
    **intervals: float,
) -> AsyncIterator[Node]:
    """A replica. Its revocation feed always runs, its publisher where asked for, perhaps with intervals of its own."""
    async with open_database(settings) as database, open_redis(settings) as redis:
        with unguarded(guard):
            postgres, decided = PostgresStores(settings, database), RedisStores(settings, redis)
            services = Services(settings, postgres, decided, make_ring(), intervals=Intervals(**intervals))
        async with anyio.create_task_group() as tree:
            await tree.start(services.feed.run)
            if publishes and services.producer is not None and services.publisher is not None:
                await tree.start(services.producer.run)
                await tree.start(services.publisher.run)
            if relays:
                await tree.start(services.relay.run)
            yield Node(services)
            tree.cancel_scope.cancel()


def header(record: ConsumerRecord, name: str) -> str:
    value: bytes = dict(record.headers)[name]
    return value.decode()


def make_event(user_id: int, value: bytes = b'{"a": 1}') -> Event:
    """An event that only the outbox and a broker look at."""
    return Event(
        id=uuid.uuid4(),
        channel="registration",
        type="user.registered",
        version=1,
        user_id=user_id,
        key=None,
        value=value,
    )
