"""Hashes passwords on a bounded number of threads, and decides what may wait for one.

The owner of each job is a task of the tree, never a request: a client that hangs up stops no hash that runs.
"""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, Generic, TypeVar, cast

import anyio
import structlog
from anyio import CancelScope, CapacityLimiter, Event, Semaphore, to_thread
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from authd.config import Settings
from authd.errors import Unavailable
from authd.observe import metrics
from authd.passwords import Effort, effort_to_hash, effort_to_verify, hash_password, verify_password

#: A job that has to wait for other attempts is asked again after this.
ADMISSION_PAUSE_S = 0.05
#: One account may hold one part in so many of a queue, so that its flood leaves room for the others.
ACCOUNT_SHARE = 4
#: For each thread a task that hashes, and another that settles meanwhile what was hashed before.
OWNERS_PER_THREAD = 2
#: Known devices are served so often for each time that others are, while both wait.
KNOWN_TURNS = 3
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
    #: Ask again after ADMISSION_PAUSE_S, from the end of the queue.
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
    #: every HASH, whatever became of the asker.
    settle: Callable[[T | None], Awaitable[R]]
    #: Asked when a thread is free for the job.
    admit: Callable[[], Awaitable[Admission]] = _admit_all
    #: Jobs of one account, or of whatever else is named here, share a part of the queue.
    account: str | None = None
    #: Of a device that proved that it logged in before: it waits in a queue of its own, and is served first.
    is_known: bool = False


@dataclass(eq=False, slots=True)
class _Entry:
    """A job in the Hasher's hands. Its asker waits in `scope`, whose deadline falls away when the job is admitted."""

    job: Job[Any, Any]
    queued_at: float
    scope: CancelScope
    done: Event = field(default_factory=Event)
    result: Any = None
    error: Exception | None = None
    asker_left: bool = False
    started_at: float = math.inf


class Hasher:
    """Hashes on a bounded number of threads, fed from two bounded queues, by tasks that outlive the requests.

    A request only waits. When its client hangs up, a waiting job is dropped, while a running one keeps its thread until
    it ends and is settled: else hang-ups could start more hashes than there are threads, or guess uncounted.

    Known devices wait in one queue, all others in the other: a flood of guesses fills the latter, and the former is
    served KNOWN_TURNS times as often while both have jobs.

    All methods raise `Unavailable("hashing")`: at once when the job's queue, or its account's part of it, is full or
    when the work ahead will take longer than `hash_deadline_s`; and when a job was not admitted within that time.
    """

    def __init__(self, settings: Settings) -> None:
        self._cost = settings.bcrypt_cost
        self._threads = settings.hash_threads_per_worker
        self._deadline_s = settings.hash_deadline_s
        self._limiter = CapacityLimiter(self._threads)
        self._free_threads = Semaphore(self._threads)
        self._queues = _Queues(settings.hash_queue_max)
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
            for entry in self._queues.clear():
                self._answer(entry, error=self._refusal("stopped", entry.job))

    async def hash(
        self, password: str, *, admit: Callable[[], Awaitable[Admission]] = _admit_all, share: str | None = None
    ) -> str:
        """`hash_password` with the configured cost. `admit` and `share`: a job's `admit` and `account`."""
        effort, work = effort_to_hash(password, self._cost), partial(hash_password, password, self._cost)
        return await self.run_job(Job(effort=effort, work=work, settle=_keep, admit=admit, account=share))

    async def verify(self, password: str, stored: str | None) -> bool:
        """`verify_password` with the configured cost. `stored` is None for an unknown user."""
        effort = effort_to_verify(stored, self._cost)
        work = partial(verify_password, password, stored, self._cost)
        return await self.run_job(Job(effort=effort, work=work, settle=_keep))

    async def run_job(self, job: Job[T, R]) -> R:
        """What `job.settle` returned. Raises what any of the job's steps raised, too."""
        entry = self._enqueue(job)
        try:
            with entry.scope:
                await entry.done.wait()
        finally:
            entry.asker_left = not entry.done.is_set()
            if self._queues.of(job).discard(entry):
                _count_refusal("deadline" if entry.scope.cancel_called else "left", job)
        if entry.asker_left:
            raise self._busy(job)
        if entry.error is not None:
            raise entry.error
        return cast(R, entry.result)

    def _enqueue(self, job: Job[Any, Any]) -> _Entry:
        queue = self._queues.of(job)
        if not self._is_open:
            raise self._refusal("stopped", job)
        if queue.is_full:
            raise self._refusal("full", job)
        if queue.is_share_used(job.account):
            raise self._refusal("account_share", job)
        if self._wait_s(job) > self._deadline_s:
            raise self._refusal("estimate", job)
        now = anyio.current_time()
        entry = _Entry(job, now, CancelScope(deadline=now + self._deadline_s))
        queue.add(entry)
        self._arrival.set()
        self._arrival = Event()
        return entry

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
            entry = self._queues.take(anyio.current_time())
            if entry is not None:
                return entry
            with CancelScope(deadline=self._queues.paused_until):
                await self._arrival.wait()

    async def _serve(self, entry: _Entry, thread: AsyncExitStack) -> None:
        try:
            admission = await entry.job.admit()
        except Exception as error:
            _count_refusal("not_admitted", entry.job)
            return self._answer(entry, error=error)
        if admission is Admission.HASH:
            return await self._hash_and_settle(entry, thread)
        if not entry.asker_left:
            self._queues.of(entry.job).pause(entry, anyio.current_time() + ADMISSION_PAUSE_S)
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
            metrics.hash_wait_seconds.labels(_queue_name(entry.job)).observe(entry.started_at - entry.queued_at)
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
        """Seconds until a thread is free for a job that comes now, if none comes after it."""
        now = anyio.current_time()
        running = (self._times.of(entry.job.effort) - max(0.0, now - entry.started_at) for entry in self._in_hand)
        waiting = self._queues.work_ahead_s(job, self._times)
        return (sum(max(0.0, left) for left in running) + waiting) / self._threads

    def _refusal(self, reason: str, job: Job[Any, Any]) -> Unavailable:
        _count_refusal(reason, job)
        return self._busy(job)

    def _busy(self, job: Job[Any, Any]) -> Unavailable:
        return Unavailable("hashing", max(1, math.ceil(self._wait_s(job))))


