"""`every`, `WorkSet`, `Backoff` and `running`: what the tasks of a replica are made of."""

from collections.abc import Awaitable, Callable

import anyio
import pytest
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from authd.errors import Unavailable
from authd.infra.tasks.backoff import Backoff
from authd.infra.tasks.every import every
from authd.infra.tasks.running import running
from authd.infra.tasks.work_set import WorkSet

TICK_S = 0.001
ALL_TASKS = 20


class Runs:
    """A job that may fail, and an event for each of its runs."""

    def __init__(self, *failures: BaseException | None) -> None:
        self.count = 0
        self._failures = list(failures)
        self._changed = anyio.Event()

    async def __call__(self) -> None:
        self.count += 1
        self._changed.set()
        self._changed = anyio.Event()
        failure = self._failures.pop(0) if self._failures else None
        if failure is not None:
            raise failure

    async def reach(self, count: int) -> None:
        while self.count < count:
            await self._changed.wait()


def unavailable_count(part: str) -> float:
    return REGISTRY.get_sample_value("authd_unavailable_total", {"part": part}) or 0.0


async def test_a_job_that_is_unavailable_has_its_next_turn_and_is_counted_and_logged() -> None:
    runs, before = Runs(None, Unavailable("user_store"), Unavailable("user_store")), unavailable_count("user_store")
    with capture_logs() as logs:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: every(TICK_S, runs, event="heads_unknown"))
            await runs.reach(4)
            group.cancel_scope.cancel()
    assert unavailable_count("user_store") == before + 2
    assert logs == [{"event": "heads_unknown", "part": "user_store", "log_level": "warning"}] * 2


async def test_a_job_without_an_event_is_counted_and_not_logged() -> None:
    runs, before = Runs(Unavailable("session_store")), unavailable_count("session_store")
    with capture_logs() as logs:
        async with anyio.create_task_group() as group:
            group.start_soon(every, TICK_S, runs)
            await runs.reach(2)
            group.cancel_scope.cancel()
    assert (unavailable_count("session_store"), logs) == (before + 1, [])


async def test_what_is_no_outage_ends_the_task() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        async with anyio.create_task_group() as group:
            group.start_soon(every, TICK_S, Runs(None, ValueError("a bug")))
    assert raised.group_contains(ValueError, match="a bug")


@pytest.mark.parametrize(("at_once", "runs_at_start"), [(False, 0), (True, 1)])
async def test_a_job_that_runs_at_once_has_run_when_the_task_is_ready(at_once: bool, runs_at_start: int) -> None:
    runs = Runs(Unavailable("user_store"))
    async with anyio.create_task_group() as group:
        await group.start(lambda *, task_status: every(3600, runs, at_once=at_once, task_status=task_status))
        assert runs.count == runs_at_start
        group.cancel_scope.cancel()


async def take_all(work: WorkSet) -> list[int]:
    """Take and give back until the set is closed and has nothing more."""
    taken = []
    while (piece := await work.take()) is not None:
        taken.append(piece)
        work.done(piece)
    return taken


async def test_a_piece_waits_once_and_pieces_go_in_the_order_of_their_offers() -> None:
    work = WorkSet()
    for piece in (3, 1, 3, 2, 1):
        work.offer(piece)
    work.close()
    assert await take_all(work) == [3, 1, 2]


async def test_a_piece_is_with_one_task_at_a_time_and_what_is_offered_meanwhile_has_another_turn() -> None:
    work = WorkSet()
    busy: set[int] = set()
    turns: list[int] = []

    async def do() -> None:
        while (piece := await work.take()) is not None:
            assert piece not in busy
            busy.add(piece)
            turns.append(piece)
            await checkpoint()
            if turns.count(piece) < 5:
                work.offer(piece)
            await checkpoint()
            busy.discard(piece)
            work.done(piece)

    async with anyio.create_task_group() as group:
        for _ in range(ALL_TASKS):
            group.start_soon(do)
        for piece in range(4):
            work.offer(piece)
        await work.drain()
        work.close()
    assert sorted(turns) == sorted(list(range(4)) * 5)


