"""The sessions in Redis: every method is one script, and what a script decides is final.

All of a user's sessions are one hash in the user's bucket; session_format.lua has its layout. Its name holds
the user's incarnation, so that the sessions of an id that was given twice are out of each other's reach. Hashes of
before had the id alone: the scripts that are asked with the user's row move them (session_adopt.lua).
"""

from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Literal

import msgspec

from authd.events.redis import event_stream
from authd.infra.caller import Caller
from authd.infra.observe import metrics
from authd.infra.redis.client import RedisClient
from authd.infra.subject import Subject, bucket_of_user
from authd.tokens.refresh import PASSWORD_FACTOR, USER_KIND, RefreshToken

#: How long Redis itself remembers an ending that the log in Postgres has: longer than any request in flight.
TOMBSTONE_TTL_MS = 600_000
#: How long a refused rebuild is remembered.
BURIED_TTL_MS = 60_000

#: Addresses whose other form is remembered: a client's requests come in numbers.
ADDRESSES_MAX = 4096

_HEADER_BYTES = 44


class Owner(msgspec.Struct, frozen=True):
    """Whose session is opened, as the user's row has it. `registered_ms`: when it was made, ms since the epoch."""

    subject: Subject
    epoch: int
    registered_ms: int


class LiveSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session as Redis keeps it. `*_ms`: ms of Redis's clock since the epoch; `authenticated_s`: s, of the login."""

    id: bytes
    key_id: int
    epoch: int
    counter: int
    created_ms: int
    issued_ms: int
    expires_ms: int
    authenticated_s: int
    factors: int
    kind: int
    packed_caller: bytes

    @property
    def caller(self) -> Caller:
        return unpack_caller(self.packed_caller)


class Opened(msgspec.Struct, frozen=True):
    """The session lives; the `evicted` ones died for it and are not in the revocation log yet."""

    session: LiveSession
    evicted: list[bytes]


class Rotated(msgspec.Struct, frozen=True):
    """The session's current state, from which the successor token follows, also where it was rotated before."""

    session: LiveSession


class Live(msgspec.Struct, frozen=True):
    """The session of a token lives. `user_json`: the cached user, or empty."""

    user_json: bytes
    id: bytes
    value: bytes

    @property
    def session(self) -> LiveSession:
        return _unpack(self.id, self.value)


class Behind(Exception):
    """Redis lacks rows of the revocation log that the caller knows of: apply them and ask again."""

    def __init__(self, applied: int) -> None:
        self.applied = applied
        super().__init__(applied)


class Denied(msgspec.Struct, frozen=True):
    """The script decided against it; the reason is that of the ending, where the status is `ended` or `stale`."""

    status: Literal[
        "stale", "ended", "present", "expired", "refused", "evicted", "superseded", "reused", "unknown", "dead"
    ]
    reason: str = ""


class Applied(msgspec.Struct, frozen=True):
    """The last number applied to the bucket, whoever applied it."""

    number: int


class SessionSettings(msgspec.Struct, frozen=True):
    refresh_ttl_s: int
    session_ttl_s: int
    refresh_grace_s: int
    max_active_sessions: int
    session_policy: Literal["evict_oldest", "refuse"]
    event_stream_max: int


