"""The events authd tells the world, as their consumers read them."""

import uuid
from datetime import datetime
from typing import Literal

import msgspec

#: Where an event goes. The topic behind each is a setting, read when the event is sent: a wrong one is mended by a
#: restart, also for the events that wait.
Channel = Literal["registration"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event: `value` is the JSON that consumers read, the rest travels in message headers."""

    id: uuid.UUID
    channel: Channel
    type: str
    version: int
    user_id: int
    value: bytes


class UserRegistered(msgspec.Struct, frozen=True, kw_only=True):
    """The value of `user.registered`: these four fields exactly, which consumers validate strictly."""

    user_id: int
    username: str
    full_name: str
    created_at: str


def user_registered(user_id: int, username: str, full_name: str, created_at: datetime) -> Event:
    value = UserRegistered(user_id=user_id, username=username, full_name=full_name, created_at=created_at.isoformat())
    return Event(
        id=uuid.uuid4(),
        channel="registration",
        type="user.registered",
        version=1,
        user_id=user_id,
        value=msgspec.json.encode(value),
    )
