import json
import uuid
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest

from authd.events.contract import Event
from authd.events.factory import EventFactory

#: Without brokers: only the contract's events are promised.
EVENTS = EventFactory(has_broker=False, access_ttl_s=1800)
REGISTERED_AT = datetime(2026, 11, 23, 9, 5, 7, 120_000, tzinfo=UTC)


def user_registered(user_id: int, username: str, full_name: str, created_at: datetime) -> Event:
    [event] = EVENTS.user_registered(user_id, username, full_name, created_at)
    return event


def test_a_registration_is_these_bytes() -> None:
    event = user_registered(42, "ada@example.com", "Ada Lovelace", REGISTERED_AT)
    assert event.value == (
        b'{"user_id":42,"username":"ada@example.com","full_name":"Ada Lovelace",'
        b'"created_at":"2026-11-23T09:05:07.120000+00:00"}'
    )


def test_its_identity_stands_beside_the_value() -> None:
    first, second = (user_registered(42, "ada@example.com", "", REGISTERED_AT) for _ in range(2))
    assert (first.type, first.version, first.channel, first.user_id) == ("user.registered", 1, "registration", 42)
    assert isinstance(first.id, uuid.UUID)
    assert first.id != second.id
    assert first.value == second.value


@pytest.mark.parametrize("full_name", ["", "Ada", "Ñandú 字 🙂", 'a "quoted"\\name\n', "\u2028"])
def test_the_value_has_exactly_four_fields_of_their_types(full_name: str) -> None:
    value = json.loads(user_registered(2**53 + 1, "ada@example.com", full_name, REGISTERED_AT).value)
    assert value == {
        "user_id": 2**53 + 1,
        "username": "ada@example.com",
        "full_name": full_name,
        "created_at": "2026-11-23T09:05:07.120000+00:00",
    }


def test_the_time_has_its_offset() -> None:
    there = REGISTERED_AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    value = json.loads(user_registered(1, "a@b.c", "", there).value)
    assert value["created_at"] == "2026-11-23T14:35:07.120000+05:30"
    assert datetime.fromisoformat(value["created_at"]) == REGISTERED_AT


def test_an_event_cannot_be_changed() -> None:
    event = user_registered(1, "a@b.c", "", REGISTERED_AT)
    with pytest.raises(AttributeError):
        event.user_id = 2  # type: ignore[misc]
    assert msgspec.structs.replace(event, user_id=2).user_id == 2
