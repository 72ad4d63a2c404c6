"""Carries the revocation log from Postgres into Redis.

Redis is a view of the log: each bucket keeps the number of the last row applied to it, and a script that is asked with
a higher number than that answers `behind`. Then the missing rows are applied here, in order, by a task of the tree: a
request that hangs up stops nothing, it only waits.
"""

from collections.abc import Callable, Sequence
from functools import partial

import anyio
import structlog
from anyio.abc import TaskStatus

from authd.config import BUCKETS
from authd.errors import Unavailable
from authd.events.contract import EndingReason
from authd.infra.observe import metrics
from authd.infra.subject import Subject
from authd.infra.tasks.backoff import Backoff
from authd.infra.tasks.every import every
from authd.sessions.endings import Endings
from authd.sessions.postgres import Revocation, Revocations
from authd.sessions.redis import SessionStore

#: Tasks that apply rows, and tasks that write endings: the latter wait for Postgres, the former for either.
CATCH_UP_TASKS = 4
ENDING_TASKS = 2
#: Jobs that one request waits for.
ROUNDS_MAX = 4
#: Endings that Redis decided and Postgres does not hold yet; more are refused (and counted) while it is unavailable.
ENDINGS_MAX = 10_000
HEADS_INTERVAL_S = 1.0
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0
JANITOR_INTERVAL_S = 60.0

_log = structlog.get_logger()


class _Job:
    """One piece of work and its outcome, which any number of requests may wait for."""

    def __init__(self) -> None:
        self._done = anyio.Event()
        self._failure: Unavailable | None = None

    def finish(self, failure: Unavailable | None = None) -> None:
        self._failure = failure
        self._done.set()

    async def wait(self) -> None:
        await self._done.wait()
        if self._failure is not None:
            # One of its own for each who waits: what it is raised through is written into an exception.
            raise Unavailable(self._failure.part) from self._failure


class _CatchUp(_Job):
    def __init__(self, bucket: int) -> None:
        super().__init__()
        self.bucket = bucket


class _Ending(_Job):
    def __init__(self, subject: Subject, session_id: bytes, reason: EndingReason) -> None:
        super().__init__()
        self.subject = subject
        self.session_id = session_id
        self.reason = reason


