"""Hashes passwords on a bounded number of threads, and decides what may wait for one.

Who waits is served fairly by network, then by account: see fair_queue.py. The owner of each job is a task of the tree,
never a request: a client that hangs up stops no hash that runs.
"""

import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, Generic, TypeVar, cast

import anyio
import msgspec
import structlog
from anyio import CancelScope, CapacityLimiter, Event, Semaphore, to_thread
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from authd.errors import Unavailable
from authd.infra.networks import networks_of
from authd.infra.observe import metrics
from authd.passwords.fair_queue import FairQueue, Path
from authd.passwords.formats import Effort, effort_to_hash, effort_to_verify, hash_password, verify_password

#: A job that has to wait for other attempts is asked again after this.
ADMISSION_PAUSE_S = 0.05
#: A caller that is refused for the load gets its answer no sooner than this after it arrived: otherwise a few hundred
#: connections that ask again at once would fill the event loop with refusals, and everybody's login would wait for
#: that.
REFUSAL_PAUSE_S = 1.0
#: For each thread a task that hashes, and another that settles meanwhile what was hashed before.
OWNERS_PER_THREAD = 2
#: While both queues have jobs, known devices get three seconds of hashing for each one of the others.
WEIGHTS = {"known": 3.0, "others": 1.0}
#: What the newest measurement weighs in a moving average.
AVERAGE_WEIGHT = 0.2
#: Measured once at the start, a few ms, for a first estimate of every cost.
CALIBRATION_COST = 6

T = TypeVar("T")
R = TypeVar("R")

_log = structlog.get_logger()


class Admission(Enum):
    """What `Job.admit` answers; to refuse, it raises."""

    HASH = auto()
    #: Ask again after ADMISSION_PAUSE_S, from the end of the account's line: it has had its turn.
    WAIT = auto()


async def _admit_all() -> Admission:
    return Admission.HASH


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Generic[T, R]):
    """One hash, and what surrounds it. `admit` and `settle` must bound themselves: nobody cancels them."""

    effort: Effort
    #: Runs on a thread.
    work: Callable[[], T]
    #: Gets what `work` returned, or None if it broke or was not run after all, and makes the answer. It runs after
    #: every HASH, whatever became of the caller.
    settle: Callable[[T | None], Awaitable[R]]
    #: Asked when a thread is free for the job.
    admit: Callable[[], Awaitable[Admission]] = _admit_all
    #: The client's. Threads and places are shared evenly among networks, among their addresses, then among accounts.
    address: str = ""
    #: Whatever is named here shares one line at this address.
    account: str = ""
    #: Of a device that proved that it logged in before: it waits in a queue of its own, which is served more.
    is_known: bool = False

    @property
    def queue(self) -> str:
        return "known" if self.is_known else "others"

    @property
    def path(self) -> Path:
        """Return who holds the job: its queue, its networks and its account."""
        return (self.queue, *networks_of(self.address), self.account)


@dataclass(eq=False, slots=True)
class _Entry:
    """A job in the Hasher's hands. Its caller waits in `scope`, whose deadline falls away when the job is admitted."""

    job: Job[Any, Any]
    path: Path
    #: As estimated when it came.
    cost_s: float
    queued_at: float
    scope: CancelScope
    done: Event = field(default_factory=Event)
    result: Any = None
    error: Exception | None = None
    asker_left: bool = False
    started_at: float = math.inf


class _Overloaded(Exception):
    """There is no place for the job, or none any more. Its caller gets an `Unavailable`."""

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s


class HashSettings(msgspec.Struct, frozen=True):
    bcrypt_cost: int
    hash_threads_per_worker: int
    hash_deadline_s: float
    hash_queue_max: int


