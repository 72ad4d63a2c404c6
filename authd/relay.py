"""Moves the events born in Redis into Postgres: bucket by bucket, exactly what a script recorded, at least once.

A bucket is moved in one transaction under its lock: read the stream, add the rows, commit; only then are the entries
deleted. What a crash leaves behind is moved again, with the same event ids. Any replica moves any bucket.
"""

from collections.abc import Callable, Sequence

import anyio
import structlog
from anyio.abc import TaskStatus

from authd.announcements import EventFactory, iso
from authd.config import BUCKETS
from authd.errors import Unavailable
from authd.events import Event, LoginLocked, SessionChanged
from authd.observe import metrics
from authd.postgres.relay import RelayedBucket, RelayStore
from authd.postgres.revocations import Revoked
from authd.redis.events import EventStreams, StreamEntry
from authd.redis.sessions import unpack_client
from authd.revocations import RevocationFeed
from authd.tokens import encode_base64url

#: Entries moved in one transaction.
ENTRIES_MAX = 200
TASKS = 2
#: A script's event is moved this long after it was recorded, together with those that came meanwhile.
GATHER_S = 0.05
#: How often all streams are looked at: for those of replicas that died, and after a failure.
SWEEP_S = 5.0

#: The endings that Redis decides, and the reason they have in the log.
_ENDINGS = {"session.evicted": "evicted", "session.reuse_detected": "reused"}

_log = structlog.get_logger()


class EventRelay:
    def __init__(
        self,
        streams: EventStreams,
        store: RelayStore,
        events: EventFactory,
        feed: RevocationFeed,
        on_outbox: Callable[[int], None],
    ) -> None:
        """`on_outbox` is called with each lane that got rows, after the commit."""
        self._streams = streams
        self._store = store
        self._events = events
        self._feed = feed
        self._on_outbox = on_outbox
        self._offered: set[int] = set()
        self._send, self._receive = anyio.create_memory_object_stream[int](BUCKETS)  # each bucket at most once

    def offer(self, bucket: int) -> None:
        """Look into this bucket soon. Never blocks or raises."""
        if bucket not in self._offered:
            self._offered.add(bucket)
            self._send.send_nowait(bucket)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Ready at once: what waits in the streams waits safely."""
        async with anyio.create_task_group() as group:
            for _ in range(TASKS):
                group.start_soon(self._move_buckets)
            group.start_soon(self._sweep)
            task_status.started()

    async def drain(self) -> None:
        """Move what is there now, after the last request. What does not get through now is moved by the next sweep of
        any replica.
        """
        try:
            for bucket in await self._streams.filled():
                await self._move(bucket)
        except Unavailable as error:
            _log.warning("events_not_relayed", part=error.part)

    async def _move_buckets(self) -> None:
        async for bucket in self._receive:
            await anyio.sleep(GATHER_S)
            self._offered.discard(bucket)
            try:
                await self._move(bucket)
            except Unavailable as error:  # the sweep comes back to it
                _log.warning("events_not_relayed", bucket=bucket, part=error.part)

    async def _sweep(self) -> None:
        while True:
            try:
                filled = await self._streams.filled()
            except Unavailable:
                filled = {}
            metrics.relay_waiting.set(sum(filled.values()))
            for bucket in filled:
                self.offer(bucket)
            await anyio.sleep(SWEEP_S)

    async def _move(self, bucket: int) -> None:
        """Move the bucket's entries, as far as ENTRIES_MAX; nothing while another replica does."""
        async with self._store.bucket(bucket) as locked:
            if locked is None:
                return
            entries = await self._streams.read(bucket, ENTRIES_MAX)
            revoked = await self._add(locked, entries)
        if entries:
            await self._streams.delete(bucket, [entry.id for entry in entries])
            for entry in entries:
                metrics.events_relayed.labels(entry.kind).inc()
            for user_id in {int(entry.fields["u"]) for entry in entries}:
                self._on_outbox(user_id % BUCKETS)
        if revoked is not None:
            await self._feed.applied(revoked.bucket, revoked.number)
        if len(entries) == ENTRIES_MAX:
            self.offer(bucket)

    async def _add(self, locked: RelayedBucket, entries: Sequence[StreamEntry]) -> Revoked | None:
        revoked = None
        for entry in entries:
            await locked.add_events(self._event(entry))
            if entry.kind in _ENDINGS:
                user_id, reason = int(entry.fields["u"]), _ENDINGS[entry.kind]
                revoked = await locked.end_session(user_id, entry.fields["s"], reason) or revoked
        return revoked

    def _event(self, entry: StreamEntry) -> list[Event]:
        user_id, occurred_at = int(entry.fields["u"]), iso(entry.at_ms)
        if entry.kind == "login.locked":
            lock = LoginLocked(
                user_id=user_id or None,
                address=entry.fields["a"].decode(),
                counter=entry.fields["k"].decode(),
                occurred_at=occurred_at,
            )
            return self._events.told("login.locked", user_id, lock, once=f"{entry.id}:{lock.counter}:{lock.address}")
        session_id = encode_base64url(entry.fields["s"])
        client = unpack_client(entry.fields["c"]) if "c" in entry.fields else None
        change = SessionChanged(
            user_id=user_id,
            session_id=session_id,
            occurred_at=occurred_at,
            address=client.address if client else "",
            user_agent=client.user_agent if client else "",
        )
        return self._events.told(entry.kind, user_id, change, once=session_id)  # type: ignore[arg-type]
