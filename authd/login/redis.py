"""Counts failed logins, exactly: an attempt reserves before its password is hashed, and is settled after.

Counted are the pair of address and account, the account, and the address, each with its limit; or, for a device that
logged in before, that device alone. A counter is one key in Redis; however many replicas guess at once, no more
attempts than the limit can fail before the lock. Registrations of an address are counted beside them.
"""

import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, TypeVar

import anyio
import msgspec

from authd.config import BUCKETS
from authd.errors import Unavailable
from authd.events.redis import event_stream
from authd.infra.networks import network_of
from authd.infra.observe import metrics
from authd.infra.redis.client import RedisClient

#: A replica that dies gives its reservations back after this. It must exceed the longest hash: cost 18 takes 15 s
#: (measured: 0.24 s at cost 12), twice that with a rehash.
RESERVATION_TTL_S = 60.0
DIGEST_BYTES = 16

T = TypeVar("T")
CounterKind = Literal["pair", "account", "address", "device", "registrations"]


class Outcome(Enum):
    """What became of a reserved attempt. The value is the script that the pair's counter gets."""

    FAILED = "throttle_fail"
    SUCCEEDED = "throttle_clear"
    #: Never hashed, or without a result: it counts nothing.
    RELEASED = "throttle_release"


@dataclass(frozen=True, slots=True)
class _Counter:
    kind: CounterKind
    bucket: int
    key: str
    limit: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """The attempt may be hashed, and must be settled."""

    id: str
    counters: tuple[_Counter, ...]
    #: For the event of a lock. 0: no user has the account's name.
    user_id: int
    address: str


@dataclass(frozen=True, slots=True)
class Locked:
    retry_after_s: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether attempts may be made now: seconds until they may, rounded up; None if now."""

    locked_s: int | None
    #: None also where no device was asked for.
    device_locked_s: int | None


@dataclass(frozen=True, slots=True)
class Forgiven:
    """Failures that were forgotten; None where no address was named."""

    account: int
    pair: int | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Other attempts fill the limit and are not decided yet. Nothing is reserved: ask again."""


class ThrottleSettings(msgspec.Struct, frozen=True):
    max_login_attempts: int
    account_max_failures: int
    address_max_failures: int
    lockout_s: int
    event_stream_max: int


