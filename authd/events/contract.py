"""The events that authd publishes, as their consumers read them; docs/events.md is their page.

Three channels, each a topic of the settings, read when an event is sent: a wrong one is fixed by a restart, also for
the events that wait.
    registration  the contract's topic: one record for each user, four fields, nothing else
    events        everything, keyed by user id
    revocations   compacted, keyed by what was revoked: for services that verify access tokens without asking authd
"""

import uuid
from typing import Literal

import msgspec

Channel = Literal["registration", "events", "revocations"]
EventType = Literal[
    "user.registered",
    "user.disabled",
    "user.enabled",
    "session.opened",
    "session.evicted",
    "session.reuse_detected",
    "session.ended",
    "sessions.ended",
    "login.locked",
    "token.revoked",
]
#: Why sessions ended: what this version writes. Of a row or a tombstone it may read what a newer one wrote.
EndingReason = Literal[
    "logout",  # the user
    "revoked",  # a service
    "evicted",  # a newer session took the place
    "reused",  # a refresh token came twice
    "user_disabled",
    "user_enabled",
    "user_deleted",
]
#: Which limit of failed logins was reached.
LockCounter = Literal["pair", "account", "address", "device"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event: `value` is what consumers read, the rest travels in the message's key and headers.

    `key` is None for the key that the settings name. `value` is None for a tombstone in a compacted topic. `user_id` is
    0 where an event is about no known user.
    """

    id: uuid.UUID
    channel: Channel
    type: EventType
    version: int
    user_id: int
    key: str | None
    value: bytes | None


class UserRegistered(msgspec.Struct, frozen=True, kw_only=True):
    """The value of `user.registered`, on both topics: these four fields exactly, which consumers validate strictly."""

    user_id: int
    username: str
    full_name: str
    created_at: str


class UserChanged(msgspec.Struct, frozen=True, kw_only=True):
    """`user.disabled`, `user.enabled`."""

    user_id: int
    occurred_at: str


class SessionOpened(msgspec.Struct, frozen=True, kw_only=True):
    """`session.opened`: a login. `user_agent` is empty where the client sent none."""

    user_id: int
    session_id: str
    occurred_at: str
    address: str
    user_agent: str


class SessionChanged(msgspec.Struct, frozen=True, kw_only=True):
    """`session.evicted`, `session.reuse_detected`: Redis ended it."""

    user_id: int
    session_id: str
    occurred_at: str


class SessionEnded(msgspec.Struct, frozen=True, kw_only=True):
    """`session.ended`: somebody asked for it."""

    user_id: int
    session_id: str
    reason: EndingReason
    occurred_at: str


class SessionsEnded(msgspec.Struct, frozen=True, kw_only=True):
    """`sessions.ended`: all that were opened below the epoch."""

    user_id: int
    epoch: int
    reason: EndingReason
    occurred_at: str


class LoginLocked(msgspec.Struct, frozen=True, kw_only=True):
    """`login.locked`. `counter` is what reached its limit; `user_id` is null where no user has the username. The
    username itself is not published: people type passwords there.
    """

    user_id: int | None
    address: str
    counter: LockCounter
    occurred_at: str


class TokenRevoked(msgspec.Struct, frozen=True, kw_only=True):
    """A record of the compacted topic. It concerns access tokens whose `sid` is `session_id`, or whose `sub` is
    `user_id` and whose `epoch` is below `epoch`: exact, whatever the clocks say. None of them lives after `until`.
    """

    user_id: int
    session_id: str | None
    epoch: int | None
    reason: EndingReason
    until: str