class Hasher:
    """Hashes on a bounded number of threads, fed from two bounded queues, by tasks that outlive the requests.

    A request only waits. When its client hangs up, a waiting job is dropped, while a running one keeps its thread until
    it ends and is settled: otherwise hang-ups could start more hashes than there are threads, or guess uncounted.

    Known devices wait in one queue, all others in the other, and the threads are shared by WEIGHTS. In both, networks
    get equal seconds of hashing, then their addresses, then the accounts of an address. So a flood, of wrong guesses or
    of right logins, makes nobody of another network wait for much more than one hash of each network that floods the
    same queue. In a full queue, a job of who holds little displaces the newest job of who holds most.

    All methods raise `Unavailable("hashing")`: when the job's queue is full and nobody holds more of it, when the work
    before the job's turn will take longer than `hash_deadline_s`, and when it was displaced, though no sooner than
    `refusal_pause_s` after it came; when it was not admitted within `hash_deadline_s`; and at the shutdown.
    """

    def __init__(self, settings: HashSettings, *, refusal_pause_s: float = REFUSAL_PAUSE_S) -> None:
        self._cost = settings.bcrypt_cost
        self._threads = settings.hash_threads_per_worker
        self._deadline_s = settings.hash_deadline_s
        self._refusal_pause_s = min(refusal_pause_s, self._deadline_s)
        self._limiter = CapacityLimiter(self._threads)
        self._free_threads = Semaphore(self._threads)
        self._queue: FairQueue[_Entry] = FairQueue(WEIGHTS, settings.hash_queue_max)
        self._times = _Times()
        self._in_hand: set[_Entry] = set()
        self._arrival = Event()
        self._is_open = False

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then finish and settle what runs, and refuse what waits."""
        _, seconds = await self._timed(partial(verify_password, "", None, CALIBRATION_COST))
        self._times.add(effort_to_verify(None, CALIBRATION_COST), seconds)
        self._is_open = True
        try:
            async with anyio.create_task_group() as owners:
                for _ in range(OWNERS_PER_THREAD * self._threads):
                    owners.start_soon(self._own_jobs)
                task_status.started()
        finally:
            self._is_open = False
            for entry in self._queue.clear():
                _count_waiting(entry, -1)
                self._answer(entry, error=self._stopped(entry.job))

    async def hash(
        self,
        password: str,
        *,
        admit: Callable[[], Awaitable[Admission]] = _admit_all,
        address: str = "",
        account: str = "",
    ) -> str:
        """`hash_password` with the configured cost. The others: a job's."""
        effort, work = effort_to_hash(password, self._cost), partial(hash_password, password, self._cost)
        return await self.run_job(
            Job(effort=effort, work=work, settle=_keep, admit=admit, address=address, account=account)
        )

    async def run_job(self, job: Job[T, R]) -> R:
        """Return what `job.settle` returned. Raise what any of the job's steps raised, too."""
        came_at = anyio.current_time()
        try:
            return await self._run(job)
        except _Overloaded as refusal:
            await anyio.sleep_until(came_at + self._refusal_pause_s)
            raise Unavailable("hashing", refusal.retry_after_s) from None

    async def _run(self, job: Job[T, R]) -> R:
        entry = self._enqueue(job)
        try:
            with entry.scope:
                await entry.done.wait()
        finally:
            entry.asker_left = not entry.done.is_set()
            if self._queue.discard(entry):
                _count_waiting(entry, -1)
                _count_refusal("deadline" if entry.scope.cancel_called else "left", job)
        if entry.asker_left:
            raise Unavailable("hashing", self._retry_after_s(job))
        if entry.error is not None:
            raise entry.error
        return cast(R, entry.result)

    def _enqueue(self, job: Job[Any, Any]) -> _Entry:
        if not self._is_open:
            raise self._stopped(job)
        if self._wait_s(job) > self._deadline_s:
            raise self._overloaded("estimate", job)
        now = anyio.current_time()
        scope = CancelScope(deadline=now + self._deadline_s)
        entry = _Entry(job, job.path, self._times.of(job.effort), now, scope)
        if not self._put(entry):
            raise self._overloaded("full", job)
        self._arrival.set()
        self._arrival = Event()
        return entry

    def _put(self, entry: _Entry, until: float | None = None) -> bool:
        """Let the entry wait, in another's place where the queue is full. False if it has no right to one."""
        left = self._queue.add(entry, entry.path, entry.cost_s, until)
        if left is entry:
            return False
        _count_waiting(entry, 1)
        if left is not None:
            _count_waiting(left, -1)
            self._answer(left, error=self._overloaded("displaced", left.job))
        return True

    async def _own_jobs(self) -> None:
        while True:
            async with AsyncExitStack() as thread:
                await thread.enter_async_context(self._free_threads)
                entry = await self._next()
                self._in_hand.add(entry)
                # Shielded: what was begun is finished and settled, at shutdown too.
                with CancelScope(shield=True):
                    await self._serve(entry, thread)
                self._in_hand.discard(entry)

    async def _next(self) -> _Entry:
        while True:
            await checkpoint()
            entry = self._queue.take(anyio.current_time())
            if entry is not None:
                _count_waiting(entry, -1)
                return entry
            with CancelScope(deadline=self._queue.paused_until):
                await self._arrival.wait()

    async def _serve(self, entry: _Entry, thread: AsyncExitStack) -> None:
        try:
            admission = await entry.job.admit()
        except Exception as error:
            _count_refusal("not_admitted", entry.job)
            return self._answer(entry, error=error)
        if admission is Admission.HASH:
            return await self._hash_and_settle(entry, thread)
        if not entry.asker_left and not self._put(entry, anyio.current_time() + ADMISSION_PAUSE_S):
            self._answer(entry, error=self._overloaded("full", entry.job))
        return None

    async def _hash_and_settle(self, entry: _Entry, thread: AsyncExitStack) -> None:
        value: Any = None
        result: Any = None
        error: Exception | None = None
        if entry.asker_left:
            _count_refusal("left", entry.job)
        else:
            entry.scope.deadline = math.inf
            entry.started_at = anyio.current_time()
            metrics.hash_wait_seconds.labels(entry.job.queue).observe(entry.started_at - entry.queued_at)
            try:
                value, seconds = await self._timed(entry.job.work)
                self._times.add(entry.job.effort, seconds)
                metrics.hash_seconds.observe(seconds)
            except Exception as broken:
                error = broken
        await thread.aclose()  # the next job need not wait until this one is settled
        try:
            result = await entry.job.settle(value)
        except Exception as unsettled:
            error = error or unsettled
        self._answer(entry, result, error)

    async def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        def timed() -> tuple[T, float]:
            start = time.perf_counter()
            return work(), time.perf_counter() - start

        return await to_thread.run_sync(timed, limiter=self._limiter)

    def _answer(self, entry: _Entry, result: Any = None, error: Exception | None = None) -> None:
        entry.result, entry.error = result, error
        entry.done.set()
        if error is not None and entry.asker_left:
            _log.warning("hash_job_failed_unheard", exc_info=error)

    def _wait_s(self, job: Job[Any, Any]) -> float:
        """Return the seconds until a thread is free for a job that comes now, if none comes after it."""
        now = anyio.current_time()
        running = (self._times.of(entry.job.effort) - max(0.0, now - entry.started_at) for entry in self._in_hand)
        waiting = self._queue.work_ahead_s(job.path, self._times.of(job.effort))
        return (sum(max(0.0, left) for left in running) + waiting) / self._threads

    def _overloaded(self, reason: str, job: Job[Any, Any]) -> _Overloaded:
        _count_refusal(reason, job)
        return _Overloaded(self._retry_after_s(job))

    def _stopped(self, job: Job[Any, Any]) -> Unavailable:
        _count_refusal("stopped", job)
        return Unavailable("hashing", self._retry_after_s(job))

    def _retry_after_s(self, job: Job[Any, Any]) -> int:
        return max(1, math.ceil(self._wait_s(job)))


async def _keep(value: T | None) -> T:
    return cast(T, value)


def _count_refusal(reason: str, job: Job[Any, Any]) -> None:
    metrics.hash_refused.labels(reason, job.queue).inc()


def _count_waiting(entry: _Entry, change: int) -> None:
    metrics.hash_waiting.labels(entry.job.queue).inc(change)


class _Times:
    """Seconds per hash: a moving average for each scheme and cost, and for costs not seen yet, one for each round."""

    def __init__(self) -> None:
        self._average_s: dict[Effort, float] = {}
        self._round_s = 0.0

    def add(self, effort: Effort, seconds: float) -> None:
        self._average_s[effort] = _moved(self._average_s.get(effort, seconds), seconds)
        round_s = seconds / (1 << effort.cost)
        self._round_s = _moved(self._round_s or round_s, round_s)

    def of(self, effort: Effort) -> float:
        return self._average_s.get(effort, self._round_s * (1 << effort.cost))


def _moved(average: float, newest: float) -> float:
    return average + AVERAGE_WEIGHT * (newest - average)
