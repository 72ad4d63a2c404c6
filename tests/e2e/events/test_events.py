"""Events as their consumers see them: on the real topic, read by code that is not authd's."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import anyio
import httpx
import pytest
from aiokafka import ConsumerRecord
from support.api import Api
from support.process import ServiceProcess
from support.services import Services, until_published
from support.stores import read_topic
from support.waiting import eventually

from authd.embedded import KafkaBroker

pytestmark = pytest.mark.timeout(120)

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
async def service(services: Services, kafka_broker: KafkaBroker) -> AsyncIterator[ServiceProcess]:
    async with services.running(AUTHD_KAFKA_BOOTSTRAP_SERVERS=kafka_broker.bootstrap_servers) as process:
        yield process


async def records_of(broker: KafkaBroker, topic: str, user_id: int) -> list[ConsumerRecord]:
    return [
        record
        for record in await read_topic(broker.bootstrap_servers, topic)
        if json.loads(record.value)["user_id"] == user_id
    ]


def assert_one_event(records: list[ConsumerRecord], registered: dict[str, Any]) -> None:
    """At least once on the wire: repetitions are the same event."""
    assert records
    assert [json.loads(record.value) for record in records] == [registered] * len(records)
    assert len({dict(record.headers)["event_id"] for record in records}) == 1


async def status(api: Api) -> dict[str, Any]:
    answer = await api.get("/readyz")
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body


async def test_a_registration_is_one_record_with_the_contracts_key_value_and_headers(
    service: ServiceProcess, kafka_broker: KafkaBroker, api: Api
) -> None:
    account = await api.new_account(full_name="Zoë 🦊")
    await until_published(service)
    [record] = await records_of(kafka_broker, service.topic, account.user_id)
    assert record.key == b"new_user"
    value = json.loads(record.value.decode("utf-8"))
    assert {name: type(field) for name, field in value.items()} == {
        "user_id": int,
        "username": str,
        "full_name": str,
        "created_at": str,
    }
    assert value == account.registered
    assert datetime.fromisoformat(value["created_at"]).utcoffset() is not None
    headers = dict(record.headers)
    assert headers.keys() == {"event_id", "event_type", "schema_version"}
    assert str(uuid.UUID(headers["event_id"].decode())) == headers["event_id"].decode()
    assert (headers["event_type"], headers["schema_version"]) == (b"user.registered", b"1")


@pytest.mark.parametrize("more", [{}, {"full_name": None}])
async def test_a_registration_without_a_full_name_has_an_empty_one_in_its_event(
    service: ServiceProcess, kafka_broker: KafkaBroker, api: Api, more: dict[str, Any]
) -> None:
    account = await api.new_account(**more)
    await until_published(service)
    [record] = await records_of(kafka_broker, service.topic, account.user_id)
    assert json.loads(record.value)["full_name"] == ""


async def test_a_refused_registration_leaves_no_event(
    service: ServiceProcess, kafka_broker: KafkaBroker, api: Api
) -> None:
    account = await api.new_account()
    assert (await api.register(account.username.upper(), PASSWORD)).status_code == 409
    assert (await api.register("refused@example.com", "short")).status_code == 422
    await until_published(service)
    names = [
        json.loads(record.value)["username"]
        for record in await read_topic(kafka_broker.bootstrap_servers, service.topic)
    ]
    assert names.count(account.username) == 1
    assert not {account.username.upper(), "refused@example.com"} & set(names)


async def test_topic_and_key_are_settings(services: Services, kafka_broker: KafkaBroker) -> None:
    topic = f"user.created.{uuid.uuid4().hex[:8]}"
    settings = {
        "AUTHD_KAFKA_BOOTSTRAP_SERVERS": kafka_broker.bootstrap_servers,
        "AUTHD_KAFKA_REGISTRATION_TOPIC": topic,
        "AUTHD_KAFKA_REGISTRATION_KEY": "somebody came",
    }
    async with services.running(**settings) as process, process.api() as api:
        account = await api.new_account()
        await until_published(process)
        [record] = await read_topic(kafka_broker.bootstrap_servers, topic)
        assert record.key == b"somebody came"
        assert json.loads(record.value) == account.registered


async def test_events_of_the_time_before_kafka_arrive_when_it_comes(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    settings = {"AUTHD_KAFKA_BOOTSTRAP_SERVERS": kafka_broker.bootstrap_servers, "AUTHD_KAFKA_TIMEOUT_S": "2"}
    await kafka_broker.stop()
    try:
        async with services.running(**settings) as process, process.api() as api:
            report = await status(api)
            assert (report["status"], report["parts"]["events"]) == ("degraded", False)
            with anyio.fail_after(5):
                accounts = [await api.new_account() for _ in range(3)]
                await api.new_session(accounts[0])
            assert len(await process.query("SELECT 1 FROM outbox WHERE channel = 'registration'")) == 3
            await kafka_broker.start()
            await until_published(process)
            for account in accounts:
                assert_one_event(await records_of(kafka_broker, process.topic, account.user_id), account.registered)

            async def is_ready() -> bool:
                return (await status(api))["status"] == "ready"

            await eventually(is_ready)
    finally:
        if not kafka_broker.is_running:
            await kafka_broker.start()


async def test_the_event_of_an_answered_registration_survives_a_kill_before_it_was_sent(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    settings = {"AUTHD_KAFKA_BOOTSTRAP_SERVERS": kafka_broker.bootstrap_servers, "AUTHD_KAFKA_TIMEOUT_S": "2"}
    async with services.running(**settings) as process:
        async with process.api() as api:
            await kafka_broker.pause()
            try:
                account = await api.new_account()
                await process.kill()
            finally:
                await kafka_broker.resume()
        assert len(await process.query("SELECT 1 FROM outbox WHERE channel = 'registration'")) == 1
        await process.start()
        await until_published(process)
        assert_one_event(await records_of(kafka_broker, process.topic, account.user_id), account.registered)


async def test_a_kill_amid_registrations_loses_no_event_of_a_user_and_invents_none(
    services: Services, kafka_broker: KafkaBroker
) -> None:
    async with services.running(AUTHD_KAFKA_BOOTSTRAP_SERVERS=kafka_broker.bootstrap_servers) as process:
        answered: list[dict[str, Any]] = []
        killed = anyio.Event()

        async def register_on_and_on() -> None:
            async with process.api() as api:
                while not killed.is_set():
                    try:
                        answer = await api.register(f"{uuid.uuid4().hex}@example.com", PASSWORD)
                    except httpx.TransportError:
                        assert killed.is_set()
                        return
                    assert answer.status_code == 201
                    answered.append(answer.json())

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(register_on_and_on)
            await eventually(lambda: len(answered) >= 30)
            killed.set()
            await process.kill()
        await process.start()
        await until_published(process)
        by_user: dict[int, list[ConsumerRecord]] = {}
        for record in await read_topic(kafka_broker.bootstrap_servers, process.topic):
            by_user.setdefault(json.loads(record.value)["user_id"], []).append(record)
        users = {row["id"] for row in await process.query("SELECT id FROM users")}
        assert by_user.keys() == users >= {registered["user_id"] for registered in answered}
        for registered in answered:
            assert_one_event(by_user[registered["user_id"]], registered)


async def test_two_processes_send_each_event_once(services: Services, kafka_broker: KafkaBroker) -> None:
    async with services.running(AUTHD_KAFKA_BOOTSTRAP_SERVERS=kafka_broker.bootstrap_servers) as one:
        async with services.replica(one) as other, one.api() as first, other.api() as second:
            made = await asyncio.gather(*(api.new_account() for api in [first, second] * 20))
            await until_published(one)
        records = await read_topic(kafka_broker.bootstrap_servers, one.topic)
        assert sorted(json.loads(record.value)["user_id"] for record in records) == sorted(a.user_id for a in made)
