"""Builds event records. Pure; callers write them to the outbox."""

import uuid
from datetime import UTC, datetime, timedelta

import msgspec

from authd.events.contract import (
    EndingReason,
    Event,
    EventType,
    SessionEnded,
    SessionsEnded,
    TokenRevoked,
    UserChanged,
    UserRegistered,
)
from authd.infra.encoding import encode_base64url

#: How much longer a revocation is announced than access tokens live: for the clocks of the replicas, and for a refresh
#: that was under way when its session ended.
ANNOUNCED_MORE_S = 60

#: The events that happen once to a session get the same id however often they are recorded.
_NAMESPACE = uuid.UUID("b1d7e1d0-6b0c-4a52-9d2e-5d0b8a9c1f47")


class EventFactory:
    """Builds the events of this deployment. Without a broker it builds only the contract's: the others would wait for
    nobody.
    """

    def __init__(self, *, has_broker: bool, access_ttl_s: int) -> None:
        self._publishes = has_broker
        self._announced_for = timedelta(seconds=access_ttl_s + ANNOUNCED_MORE_S)

    @property
    def announced_for(self) -> timedelta | None:
        """Return how long a revocation is announced; None where it is not."""
        return self._announced_for if self._publishes else None

    def user_registered(self, user_id: int, username: str, full_name: str, created_at: datetime) -> list[Event]:
        value = UserRegistered(
            user_id=user_id, username=username, full_name=full_name, created_at=created_at.isoformat()
        )
        contract = Event(
            id=uuid.uuid4(),
            channel="registration",
            type="user.registered",
            version=1,
            user_id=user_id,
            key=None,
            value=msgspec.json.encode(value),
        )
        return [contract, *self.event("user.registered", user_id, value)]

    def user_changed(self, user_id: int, *, is_disabled: bool) -> list[Event]:
        value = UserChanged(user_id=user_id, occurred_at=_now())
        return self.event("user.disabled" if is_disabled else "user.enabled", user_id, value)

    def session_ended(self, user_id: int, session_id: bytes, reason: EndingReason) -> list[Event]:
        sid = encode_base64url(session_id)
        value = SessionEnded(user_id=user_id, session_id=sid, reason=reason, occurred_at=_now())
        return self.event("session.ended", user_id, value)

    def sessions_ended(self, user_id: int, epoch: int, reason: EndingReason) -> list[Event]:
        value = SessionsEnded(user_id=user_id, epoch=epoch, reason=reason, occurred_at=_now())
        return self.event("sessions.ended", user_id, value)

    def revoked(self, user_id: int, session_id: bytes | None, epoch: int | None, reason: EndingReason) -> list[Event]:
        """Return the record for services that verify tokens by themselves, or nothing without a broker."""
        if not self._publishes:
            return []
        value = TokenRevoked(
            user_id=user_id,
            session_id=None if session_id is None else encode_base64url(session_id),
            epoch=epoch,
            reason=reason,
            until=(datetime.now(UTC) + self._announced_for).isoformat(timespec="seconds"),
        )
        return [revocation_record(user_id, session_id, msgspec.json.encode(value))]

    def event(self, kind: EventType, user_id: int, value: msgspec.Struct, *, once: str = "") -> list[Event]:
        """Return the event for the topic of events, or nothing without a broker. `once`: what makes it the same event
        when it is recorded again.
        """
        if not self._publishes:
            return []
        event_id = uuid.uuid5(_NAMESPACE, f"{kind}:{once}") if once else uuid.uuid4()
        return [
            Event(
                id=event_id,
                channel="events",
                type=kind,
                version=1,
                user_id=user_id,
                key=str(user_id),
                value=msgspec.json.encode(value),
            )
        ]


def revocation_record(user_id: int, session_id: bytes | None, value: bytes | None) -> Event:
    """Return a record of the compacted topic, or with no value the tombstone that ends it."""
    return Event(
        id=uuid.uuid4(),
        channel="revocations",
        type="token.revoked",
        version=1,
        user_id=user_id,
        key=f"user:{user_id}" if session_id is None else encode_base64url(session_id),
        value=value,
    )


def iso(ms: int) -> str:
    """Return the ISO 8601 form, with offset, of ms since the epoch."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