class Throttle:
    """`address` is the client's IP address; `account` the canonical form of the username, whether a user has it or not:
    otherwise a lock would tell who exists. `digest_key`: 32 bytes, without which nobody can tell what a counter in
    Redis counts. Every method raises `Unavailable("session_store")` when Redis is unavailable.
    """

    def __init__(
        self,
        client: RedisClient,
        settings: ThrottleSettings,
        digest_key: bytes,
        *,
        reservation_ttl_s: float = RESERVATION_TTL_S,
        new_id: Callable[[], str] = lambda: secrets.token_hex(DIGEST_BYTES),
    ) -> None:
        self._client = client
        self._digest_key = digest_key
        self._limits: dict[CounterKind, int] = {
            "pair": settings.max_login_attempts,
            "account": settings.account_max_failures,
            "address": settings.address_max_failures,
            "device": settings.max_login_attempts,
            "registrations": settings.address_max_failures,
        }
        self._lockout_ms = settings.lockout_s * 1000
        # Without a broker nothing is published.
        self._stream_max = settings.event_stream_max
        self._reservation_ttl_ms = int(reservation_ttl_s * 1000)
        self._new_id = new_id
        self._peek = client.script(__package__, "throttle_peek")
        self._reserve = client.script(__package__, "throttle_reserve")
        self._settle = {outcome: client.script(__package__, outcome.value) for outcome in Outcome}
        self._forgive = client.script(__package__, "throttle_forgive")
        self._count = client.script(__package__, "throttle_count")

    async def look(self, address: str, account: str, device_id: bytes | None = None) -> Standing:
        """Report locks without reserving; `reserve` and `reserve_device` decide."""
        counters = self._counters(address, account)
        if device_id is not None:
            counters = (*counters, self._device(device_id))
        left_ms = _values(
            await _all([partial(self._client.read, self._peek, [c.key], c.limit, self._lockout_ms) for c in counters])
        )
        return Standing(
            _seconds(max(left_ms[:3])) or None, _seconds(left_ms[3]) or None if device_id is not None else None
        )

    async def locked_s(self, address: str, account: str) -> int | None:
        """Return the seconds until an attempt without a device may be made, rounded up; None if now."""
        return (await self.look(address, account)).locked_s

    async def reserve(self, address: str, account: str, user_id: int = 0) -> Reserved | Locked | Wait:
        """Reserve one attempt in all three counters, or in none."""
        attempt = Reserved(self._new_id(), self._counters(address, account), user_id, address)
        pair, *others = attempt.counters
        # Alone at first: a flood on a locked pair must not hold places in the account's counter, which others share.
        refusal = await self._reserve_one(attempt.id, pair)
        if refusal is not None:
            return refusal
        replies = await _all([partial(self._reserve_one, attempt.id, counter) for counter in others])
        if replies == [None, None]:
            return attempt
        # What cannot be released expires by itself, and so does a reservation whose reply was lost.
        taken = [pair, *(c for c, reply in zip(others, replies, strict=True) if reply is None)]
        await _all([partial(self._settle_one, attempt, counter, Outcome.RELEASED) for counter in taken])
        locks = [reply.retry_after_s for reply in _values(replies) if isinstance(reply, Locked)]
        return Locked(max(locks)) if locks else Wait()

    async def reserve_device(self, device_id: bytes, address: str, user_id: int) -> Reserved | Locked | Wait:
        """Reserve one attempt in the counter of a device that has proved itself, and in no other."""
        attempt = Reserved(self._new_id(), (self._device(device_id),), user_id, address)
        return await self._reserve_one(attempt.id, attempt.counters[0]) or attempt

    async def forgive(self, account: str, address: str | None = None) -> Forgiven:
        """Forget the failures of the account, and those of its pair with `address`. An address's own failures on other
        accounts stay, and so do a device's, whose id only its token knows.
        """
        pair, of_account, _ = self._counters(address or "", account)
        return Forgiven(
            account=await self._forgive_one(of_account),
            pair=await self._forgive_one(pair) if address is not None else None,
        )

    async def registrations_locked_s(self, address: str) -> int | None:
        """Return the seconds until the address may register again, rounded up; None if now. Only a look."""
        counter = self._counter("registrations", network_of(address))
        return _seconds(await self._client.read(self._peek, [counter.key], counter.limit, self._lockout_ms)) or None

    async def count_registration(self, address: str) -> Locked | None:
        """Count one registration of the address, if its limit has room: as many as an address may fail to log in,
        within `lockout_s` after the first.
        """
        counter = self._counter("registrations", network_of(address))
        reply = await self._client.decide(self._count, counter.bucket, [counter.key], counter.limit, self._lockout_ms)
        return Locked(_seconds(int(reply[2]))) if reply[0] == b"locked" else None

    async def settle(self, attempt: Reserved, outcome: Outcome) -> tuple[CounterKind, ...]:
        """Settle a reserved attempt once: again, or after its reservation expired, it changes nothing.

        A success clears the pair alone: the owner's logins must not give new attempts to an attacker at other
        addresses, of other accounts, or with a stolen device token. Return what this failure locked.
        """
        others = Outcome.RELEASED if outcome is Outcome.SUCCEEDED else outcome
        outcomes = {counter: outcome if counter.kind == "pair" else others for counter in attempt.counters}
        statuses = await _all([partial(self._settle_one, attempt, c, what) for c, what in outcomes.items()])
        locked = tuple(c.kind for c, status in zip(outcomes, statuses, strict=True) if status == b"locked")
        for kind in locked:
            metrics.login_locks.labels(kind).inc()
        _values(statuses)
        return locked

    async def _reserve_one(self, attempt_id: str, counter: _Counter) -> Locked | Wait | None:
        reply = await self._client.decide(
            self._reserve,
            counter.bucket,
            [counter.key],
            attempt_id,
            counter.limit,
            self._reservation_ttl_ms,
            self._lockout_ms,
        )
        if reply[0] == b"locked":
            return Locked(_seconds(int(reply[2])))
        return None if reply[0] == b"reserved" else Wait()

    async def _forgive_one(self, counter: _Counter) -> int:
        reply = await self._client.decide(self._forgive, counter.bucket, [counter.key])
        return int(reply[2])

    async def _settle_one(self, attempt: Reserved, counter: _Counter, outcome: Outcome) -> bytes:
        keys: list[str] = [counter.key]
        arguments: list[Any] = []
        if outcome is Outcome.FAILED:
            keys.append(event_stream(self._client, counter.bucket))
            event = [counter.kind, attempt.user_id, attempt.address, self._stream_max]
            arguments = [counter.limit, self._lockout_ms, *event]
        reply = await self._client.decide(self._settle[outcome], counter.bucket, keys, attempt.id, *arguments)
        if reply[0] == b"locked":
            metrics.events_dropped.labels("login.locked").inc(int(reply[2]))
        return bytes(reply[0])

    def _counters(self, address: str, account: str) -> tuple[_Counter, ...]:
        network = network_of(address)
        return (
            self._counter("pair", f"{network}\0{account}"),
            self._counter("account", account),
            self._counter("address", network),
        )

    def _device(self, device_id: bytes) -> _Counter:
        return self._counter("device", device_id.hex())

    def _counter(self, kind: CounterKind, counted: str) -> _Counter:
        # Usernames that people type, some of them passwords, do not show in Redis, and nobody who has a copy of it can
        # try texts: without the key the digest of none can be computed.
        digest = blake2b(
            counted.encode(errors="surrogatepass"),
            digest_size=DIGEST_BYTES,
            key=self._digest_key,
            person=kind.encode(),
        )
        bucket = int.from_bytes(digest.digest()[:4], "big") % BUCKETS
        return _Counter(
            kind, bucket, self._client.key(bucket, f"throttle:{kind}:{digest.hexdigest()}"), self._limits[kind]
        )


def _seconds(ms: int) -> int:
    return math.ceil(ms / 1000)


async def _all(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T | Unavailable]:
    """Call all at once and wait for each, also when one fails: what the others did has to be known."""
    results: list[T | Unavailable] = [Unavailable("session_store")] * len(calls)

    async def keep(index: int, call: Callable[[], Awaitable[T]]) -> None:
        try:
            results[index] = await call()
        except Unavailable as error:
            results[index] = error

    async with anyio.create_task_group() as group:
        for index, call in enumerate(calls):
            group.start_soon(keep, index, call)
    return results


def _values(results: Sequence[T | Unavailable]) -> list[T]:
    for result in results:
        if isinstance(result, Unavailable):
            raise result
    return [result for result in results if not isinstance(result, Unavailable)]
