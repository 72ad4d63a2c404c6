"""What other services hear of a user's life, and what they can do with it, read by code that is not authd's."""

import json
import uuid
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from support.api import Account, Api
from support.process import ServiceProcess
from support.services import Services, until_published
from support.stores import read_topic
from support.waiting import eventually

from authd.embedded import KafkaBroker

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def telling(services: Services, broker: KafkaBroker, **settings: str) -> AsyncIterator[ServiceProcess]:
    """A service with topics of its own, a grace of 0 and room for two sessions."""
    name = uuid.uuid4().hex
    own = {
        "AUTHD_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "AUTHD_KAFKA_EVENTS_TOPIC": f"events.{name}",
        "AUTHD_KAFKA_REVOCATIONS_TOPIC": f"revocations.{name}",
        "AUTHD_KAFKA_TIMEOUT_S": "2",
        "AUTHD_REFRESH_GRACE_S": "0",
        "AUTHD_MAX_ACTIVE_SESSIONS": "2",
        "AUTHD_MAX_LOGIN_ATTEMPTS": "3",
    }
    async with services.running(**own | settings) as process:
        yield process


def claims(pair: dict[str, Any]) -> dict[str, Any]:
    body = pair["access_token"].split(".")[1]
    found: dict[str, Any] = json.loads(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return found


def first_deliveries(records: list[ConsumerRecord], user_id: int) -> list[tuple[str, dict[str, Any]]]:
    """The type and value of each event of the user."""
    found: dict[bytes, tuple[str, dict[str, Any]]] = {}
    for record in records:
        headers, value = dict(record.headers), json.loads(record.value)
        if value["user_id"] == user_id:
            found.setdefault(headers["event_id"], (headers["event_type"].decode(), value))
    return list(found.values())


async def told_of(process: ServiceProcess, broker: KafkaBroker, user_id: int) -> list[tuple[str, dict[str, Any]]]:
    return first_deliveries(
        await read_topic(broker.bootstrap_servers, process.settings["AUTHD_KAFKA_EVENTS_TOPIC"]), user_id
    )


async def until_told(
    process: ServiceProcess, broker: KafkaBroker, user_id: int, count: int
) -> list[tuple[str, dict[str, Any]]]:
    """The user's events when there are so many: those of Redis come by way of the outbox."""

    async def are_told() -> list[tuple[str, dict[str, Any]]]:
        await until_published(process)
        told = await told_of(process, broker, user_id)
        return told if len(told) >= count else []

    return await eventually(are_told, 40)


async def end_session(api: Api, pair: dict[str, Any], session_id: str) -> None:
    answer = await api.delete(f"/auth/sessions/{session_id}", headers=api.bearer(pair["access_token"]))
    assert answer.status_code == 200


async def test_a_users_life_is_told_from_the_registration_to_the_end(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    async with telling(services, kafka_broker) as process, process.api() as api:
        account = await api.new_account(full_name="Ada")
        first, second, third = [await api.new_session(account) for _ in range(3)]
        stale = second["refresh_token"]
        assert (await api.refresh(stale)).status_code == 200

        async def is_reused() -> bool:
            return (await api.refresh(stale)).json().get("code") == "refresh_token_reused"

        await eventually(is_reused)
        fourth = await api.new_session(account)
        await end_session(api, fourth, claims(third)["sid"])
        assert (await api.logout(fourth["access_token"])).status_code == 200
        for _ in range(3):
            await api.login(account.username, "wrong")
        done = await process.run("users", "disable", account.username)
        assert done.returncode == 0, done.stderr
        told = await until_told(process, kafka_broker, account.user_id, 12)
    by_session = {claims(pair)["sid"]: name for name, pair in zip("1234", (first, second, third, fourth), strict=True)}
    in_redis = [(kind, by_session.get(value["session_id"])) for kind, value in told if kind in BORN_IN_REDIS]
    assert in_redis == [
        ("session.opened", "1"),
        ("session.opened", "2"),
        ("session.evicted", "1"),
        ("session.opened", "3"),
        ("session.reuse_detected", "2"),
        ("session.opened", "4"),
    ]
    in_postgres = [
        (kind, value.get("reason")) for kind, value in told if kind not in BORN_IN_REDIS and kind != "login.locked"
    ]
    assert in_postgres == [
        ("user.registered", None),
        ("session.ended", "logout"),
        ("sessions.ended", "logout"),
        ("user.disabled", None),
        ("sessions.ended", "user_disabled"),
    ]
    assert [value["counter"] for kind, value in told if kind == "login.locked"] == ["pair"]


BORN_IN_REDIS = {"session.opened", "session.evicted", "session.reuse_detected"}


class OfflineVerifier:
    """A service that follows docs/events.md, and asks authd nothing."""

    def __init__(self, records: list[ConsumerRecord]) -> None:
        self.revoked: dict[str, dict[str, Any]] = {}
        for record in records:
            if record.value is None:
                self.revoked.pop(record.key.decode(), None)
            else:
                self.revoked[record.key.decode()] = json.loads(record.value)

    def accepts(self, pair: dict[str, Any]) -> bool:
        token = claims(pair)
        if token["sid"] in self.revoked:
            return False
        ended = self.revoked.get(f"user:{token['sub']}")
        return ended is None or token.get("epoch", 0) >= ended["epoch"]


async def test_an_offline_verifier_agrees_with_authd_about_every_token(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    async with telling(services, kafka_broker) as process, process.api() as api:
        pairs: dict[str, dict[str, Any]] = {}

        async def log_in(account: Account, name: str) -> dict[str, Any]:
            pairs[name] = await api.new_session(account)
            return pairs[name]

        one, other = await api.new_account(), await api.new_account()
        for name in ("evicted", "ended", "ended with all"):
            await log_in(one, name)
        await end_session(api, pairs["ended with all"], claims(pairs["ended"])["sid"])
        assert (await api.logout(pairs["ended with all"]["access_token"])).status_code == 200
        await log_in(one, "after the logout")
        await log_in(other, "a stranger's")
        stale = (await log_in(other, "reused"))["refresh_token"]
        assert (await api.refresh(stale)).status_code == 200

        async def is_reused() -> bool:
            return (await api.refresh(stale)).json().get("code") == "refresh_token_reused"

        await eventually(is_reused)
        await until_told(process, kafka_broker, other.user_id, 4)
        await until_told(process, kafka_broker, one.user_id, 8)
        verifier = OfflineVerifier(
            await read_topic(kafka_broker.bootstrap_servers, process.settings["AUTHD_KAFKA_REVOCATIONS_TOPIC"])
        )
        accepted = {name for name, pair in pairs.items() if verifier.accepts(pair)}
        assert accepted == {"after the logout", "a stranger's"}
        for name, pair in pairs.items():
            assert (await api.me(pair["access_token"])).status_code == (200 if name in accepted else 401), name


@pytest.mark.proof
async def test_a_kill_while_kafka_is_away_loses_no_event_of_either_birthplace(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    async with telling(services, kafka_broker) as process:
        await kafka_broker.stop()
        try:
            async with process.api() as api:
                account = await api.new_account()
                pairs = [await api.new_session(account) for _ in range(3)]
                await end_session(api, pairs[2], claims(pairs[2])["sid"])
            await process.kill()  # perhaps before the relay had moved them
            await process.start()
        finally:
            await kafka_broker.start()
        told = await until_told(process, kafka_broker, account.user_id, 6)
    assert sorted(kind for kind, _ in told) == [
        "session.ended",
        "session.evicted",
        *["session.opened"] * 3,
        "user.registered",
    ]


async def test_events_that_wait_too_long_degrade_readiness_and_operators_see_them(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    async with services.prepared(
        AUTHD_KAFKA_BOOTSTRAP_SERVERS=kafka_broker.bootstrap_servers, AUTHD_OUTBOX_DEGRADED_S="600"
    ) as process:
        await process.query(
            "INSERT INTO outbox (lane, user_id, event_id, channel, type, version, value, created_at, parked_at)"
            " VALUES"
            " (1, 1, gen_random_uuid(), 'from-the-future', 'user.x', 1, 'hidden', now() - interval '1 hour', NULL),"
            " (1, 2, gen_random_uuid(), 'events', 'user.y', 1, 'hidden', now() - interval '1 day', now())"
        )
        await process.start()
        async with process.api() as api:

            async def is_connected() -> bool:
                return "authd_kafka_connected 1.0" in (await api.get("/metrics")).text

            await eventually(is_connected)
            answer = await api.get("/readyz")
            assert answer.status_code == 200
            report = answer.json()
            assert (report["status"], report["parts"]["events"]) == ("degraded", False)
            assert 3600 <= report["events_oldest_s"] < 3700
            assert "authd_outbox_parked 1.0" in (await api.get("/metrics")).text
        listed = await process.run("outbox", "list")
        assert listed.returncode == 0
        first, second, row = listed.stdout.splitlines()
        assert first.startswith("waiting: 1, the oldest for 36")
        assert second == "parked: 1"
        assert "user.y" in row and "hidden" not in listed.stdout
        assert (await process.run("outbox", "drop", row.split()[0])).returncode == 0
        assert (await process.run("outbox", "drop", "1")).returncode == 1
        assert (await process.run("outbox", "retry")).returncode == 2
