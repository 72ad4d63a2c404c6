"""Moves the events born in Redis into Postgres: bucket by bucket, exactly what a script recorded, at least once.

A bucket is moved in one transaction under its lock: read the stream, add the rows, commit; only then are the entries
deleted. What a crash leaves behind, and what an older Redis brings back, is moved again with the same event ids. There
is no mark of how far the stream was read: after a wipe or a failover, ids may begin again below it. Any replica moves
any bucket.
"""

from collections.abc import Callable, Iterable

import anyio
import structlog
from anyio.abc import TaskStatus

from authd.errors import Unavailable
from authd.events.contract import EndingReason, EventType, LoginLocked, SessionChanged, SessionOpened
from authd.events.factory import EventFactory, iso
from authd.events.redis import EventStreams, StreamEntry
from authd.infra.encoding import encode_base64url
from authd.infra.observe import metrics
from authd.infra.subject import bucket_of_user
from authd.infra.tasks.work_set import WorkSet
from authd.sessions.feed import RevocationFeed
from authd.sessions.postgres import Ending, Relayed, RelayStore
from authd.sessions.redis import unpack_caller

#: Entries moved in one transaction.
ENTRIES_MAX = 200
TASKS = 4
#: A script's event is moved this long after it was recorded, together with those that arrived meanwhile.
GATHER_S = 0.05
#: How often all streams are checked: for those of replicas that died, for buckets that another replica held, and
#: after a failure.
SWEEP_S = 2.0
#: How long a drain moves what is left.
DRAIN_S = 3.0

#: What scripts record of sessions that they ended, with the reason that the log has for it.
_ENDED_BY: dict[str, tuple[EventType, EndingReason]] = {
    "session.evicted": ("session.evicted", "evicted"),
    "session.reuse_detected": ("session.reuse_detected", "reused"),
}

_log = structlog.get_logger()


class EventRelay:
    def __init__(
        self,
        streams: EventStreams,
        store: RelayStore,
        events: EventFactory,
        feed: RevocationFeed,
        on_outbox: Callable[[int], None],
        *,
        sweep_s: float = SWEEP_S,
    ) -> None:
        """`on_outbox` is called with each lane that got rows, after the commit."""
        self._streams = streams
        self._store = store
        self._events = events
        self._feed = feed
        self._on_outbox = on_outbox
        self._sweep_s = sweep_s
        self._buckets = WorkSet(GATHER_S)

    def offer(self, bucket: int) -> None:
        """Look into this bucket soon. Never blocks or raises; what is offered when nobody listens, a sweep finds."""
        self._buckets.offer(bucket)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Ready at once: what waits in the streams waits safely."""
        async with anyio.create_task_group() as group:
            for _ in range(TASKS):
                group.start_soon(self._move_buckets)
            group.start_soon(self._buckets.sweep, self._sweep_s, self._filled)
            task_status.started()

    async def drain(self) -> None:
        """Move what is there now, after the last request, for at most DRAIN_S. What does not get through now is moved
        by a sweep of any replica.
        """
        with anyio.move_on_after(DRAIN_S):
            try:
                filled = await self._streams.filled()
            except Unavailable as error:
                metrics.unavailable.labels(error.part).inc()
                _log.warning("events_not_relayed", part=error.part)
                return
            for bucket in filled:
                self.offer(bucket)
            await self._buckets.drain()

    async def _move_buckets(self) -> None:
        while (bucket := await self._buckets.take()) is not None:
            try:
                await self._move(bucket)
            except Unavailable as error:
                metrics.unavailable.labels(error.part).inc()
                _log.warning("events_not_relayed", bucket=bucket, part=error.part)
                if error.part == "user_store" and not error.is_busy:
                    self._buckets.forget()  # the others would fare no better; the sweep comes back to all
            finally:
                self._buckets.done(bucket)

    async def _filled(self) -> Iterable[int]:
        filled = await self._streams.filled()
        metrics.relay_waiting.set(sum(filled.values()))
        return filled

    async def _move(self, bucket: int) -> None:
        """Move the bucket's entries, as far as ENTRIES_MAX; nothing while another replica does."""
        async with self._store.bucket(bucket) as locked:
            if locked is None:
                return
            entries, is_full = await self._read(bucket)
            revoked = await locked.add([relayed for _, relayed in entries])
        for user_id in {relayed.user_id for _, relayed in entries}:
            self._on_outbox(bucket_of_user(user_id))
        if entries:
            await self._streams.delete(bucket, [entry.id for entry, _ in entries])
        for entry, _ in entries:
            metrics.events_relayed.labels(entry.kind).inc()
        if is_full:
            self.offer(bucket)
        if revoked is not None:
            await self._feed.wait_applied(revoked.bucket, revoked.number)

    async def _read(self, bucket: int) -> tuple[list[tuple[StreamEntry, Relayed]], bool]:
        """Return the bucket's oldest entries and what they become, and whether there are more. What a newer replica
        recorded is passed over, and stays for it.
        """
        after = ""
        while True:
            entries = await self._streams.read(bucket, ENTRIES_MAX, after)
            all_relayed = [(entry, self._relayed(entry)) for entry in entries]
            known = [(entry, relayed) for entry, relayed in all_relayed if relayed is not None]
            if len(known) < len(entries):
                _log.warning("events_not_understood", bucket=bucket, count=len(entries) - len(known))
            is_full = len(entries) == ENTRIES_MAX
            if known or not is_full:
                return known, is_full
            after = entries[-1].id

    def _relayed(self, entry: StreamEntry) -> Relayed | None:
        """Return what the entry becomes; None where its kind or form is not one of this version."""
        try:
            if entry.kind == "login.locked":
                return self._login_locked(entry)
            if entry.kind == "session.opened":
                return self._session_opened(entry)
            if entry.kind in _ENDED_BY:
                return self._session_ended(entry, *_ENDED_BY[entry.kind])
        except (KeyError, ValueError, IndexError):
            pass
        return None

    def _login_locked(self, entry: StreamEntry) -> Relayed:
        user_id = entry.user_id
        lock = LoginLocked(
            user_id=user_id or None, address=entry.address, counter=entry.counter, occurred_at=iso(entry.at_ms)
        )
        once = f"{entry.id}:{lock.counter}:{lock.address}"
        return Relayed(user_id, self._events.event("login.locked", user_id, lock, once=once), None)

    def _session_opened(self, entry: StreamEntry) -> Relayed:
        caller, sid = unpack_caller(entry.caller), encode_base64url(entry.session_id)
        opened = SessionOpened(
            user_id=entry.user_id,
            session_id=sid,
            occurred_at=iso(entry.at_ms),
            address=caller.address,
            user_agent=caller.user_agent,
        )
        return Relayed(entry.user_id, self._events.event("session.opened", entry.user_id, opened, once=sid), None)

    def _session_ended(self, entry: StreamEntry, kind: EventType, reason: EndingReason) -> Relayed:
        subject, sid = entry.subject, encode_base64url(entry.session_id)
        change = SessionChanged(user_id=subject.user_id, session_id=sid, occurred_at=iso(entry.at_ms))
        # An ending without an incarnation is applied to what is left of before there were any.
        ending = Ending(subject, entry.session_id, reason)
        return Relayed(subject.user_id, self._events.event(kind, subject.user_id, change, once=sid), ending)