class SessionStore:
    """Every method raises `Unavailable("session_store")` when Redis does not answer in time; those that take a
    `revocation` number raise `Behind` when Redis has applied less.
    """

    def __init__(self, client: RedisClient, settings: SessionSettings) -> None:
        self._client = client
        self._ttl_ms = settings.refresh_ttl_s * 1000
        self._session_ttl_ms = settings.session_ttl_s * 1000
        self._grace_ms = settings.refresh_grace_s * 1000
        self._cap = settings.max_active_sessions
        self._refuse = int(settings.session_policy == "refuse")
        # Without a broker nothing is published, and the relay would only throw the events away.
        self._stream_max = settings.event_stream_max
        self._open = client.script(__package__, "session_open")
        self._rotate = client.script(__package__, "session_rotate")
        self._inspect = client.script(__package__, "session_inspect")
        self._list = client.script(__package__, "session_list")
        self._apply = client.script(__package__, "session_apply")
        self._skip = client.script(__package__, "session_skip")
        self._bury = client.script(__package__, "session_bury")

    @property
    def generation(self) -> int:
        """Return a number that is raised whenever a server may have lost what it had decided."""
        return self._client.generation

    async def open(
        self, owner: Owner, session_id: bytes, key_id: int, caller: Caller, revocation: int
    ) -> Opened | Denied:
        """Open a session after a login. `revocation`: the highest number the caller knows of the bucket's log.

        Denied: `stale` (the epoch is over: read the user again), `refused` (policy), `ended`.
        """
        return await self._admit(owner, session_id, key_id, 1, 0, revocation, caller, (0, PASSWORD_FACTOR, USER_KIND))

    async def rebuild(
        self, owner: Owner, token: RefreshToken, key_id: int, caller: Caller, revocation: int
    ) -> Opened | Denied:
        """Rebuild and rotate the session of a valid token that Redis lost and Postgres did not end.

        Denied: `present` (it is here: rotate it), `evicted` (older than a full set), `expired`, `stale`, `ended`.
        """
        login = (token.authenticated_s, token.factors, token.kind)
        counter = token.counter + 1
        return await self._admit(owner, token.session_id, key_id, counter, token.created_ms, revocation, caller, login)

    async def rotate(self, token: RefreshToken, key_id: int, caller: Caller, revocation: int) -> Rotated | Denied:
        """Exchange a token for its successor.

        Denied: `superseded`, `reused` (the session ended now), `ended`, `expired`, `unknown`.
        """
        bucket = bucket_of_user(token.user_id)
        reply = await self._client.decide(
            self._rotate,
            bucket,
            [*self._keys(token.subject)[:2], event_stream(self._client, bucket)],
            revocation,
            token.session_id,
            token.epoch,
            token.counter,
            token.issued_ms,
            key_id,
            self._grace_ms,
            self._ttl_ms,
            self._session_ttl_ms,
            _pack_caller(caller),
            token.expires_ms,
            *token.subject,
        )
        status = _count(reply)
        if status in ("rotated", "repeated"):
            return Rotated(_unpack(token.session_id, reply[2]))
        return _denied(status, reply)

    async def inspect(self, subject: Subject, session_id: bytes, revocation: int) -> Live | Denied:
        """Return the session of an access token and the cached user. Denied: `dead`."""
        reply = await self._client.read(self._inspect, self._keys(subject), revocation, session_id)
        if reply[0] == b"live":
            _, _, user_json = reply[1].partition(b"|")
            return Live(user_json, session_id, reply[2])
        if reply[0] == b"behind":
            raise Behind(int(reply[1]))
        return Denied("dead")

    async def list_live(self, subject: Subject, revocation: int) -> list[LiveSession]:
        """Return the user's live sessions, oldest first."""
        reply = await self._client.read(self._list, self._keys(subject)[:2], revocation)
        if reply[0] == b"behind":
            raise Behind(int(reply[1]))
        sessions = [_unpack(bytes(id_), value) for id_, value in zip(reply[1::2], reply[2::2], strict=True)]
        return sorted(sessions, key=lambda session: (session.created_ms, session.id))

    async def apply(
        self,
        subject: Subject,
        after: int,
        number: int,
        *,
        session_id: bytes | None,
        epoch: int | None,
        reason: str,
    ) -> Applied:
        """Apply the row `number` of the log if `after` is the last one applied; see `Applied`."""
        reply = await self._client.decide(
            self._apply,
            bucket_of_user(subject.user_id),
            [*self._keys(subject), self._old_key(subject.user_id)],
            after,
            number,
            session_id or b"",
            "" if epoch is None else epoch,
            reason,
            TOMBSTONE_TTL_MS,
        )
        if reply[0] != b"applied":
            return Applied(int(reply[2]))
        metrics.revocations_applied.inc()
        return Applied(number)

    async def skip(self, bucket: int, after: int, number: int) -> Applied:
        """Move over rows that have expired, if `after` is the last one applied."""
        reply = await self._client.decide(self._skip, bucket, [self._client.key(bucket, "applied")], after, number)
        return Applied(number if reply[0] == b"applied" else int(reply[2]))

    async def bury(self, token: RefreshToken, reason: str) -> None:
        """Remember for BURIED_TTL_MS that the token's session is dead."""
        bucket = bucket_of_user(token.user_id)
        keys = self._keys(token.subject)[:1]
        await self._client.decide(self._bury, bucket, keys, token.session_id, reason, BURIED_TTL_MS)

    async def _admit(
        self,
        owner: Owner,
        session_id: bytes,
        key_id: int,
        counter: int,
        created_ms: int,
        revocation: int,
        caller: Caller,
        login: tuple[int, int, int],
    ) -> Opened | Denied:
        subject, bucket = owner.subject, bucket_of_user(owner.subject.user_id)
        keys = [*self._keys(subject)[:2], event_stream(self._client, bucket), self._old_key(subject.user_id)]
        reply = await self._client.decide(
            self._open,
            bucket,
            keys,
            revocation,
            session_id,
            owner.epoch,
            key_id,
            counter,
            created_ms,
            self._ttl_ms,
            self._session_ttl_ms,
            self._cap,
            self._refuse,
            _pack_caller(caller),
            subject.user_id,
            self._stream_max,
            subject.incarnation,
            owner.registered_ms,
            *login,
        )
        status = _count(reply)
        if status == "opened":
            metrics.sessions.labels("evicted").inc(len(reply) - 4)
            metrics.events_dropped.labels("session.opened").inc(int(reply[3]))
            return Opened(_unpack(session_id, reply[2]), [bytes(evicted) for evicted in reply[4:]])
        return _denied(status, reply)

    def _keys(self, subject: Subject) -> list[str]:
        key, bucket = self._client.key, bucket_of_user(subject.user_id)
        return [key(bucket, f"user:{subject}"), key(bucket, "applied"), key(bucket, f"profile:{subject}")]

    def _old_key(self, user_id: int) -> str:
        return self._client.key(bucket_of_user(user_id), f"user:{user_id}")