async def _keep(value: T | None) -> T:
    return cast(T, value)


def _queue_name(job: Job[Any, Any]) -> str:
    return "known" if job.is_known else "others"


def _count_refusal(reason: str, job: Job[Any, Any]) -> None:
    metrics.hash_refused.labels(reason, _queue_name(job)).inc()


class _Queues:
    """The queue of known devices and that of all others."""

    def __init__(self, size_max: int) -> None:
        self._known = _Queue("known", size_max)
        self._others = _Queue("others", size_max)
        self._known_in_a_row = 0

    def of(self, job: Job[Any, Any]) -> "_Queue":
        return self._known if job.is_known else self._others

    @property
    def paused_until(self) -> float:
        return min(self._known.paused_until, self._others.paused_until)

    def take(self, now: float) -> _Entry | None:
        is_others_turn = self._known_in_a_row >= KNOWN_TURNS
        for queue in (self._others, self._known) if is_others_turn else (self._known, self._others):
            entry = queue.take(now)
            if entry is not None:
                self._known_in_a_row = min(self._known_in_a_row + 1, KNOWN_TURNS) if entry.job.is_known else 0
                return entry
        return None

    def work_ahead_s(self, job: Job[Any, Any], times: "_Times") -> float:
        """Seconds of hashing for all that is served before a job that comes now."""
        mine, other = (self._known, self._others) if job.is_known else (self._others, self._known)
        turns = 1 / KNOWN_TURNS if job.is_known else KNOWN_TURNS
        passing = math.ceil((len(mine) + 1) * turns)
        part = min(1.0, passing / len(other)) if len(other) else 0.0
        return mine.work_s(times) + part * other.work_s(times)

    def clear(self) -> list[_Entry]:
        return self._known.clear() + self._others.clear()


class _Queue:
    """The entries that wait, in order; those told to wait stand aside, and come back at the end."""

    def __init__(self, name: str, size_max: int) -> None:
        self.name = name
        self._size_max = size_max
        self._ready: OrderedDict[_Entry, None] = OrderedDict()
        self._paused: OrderedDict[_Entry, float] = OrderedDict()
        self._accounts: Counter[str] = Counter()
        self._efforts: Counter[Effort] = Counter()

    def __len__(self) -> int:
        return len(self._ready) + len(self._paused)

    @property
    def is_full(self) -> bool:
        return len(self) >= self._size_max

    @property
    def paused_until(self) -> float:
        return next(iter(self._paused.values()), math.inf)

    def is_share_used(self, account: str | None) -> bool:
        return account is not None and self._accounts[account] >= max(1, self._size_max // ACCOUNT_SHARE)

    def work_s(self, times: "_Times") -> float:
        return sum(times.of(effort) * count for effort, count in self._efforts.items())

    def add(self, entry: _Entry) -> None:
        self._ready[entry] = None
        self._count(entry, 1)

    def pause(self, entry: _Entry, until: float) -> None:
        # All pauses are equally long, so the first is the first to end.
        self._paused[entry] = until
        self._count(entry, 1)

    def take(self, now: float) -> _Entry | None:
        while self.paused_until <= now:
            self._ready[self._paused.popitem(last=False)[0]] = None
        if not self._ready:
            return None
        entry, _ = self._ready.popitem(last=False)
        self._count(entry, -1)
        return entry

    def discard(self, entry: _Entry) -> bool:
        """Take out one whose asker left. False if it was not waiting."""
        was_waiting = entry in self._ready or entry in self._paused
        if was_waiting:
            self._ready.pop(entry, None)
            self._paused.pop(entry, None)
            self._count(entry, -1)
        return was_waiting

    def clear(self) -> list[_Entry]:
        entries = [*self._ready, *self._paused]
        for entry in entries:
            self.discard(entry)
        return entries

    def _count(self, entry: _Entry, change: int) -> None:
        metrics.hash_waiting.labels(self.name).inc(change)
        counts: list[tuple[Counter[Any], Any]] = [(self._efforts, entry.job.effort)]
        if entry.job.account is not None:
            counts.append((self._accounts, entry.job.account))
        for counter, key in counts:
            counter[key] += change
            if not counter[key]:
                del counter[key]


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
