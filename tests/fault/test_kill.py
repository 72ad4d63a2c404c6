"""authd killed and Kafka bounced, again and again: what was answered is there, and what is there is told, in order."""

import random
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import httpx
import jwt
import pytest
from anyio.abc import TaskStatus
from support.api import Api
from support.faults import PUBLISHED_S, FaultStores, retried, seeded
from support.kafka import events_in, topics
from support.process import ServiceProcess
from support.services import until_published

from authd.embedded import KafkaBroker

pytestmark = pytest.mark.timeout(240)

REGISTRATIONS, KILLS, CLIENTS = 2_000, 50, 8
#: How long a replica serves before it is killed, at most.
LIFE_MAX_S = 0.7
USERS, CHANGES = 50, 40
PASSWORD = "correct horse battery"


@pytest.fixture
def settings(broker: KafkaBroker) -> dict[str, str]:
    name = f"t{uuid.uuid4().hex[:12]}"
    return topics(name) | {"AUTHD_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers, "AUTHD_KAFKA_TIMEOUT_S": "3"}


@asynccontextmanager
async def bounced(broker: KafkaBroker, dice: random.Random, *, kills: int) -> AsyncIterator[None]:
    """Kafka comes and goes: frozen again and again, and killed so often. In the end it is there."""

    async def bounce(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        left = kills
        while True:
            await anyio.sleep(dice.uniform(0.5, 3))
            with anyio.CancelScope(shield=True):
                if left and dice.random() < 0.3:
                    left -= 1
                    await broker.kill()
                    await anyio.sleep(dice.uniform(0, 2))
                    await broker.start()
                else:
                    await broker.pause()
                    await anyio.sleep(dice.uniform(0, 4))
                    await broker.resume()

    async with anyio.create_task_group() as group:
        await group.start(bounce)
        yield
        group.cancel_scope.cancel()


class Fleet:
    """Replicas, of which one serves and is killed at a random moment, while the others start to take its place."""

    def __init__(self, replicas: list[ServiceProcess], dice: random.Random) -> None:
        self._replicas = replicas
        self._dice = dice
        self._ready = anyio.create_memory_object_stream[ServiceProcess](len(replicas))
        self.kills = 0
        self.serving: ServiceProcess | None = None

    async def run(self) -> None:
        """Return after the last kill, when all replicas are there."""
        with self._ready[0], self._ready[1]:
            async with anyio.create_task_group() as starts:
                for replica in self._replicas:
                    starts.start_soon(self._start, replica)
                while self.kills < KILLS:
                    self.serving = replica = await self._ready[1].receive()
                    await anyio.sleep(self._dice.uniform(0, LIFE_MAX_S))
                    self.serving = None
                    await replica.kill()
                    self.kills += 1
                    starts.start_soon(self._start, replica)
            self.serving = await self._ready[1].receive()

    async def _start(self, replica: ServiceProcess) -> None:
        await replica.start()
        self._ready[0].send_nowait(replica)


async def test_fifty_kills_amid_two_thousand_registrations_lose_no_user_and_no_event(
    parts: FaultStores, broker: KafkaBroker, settings: dict[str, str]
) -> None:
    dice = seeded()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(parts.services.prepared(**settings))
        others = [await stack.enter_async_context(parts.services.replica(first)) for _ in range(2)]
        fleet = Fleet([first, *others], dice)
        created: dict[int, str] = {}
        unknown: list[str] = []
        tried = 0

        async def client() -> None:
            nonlocal tried
            while tried < REGISTRATIONS or fleet.kills < KILLS:
                serving = fleet.serving
                # Spread over all the kills.
                if serving is None or tried >= REGISTRATIONS * (fleet.kills + 1) // KILLS:
                    await anyio.sleep(0.01)
                    continue
                tried += 1
                username = f"{uuid.uuid4().hex}@example.com"
                try:
                    async with serving.api() as api:
                        answer = await api.register(username, PASSWORD)
                except httpx.ConnectError:
                    tried -= 1
                    await anyio.sleep(0.01)
                # httpx stumbles over a connection that is reset while it is made.
                except (httpx.TransportError, AttributeError):
                    unknown.append(username)
                else:
                    assert answer.status_code == 201, answer.text
                    created[answer.json()["user_id"]] = username

        async with bounced(broker, dice, kills=2), anyio.create_task_group() as group:
            group.start_soon(fleet.run)
            for _ in range(CLIENTS):
                group.start_soon(client)
        assert fleet.serving is not None
        await until_published(fleet.serving, PUBLISHED_S)
        users = {row["id"]: row["username"] for row in await first.query("SELECT id, username FROM users")}
        assert created.items() <= users.items()
        assert set(users.values()) - set(created.values()) <= set(unknown)
        # It was worth it: users were left of whom no client heard, and most registrations were answered.
        assert len(created) > REGISTRATIONS / 2
        for topic in (settings["AUTHD_KAFKA_REGISTRATION_TOPIC"], settings["AUTHD_KAFKA_EVENTS_TOPIC"]):
            events = await events_in(broker, topic)
            assert {kind for kind, _ in events} == {"user.registered"}
            assert sorted(value["user_id"] for _, value in events) == sorted(users)
            assert all(value["username"] == users[value["user_id"]] for _, value in events)


async def test_over_two_replicas_and_a_bounced_broker_each_users_events_arrive_in_commit_order(
    parts: FaultStores, broker: KafkaBroker, settings: dict[str, str]
) -> None:
    dice = seeded()
    limit = anyio.Semaphore(8)
    async with (
        parts.services.running(**settings) as one,
        parts.services.replica(one) as two,
        one.api() as here,
        two.api() as there,
    ):
        opened: dict[int, list[str]] = defaultdict(list)

        async def log_in_and_out(username: str) -> None:
            """Two changes: a session opens, and all of the user's end, which raises its epoch."""
            api: Api = dice.choice([here, there])
            login = await retried(lambda: api.login(username, PASSWORD))
            assert login.status_code == 200, login.text
            token = login.json()["access_token"]
            claims = jwt.decode(token, options={"verify_signature": False})
            opened[int(claims["sub"])].append(claims["sid"])
            api = dice.choice([here, there])
            ended = await retried(lambda: api.post("/auth/logout", headers=api.bearer(token)))
            assert ended.status_code == 200, ended.text

        async def live() -> None:
            username = f"{uuid.uuid4().hex}@example.com"
            assert (await here.register(username, PASSWORD)).status_code == 201
            for _ in range(CHANGES // 2):
                async with limit:
                    await log_in_and_out(username)

        async with bounced(broker, dice, kills=1), anyio.create_task_group() as group:
            for _ in range(USERS):
                group.start_soon(live)
        await until_published(one, PUBLISHED_S)
        log = await one.query("SELECT user_id, epoch FROM revocations ORDER BY bucket, number")
        committed: dict[int, list[int]] = defaultdict(list)
        for row in log:
            committed[row["user_id"]].append(row["epoch"])
        assert [len(epochs) for epochs in committed.values()] == [CHANGES // 2] * USERS
        told: dict[int, list[Any]] = defaultdict(list)
        openings: dict[int, list[str]] = defaultdict(list)
        for kind, value in await events_in(broker, settings["AUTHD_KAFKA_EVENTS_TOPIC"]):
            # Between what Postgres and what Redis gave birth to, there is no order.
            if kind == "session.opened":
                openings[value["user_id"]].append(value["session_id"])
            else:
                told[value["user_id"]].append(value.get("epoch", kind))
        assert openings == opened
        assert told == {user_id: ["user.registered", *epochs] for user_id, epochs in committed.items()}
        revoked: dict[int, list[int]] = defaultdict(list)
        for _, value in await events_in(broker, settings["AUTHD_KAFKA_REVOCATIONS_TOPIC"]):
            revoked[value["user_id"]].append(value["epoch"])
        assert revoked == committed