class RevocationFeed:
    """What this replica knows of the log, and the tasks that keep Redis up with it."""

    def __init__(
        self, log: Revocations, endings: Endings, store: SessionStore, on_outbox: Callable[[int], None] = lambda _: None
    ) -> None:
        """`on_outbox` is called with each lane that got rows together with a row of the log."""
        self._on_outbox = on_outbox
        self._revocations = log
        self._endings = endings
        self._store = store
        self._heads: dict[int, int] = {}
        # The servers of Redis for which the heads are known.
        self._generation = -1
        self._learning = anyio.Lock()
        self._applied: dict[int, int] = {}
        self._catching: dict[int, _CatchUp] = {}
        self._due_catch_ups, self._next_catch_ups = anyio.create_memory_object_stream[_CatchUp](
            BUCKETS  # at most one for each bucket
        )
        self._new_endings, self._next_endings = anyio.create_memory_object_stream[_Ending](ENDINGS_MAX)

    async def ensure_heads_known(self) -> int:
        """Return the server generation, reading the heads first if Redis has changed since they were last read. A
        server that took over from another may lack rows that this replica has not heard of yet.

        :raises Unavailable: when they cannot be read now.
        """
        while self._generation != self._store.generation:
            async with self._learning:
                generation = self._store.generation
                if self._generation != generation:
                    self._learn_all(await self._revocations.heads())
                    self._generation = generation
        return self._generation

    def head(self, bucket: int) -> int:
        """Return the highest number that this replica knows of the bucket."""
        return self._heads.get(bucket, 0)

    def learn(self, bucket: int, number: int) -> None:
        self._heads[bucket] = max(number, self.head(bucket))

    async def catch_up(self, bucket: int, applied: int) -> None:
        """Apply the rows after `applied`, the last that Redis said it has.

        :raises Unavailable: when that does not succeed now.
        """
        self._applied[bucket] = applied
        await self.wait_applied(bucket, self.head(bucket))

    async def wait_applied(self, bucket: int, number: int) -> None:
        """Wait until Redis has applied the row `number`.

        :raises Unavailable: when that does not succeed now; the row stays and is applied before the bucket is served.
        """
        self.learn(bucket, number)
        self._on_outbox(bucket)
        for _ in range(ROUNDS_MAX):
            if self._applied.get(bucket, -1) >= number:
                return
            # A job that is under way may have read the log before our row was in it: then there is another round.
            job = self._catching.get(bucket)
            if job is None:
                job = self._catching[bucket] = _CatchUp(bucket)
                self._due_catch_ups.send_nowait(job)
            await job.wait()
        if self._applied.get(bucket, -1) < number:
            # The log itself went back: a Postgres restored from an older backup.
            _log.error("revocation_log_lacks_rows", bucket=bucket, number=number)
            raise Unavailable("session_store")

    async def record(self, subject: Subject, session_ids: Sequence[bytes], reason: EndingReason) -> None:
        """Log endings that Redis decided. The tombstones in Redis hold meanwhile; the tasks go on when the request
        does not wait, and try again while Postgres is unavailable.

        :raises Unavailable: when too many wait already.
        """
        jobs = [_Ending(subject, session_id, reason) for session_id in session_ids]
        try:
            for job in jobs:
                self._new_endings.send_nowait(job)
        except anyio.WouldBlock:
            raise Unavailable("user_store") from None
        for job in jobs:
            await job.wait()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run the tasks; ready when the heads are known, since no script may be asked with less.

        :raises Unavailable: when the heads cannot be read at the start.
        """
        with self._due_catch_ups, self._next_catch_ups, self._new_endings, self._next_endings:
            self._learn_all(await self._revocations.heads())
            async with anyio.create_task_group() as group:
                for _ in range(CATCH_UP_TASKS):
                    group.start_soon(self._catch_up_task)
                for _ in range(ENDING_TASKS):
                    group.start_soon(self._ending_task)
                group.start_soon(partial(every, HEADS_INTERVAL_S, self._follow_heads, event="revocation_heads_unknown"))
                group.start_soon(partial(every, JANITOR_INTERVAL_S, self._clean, event="revocations_not_cleaned"))
                task_status.started()

    async def _catch_up_task(self) -> None:
        async for job in self._next_catch_ups:
            await self._run_catch_up(job)

    async def _ending_task(self) -> None:
        async for job in self._next_endings:
            await self._write(job)

    async def _write(self, job: _Ending) -> None:
        backoff = Backoff(RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            try:
                row = await self._endings.record_sessions(job.subject, [job.session_id], job.reason)
                break
            except Unavailable as error:
                metrics.unavailable.labels(error.part).inc()
                user_id, delay_s = job.subject.user_id, backoff.next_s()
                _log.warning("revocation_not_logged", user_id=user_id, reason=job.reason, retry_in_s=round(delay_s, 3))
                await anyio.sleep(delay_s)
        job.finish()
        # The tombstone holds already; this only moves the bucket's mark, so that no script has to wait for it.
        if row is not None:
            self._on_outbox(row.bucket)
            await self._run_catch_up(_CatchUp(row.bucket))

    async def _run_catch_up(self, job: _CatchUp) -> None:
        try:
            await self._apply_missing(job.bucket)
        except Unavailable as error:
            metrics.unavailable.labels(error.part).inc()
            _log.warning("revocations_not_applied", bucket=job.bucket, part=error.part)
            job.finish(error)
        else:
            job.finish()
        finally:
            if self._catching.get(job.bucket) is job:
                del self._catching[job.bucket]

    async def _apply_missing(self, bucket: int) -> None:
        applied = self._applied.get(bucket, 0)
        while True:
            head, rows = await self._revocations.after(bucket, applied)
            if applied > head:
                # Read after Redis's number was known, so no race: Postgres was restored from an older backup, and its
                # next rows would have numbers that Redis has passed. Redis begins again; endings may repeat.
                _log.error("redis_ahead_of_log", bucket=bucket, applied=applied, head=head)
                applied = (await self._store.skip(bucket, applied, 0)).number
                continue
            if not rows and applied < head:
                applied = (await self._store.skip(bucket, applied, head)).number
            for row in rows:
                applied, before = await self._apply(row, applied), applied
                if applied != row.number:
                    _log.debug("revocations_moved", bucket=bucket, expected=before, found=applied)
                    break
            self._applied[bucket] = applied
            if applied == head:
                self.learn(bucket, head)
                return

    async def _apply(self, row: Revocation, after: int) -> int:
        answer = await self._store.apply(
            row.subject, after, row.number, session_id=row.session_id, epoch=row.epoch, reason=row.reason
        )
        return answer.number

    async def _follow_heads(self) -> None:
        known = dict(self._heads)
        heads = await self._revocations.heads()
        self._learn_all(heads)
        for bucket, number in known.items():
            if heads.get(bucket, 0) < number:
                # Postgres lost commits in a failover. Redis begins that bucket again before the numbers come back
                # with other rows.
                self._heads[bucket] = heads.get(bucket, 0)
                await self._run_catch_up(_CatchUp(bucket))

    async def _clean(self) -> None:
        """Delete the rows that are over, once the tombstones of those with events are in the outbox."""
        while await self._endings.enqueue_tombstones():
            pass
        while await self._revocations.delete_expired():
            pass

    def _learn_all(self, heads: dict[int, int]) -> None:
        for bucket, number in heads.items():
            self.learn(bucket, number)