def _count(reply: list[Any]) -> str:
    status: str = reply[0].decode()
    metrics.sessions.labels(status).inc()
    return status


def _denied(status: str, reply: list[Any]) -> Denied:
    if status == "behind":
        raise Behind(int(reply[2]))
    reason = reply[2].decode() if status in ("ended", "stale") else ""
    return msgspec.convert({"status": status, "reason": reason}, Denied)


def unpack_caller(packed: bytes) -> Caller:
    """Return what `_pack_caller` packed: the address's length, the address, the user agent."""
    end = 1 + packed[0]
    return Caller(_unpack_address(packed[1:end]), packed[end:].decode("utf-8", "replace"))


@lru_cache(ADDRESSES_MAX)
def _pack_address(text: str) -> bytes:
    return ip_address(text).packed


@lru_cache(ADDRESSES_MAX)
def _unpack_address(packed: bytes) -> str:
    return str(ip_address(packed))


def _pack_caller(caller: Caller) -> bytes:
    address = _pack_address(caller.address)
    return bytes([len(address)]) + address + caller.user_agent.encode()


def _unpack(session_id: bytes, value: bytes) -> LiveSession:
    def number(start: int, end: int) -> int:
        return int.from_bytes(value[start:end])

    return LiveSession(
        id=session_id,
        key_id=number(1, 5),
        epoch=number(5, 9),
        counter=number(9, 15),
        created_ms=number(15, 21),
        issued_ms=number(21, 27),
        expires_ms=number(27, 33),
        authenticated_s=number(33, 37),
        factors=value[37],
        kind=value[38],
        packed_caller=value[_HEADER_BYTES:],
    )