async def test_a_piece_gathers_what_follows_before_a_task_has_it() -> None:
    work = WorkSet(gather_s=0.05)
    offered_at = anyio.current_time()
    work.offer(1)
    assert await work.take() == 1
    assert anyio.current_time() - offered_at >= 0.04  # the loop has whole milliseconds


async def test_a_task_that_waits_has_the_next_offer() -> None:
    work = WorkSet()
    taken: list[int | None] = []

    async def take() -> None:
        taken.append(await work.take())

    async with anyio.create_task_group() as group:
        group.start_soon(take)
        await checkpoint()
        work.offer(7)
    assert taken == [7]


async def test_while_probing_one_piece_is_tried_at_a_time() -> None:
    work = WorkSet()
    for piece in range(3):
        work.offer(piece)
    work.is_probing = True
    first = await work.take()
    others: list[int | None] = []

    async def take() -> None:
        others.append(await work.take())

    async with anyio.create_task_group() as group:
        group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        assert others == []
        assert first is not None
        work.done(first, again=True)
    assert others == [1]


async def test_closed_it_accepts_no_offer_but_gives_out_what_waits_and_what_comes_again() -> None:
    work = WorkSet()
    work.offer(1)
    work.close()
    work.offer(2)
    assert await work.take() == 1
    work.done(1, again=True)
    assert await take_all(work) == [1]


@pytest.mark.parametrize("stop", ["its time is over", "it is probing"])
async def test_closed_it_begins_nothing_when(stop: str) -> None:
    work = WorkSet()
    work.offer(1)
    work.is_probing = stop == "it is probing"
    work.close(anyio.current_time() if stop == "its time is over" else anyio.current_time() + 3600)
    assert await work.take() is None


async def test_a_close_wakes_the_tasks_that_wait() -> None:
    work = WorkSet()
    async with anyio.create_task_group() as group:
        for _ in range(ALL_TASKS):
            group.start_soon(take_all, work)
        await anyio.wait_all_tasks_blocked()
        work.close()


async def test_a_drain_waits_for_what_waits_and_for_who_is_busy() -> None:
    work, is_drained = WorkSet(), False
    work.offer(1)
    work.offer(2)

    async def drain() -> None:
        nonlocal is_drained
        await work.drain()
        is_drained = True

    async with anyio.create_task_group() as group:
        group.start_soon(drain)
        assert await work.take() == 1
        work.forget()
        await anyio.wait_all_tasks_blocked()
        assert not is_drained
        work.done(1)
    assert is_drained


async def test_a_sweep_offers_what_it_finds_at_once_and_again_and_survives_an_outage() -> None:
    work, finds = WorkSet(), Runs(None, Unavailable("session_store"))

    async def find() -> list[int]:
        await finds()
        return [finds.count]

    async with anyio.create_task_group() as group:
        group.start_soon(work.sweep, TICK_S, find)
        assert [await work.take(), await work.take()] == [1, 3]
        group.cancel_scope.cancel()


def test_delays_double_to_the_bound_and_begin_again_after_a_success() -> None:
    backoff = Backoff(1.0, 5.0)
    for full_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert full_s / 2 <= backoff.next_s() <= full_s
    backoff.reset()
    assert backoff.next_s() <= 1.0


async def test_a_task_is_ready_before_the_body_and_drained_before_it_is_cancelled() -> None:
    steps: list[str] = []

    async def run(*, task_status: TaskStatus[None]) -> None:
        await checkpoint()
        steps.append("ready")
        task_status.started()
        try:
            await anyio.sleep_forever()
        finally:
            steps.append("cancelled")

    def step(name: str) -> Callable[[], Awaitable[None]]:
        async def note() -> None:
            await checkpoint()
            steps.append(name)

        return note

    async with running(run, drain=step("drained")):
        steps.append("body")
    assert steps == ["ready", "body", "drained", "cancelled"]


async def test_a_task_that_fails_ends_the_body() -> None:
    async def run(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        raise ValueError("a bug")

    with pytest.raises(ExceptionGroup) as raised:
        async with running(run):
            await anyio.sleep_forever()
    assert raised.group_contains(ValueError)
