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

from authd.config import BUCKETS
from authd.errors import Unavailable
from authd.events.contract import EventType, LoginLocked, SessionChanged, SessionOpened
from authd.events.factory import EventFactory, iso
from authd.events.redis import EventStreams, StreamEntry
from authd.infra.encoding import encode_base64url
from authd.infra.observe import metrics
from authd.infra.subject import Subject
from authd.infra.tasks.work_set import WorkSet
from authd.sessions.feed import RevocationFeed
from authd.sessions.postgres import Ending
from authd.sessions.redis import unpack_caller
from authd.sessions.relay_store import Relayed, RelayStore

#: Entries moved in one transaction.
ENTRIES_MAX = 200
TASKS = 4
#: A script's event is moved this long after it was recorded, together with those that came meanwhile.
GATHER_S = 0.05
#: How often all streams are looked at: for those of replicas that died, for buckets that another replica held, and
#: after a failure.
SWEEP_S = 2.0
#: How long a drain moves what is left.
DRAIN_S = 3.0

#: What scripts record about sessions; those that ended one with the reason that the log has for it.
_SESSION_EVENTS: dict[str, tuple[EventType, str | None]] = {
    "session.opened": ("session.opened", None),
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
            self._on_outbox(user_id % BUCKETS)
        if entries:
            await self._streams.delete(bucket, [entry.id for entry, _ in entries])
        for entry, _ in entries:
            metrics.events_relayed.labels(entry.kind).inc()
        if is_full:
            self.offer(bucket)
        if revoked is not None:
            await self._feed.applied(revoked.bucket, revoked.number)

    async def _read(self, bucket: int) -> tuple[list[tuple[StreamEntry, Relayed]], bool]:
        """The bucket's oldest entries and what they become, and whether there are more. What a newer replica recorded
        stays for it, and is looked past.
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
        """What the entry becomes; None where its kind or form is not one of this version."""
        try:
            if entry.kind == "login.locked":
                return self._login_locked(entry)
            if entry.kind in _SESSION_EVENTS:
                return self._session_changed(entry, *_SESSION_EVENTS[entry.kind])
        except (KeyError, ValueError, IndexError):
            pass
        return None

    def _login_locked(self, entry: StreamEntry) -> Relayed:
        user_id = int(entry.fields["u"])
        lock = LoginLocked(
            user_id=user_id or None,
            address=entry.fields["a"].decode(),
            counter=entry.fields["k"].decode(),
            occurred_at=iso(entry.at_ms),
        )
        once = f"{entry.id}:{lock.counter}:{lock.address}"
        return Relayed(user_id, self._events.told("login.locked", user_id, lock, once=once), None)

    def _session_changed(self, entry: StreamEntry, kind: EventType, reason: str | None) -> Relayed:
        user_id, session_id, occurred_at = int(entry.fields["u"]), entry.fields["s"], iso(entry.at_ms)
        sid = encode_base64url(session_id)
        change: SessionOpened | SessionChanged
        if kind == "session.opened":
            caller = unpack_caller(entry.fields["c"])
            change = SessionOpened(
                user_id=user_id,
                session_id=sid,
                occurred_at=occurred_at,
                address=caller.address,
                user_agent=caller.user_agent,
            )
        else:
            change = SessionChanged(user_id=user_id, session_id=sid, occurred_at=occurred_at)
        # Entries of before have no incarnation. Their endings are then applied to what is left of before.
        subject = Subject(user_id, int(entry.fields.get("i", 0)))
        ending = None if reason is None else Ending(subject, session_id, reason)
        return Relayed(user_id, self._events.told(kind, user_id, change, once=sid), ending)
