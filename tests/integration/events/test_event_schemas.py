"""What a real broker delivered, held to the tables of docs/events.md, and those to the structs that make the values."""

import json
import re
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
from aiokafka import ConsumerRecord
from blockbuster import BlockBuster
from support.paths import ROOT
from support.relaying import CLIENT, Node, header, make_settings, open_node
from support.stores import read_topic
from support.waiting import eventually

from authd.config import Settings
from authd.embedded import KafkaBroker, RedisServer
from authd.events import contract as events
from authd.login.redis import Outcome, Reserved
from authd.tokens.access import encode_base64url

pytestmark = pytest.mark.timeout(120)

PAGE = (ROOT / "docs" / "events.md").read_text("utf-8")
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "user.registered": events.UserRegistered,
    "user.disabled": events.UserChanged,
    "user.enabled": events.UserChanged,
    "session.opened": events.SessionOpened,
    "session.evicted": events.SessionChanged,
    "session.reuse_detected": events.SessionChanged,
    "session.ended": events.SessionEnded,
    "sessions.ended": events.SessionsEnded,
    "login.locked": events.LoginLocked,
    "token.revoked": events.TokenRevoked,
}


def sections() -> dict[str, str]:
    """The text under each event's heading."""
    parts = re.split(r"^### `([a-z._]+)`$", PAGE, flags=re.M)
    return {name: text.partition("\n## ")[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def table(section: str) -> dict[str, str]:
    """The fields of an event and their types."""
    return dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \| \S.* \|$", section, re.M))


def is_time(value: Any) -> bool:
    return isinstance(value, str) and datetime.fromisoformat(value).utcoffset() is not None


CHECKS: dict[str, Callable[[Any], bool]] = {
    "integer": lambda value: type(value) is int,
    "string": lambda value: isinstance(value, str),
    "time": is_time,
    "null": lambda value: value is None,
}


def assert_conforms(kind: str, value: Any) -> None:
    fields = table(sections()[kind])
    assert list(value) == list(fields), kind
    for name, type_name in fields.items():
        assert any(CHECKS[each](value[name]) for each in type_name.split(" or ")), (kind, name, value[name])


def test_the_page_has_every_event_and_no_other() -> None:
    assert sections().keys() == STRUCTS.keys() == set(get_args(events.EventType))


@pytest.mark.parametrize("kind", STRUCTS)
def test_a_table_has_the_fields_of_its_struct_and_its_example_conforms(kind: str) -> None:
    fields = msgspec.structs.fields(STRUCTS[kind])
    documented = table(sections()[kind])
    assert list(documented) == [field.name for field in fields]
    for field in fields:
        assert field.required, f"{field.name} could be left out"
        names = {int: {"integer"}, str: {"string", "time"}, type(None): {"null"}}
        parts = (str,) if get_origin(field.type) is Literal else get_args(field.type) or (field.type,)
        told = documented[field.name].split(" or ")
        assert len(told) == len(parts) and all(set(told) & names[part] for part in parts), field.name
    [example] = re.findall(r"^```json\n(.*)\n```$", sections()[kind], re.M)
    assert_conforms(kind, json.loads(example))


async def test_what_the_broker_delivered_is_what_the_page_says(
    database_url: str, redis_server: RedisServer, kafka_broker: KafkaBroker, no_blocking: BlockBuster
) -> None:
    settings = make_settings(
        database_url, redis_server.url, kafka_broker.bootstrap_servers, max_active_sessions=1, max_login_attempts=1
    )
    async with open_node(settings, no_blocking, publishes=True) as node:
        user, sids = await make_every_event(node)
        await node.until_relayed()
        await node.until_published()
        while await node.remembered.endings.enqueue_tombstones():
            pass
        await node.until_published()
    registered = await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_registration_topic)
    told = await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_events_topic)
    revoked = await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_revocations_topic)
    for record in [*registered, *told, *revoked]:
        assert set(dict(record.headers)) == {"event_id", "event_type", "schema_version"}
        assert str(uuid.UUID(header(record, "event_id"))) == header(record, "event_id")
        assert header(record, "schema_version") == "1"
        if record.value is not None:
            assert_conforms(header(record, "event_type"), json.loads(record.value))
    assert {header(record, "event_type") for record in [*told, *revoked]} == STRUCTS.keys()
    assert [(record.key, header(record, "event_type")) for record in registered] == [(b"new_user", "user.registered")]
    assert {record.key for record in told} == {str(user).encode(), b"0"}
    assert {json.loads(record.value)["user_id"] for record in told if record.key == b"0"} == {None}
    assert_revocations(settings, revoked, user, sids)


async def make_every_event(node: Node) -> tuple[int, set[str]]:
    """A user to whom everything happens, and the sessions that ended one by one."""
    user = await node.register("Ada Lovelace")
    first = await node.open(user)
    second = await node.open(user)
    await node.reuse(user, second)
    third = await node.open(user)
    await node.end(user, third)
    name = (await node.database.fetch("SELECT username_key FROM users"))[0]["username_key"]
    for is_disabled in (True, False):
        await node.remembered.disabling.set_disabled(name, disabled=is_disabled)
    await node.end_all(user)
    for account, user_id in ((name, user), ("nobody@example.org", 0)):
        attempt = await node.throttle.reserve(CLIENT.address, account, user_id)
        assert isinstance(attempt, Reserved)
        await node.throttle.settle(attempt, Outcome.FAILED)
    await node.until_relayed()
    sids = {encode_base64url(session.id) for session in (first, second, third)}

    async def are_logged() -> bool:
        return len(await node.ended(user)) == len(sids) + 3

    await eventually(are_logged)
    await node.database.fetch("UPDATE revocations SET announced_until = now() - interval '2 minutes'")
    return user, sids


def assert_revocations(settings: Settings, records: list[ConsumerRecord], user: int, sids: set[str]) -> None:
    """Each key's records say what the key is, and its last is the tombstone."""
    by_key: dict[str, list[Any]] = {}
    for record in records:
        value = None if record.value is None else json.loads(record.value)
        by_key.setdefault(record.key.decode(), []).append(value)
    assert by_key.keys() == {f"user:{user}", *sids}
    for key, values in by_key.items():
        assert values.pop() is None
        assert values and None not in values
        for value in values:
            assert value["user_id"] == user
            assert value["session_id"] == (None if key.startswith("user:") else key)
            assert (value["epoch"] is None) == (value["session_id"] is not None)
            assert (datetime.fromisoformat(value["until"]) - datetime.now().astimezone()).total_seconds() == (
                pytest.approx(settings.access_ttl_s + 60, abs=30)
            )
    assert [value["epoch"] for value in by_key[f"user:{user}"]] == sorted(
        value["epoch"] for value in by_key[f"user:{user}"]
    )
