import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec
import pytest
from anyio import Event, to_thread
from anyio.lowlevel import checkpoint
from support.waiting import eventually

from authd.config import Settings
from authd.errors import Unavailable
from authd.infra.observe import metrics
from authd.passwords.formats import Effort, effort_to_verify, hash_password, verify_password
from authd.passwords.hasher import Admission, Hasher, HashSettings, Job

COST = 4
EFFORT = Effort("bcrypt", COST)
PATIENCE_S = 20.0
ATTACKER, VICTIM = "198.51.100.7", "192.0.2.1"

T = TypeVar("T")


@asynccontextmanager
async def running(
    *, threads: int = 2, queue_max: int = 1000, deadline_s: float = 14.0, refusal_pause_s: float = 0.0
) -> AsyncIterator[Hasher]:
    hasher = Hasher(
        HashSettings(
            bcrypt_cost=COST,
            hash_threads_per_worker=threads,
            hash_queue_max=queue_max,
            hash_deadline_s=deadline_s,
        ),
        refusal_pause_s=refusal_pause_s,
    )
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tree:
            await tree.start(hasher.run)
            yield hasher
            tree.cancel_scope.cancel()


class Gate:
    """Work that holds its thread until the gate opens, and counts the threads it holds."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.lock = threading.Lock()
        self.inside = self.inside_max = self.finished = 0

    def work(self) -> str:
        with self.lock:
            self.inside += 1
            self.inside_max = max(self.inside_max, self.inside)
        assert self.opened.wait(PATIENCE_S)
        with self.lock:
            self.inside -= 1
            self.finished += 1
        return "hashed"


class Steps:
    """The async steps of a job, recorded."""

    def __init__(self, *admissions: Admission | Exception, settling: Exception | None = None) -> None:
        self.admissions = list(admissions)
        self.settling = settling
        self.admitted = 0
        self.settled: list[str | None] = []

    async def admit(self) -> Admission:
        self.admitted += 1
        answer = self.admissions.pop(0) if self.admissions else Admission.HASH
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def settle(self, value: str | None) -> str | None:
        await anyio.sleep(0.001)
        self.settled.append(value)
        if self.settling is not None:
            raise self.settling
        return value

    def job(
        self,
        work: Callable[[], str],
        *,
        effort: Effort = EFFORT,
        address: str = "",
        account: str = "",
        is_known: bool = False,
    ) -> "Job[str, str | None]":
        return Job(
            effort=effort,
            work=work,
            settle=self.settle,
            admit=self.admit,
            address=address,
            account=account,
            is_known=is_known,
        )


async def verify(hasher: Hasher, password: str, stored: str | None) -> bool | None:
    work = partial(verify_password, password, stored, COST)
    return await hasher.run_job(Job(effort=effort_to_verify(stored, COST), work=work, settle=_done))


async def ask(hasher: Hasher, job: Job[str, str | None]) -> str | None:
    return await hasher.run_job(job)


async def refused(call: Awaitable[object]) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        await call
    assert caught.value.part == "hashing"
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s >= 1
    return caught.value


def refusals(reason: str, queue: str = "others") -> float:
    return float(metrics.hash_refused.labels(reason, queue)._value.get())


def waiting(queue: str = "others") -> float:
    return float(metrics.hash_waiting.labels(queue)._value.get())


async def hang_up(request: "asyncio.Task[object]") -> None:
    """As Quart does when the client leaves: a native cancel, which goes through every anyio shield."""
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_it_hashes_and_verifies_off_the_event_loop() -> None:
    async with running() as hasher:
        stored = await hasher.hash("correct horse")
        assert stored.startswith("$2b$04$")
        assert await verify(hasher, "correct horse", stored)
        assert not await verify(hasher, "wrong horse", stored)
        assert not await verify(hasher, "correct horse", None)


async def test_a_broken_hash_reaches_its_asker_and_the_next_job_is_served() -> None:
    async with running(threads=1) as hasher:
        with pytest.raises(ValueError, match="cannot be hashed"):
            await hasher.hash("nul\0")
        assert await verify(hasher, "x", hash_password("x", COST))


async def test_hang_ups_neither_stop_a_running_hash_nor_free_its_thread() -> None:
    gate, steps = Gate(), Steps()
    async with running(threads=2) as hasher:
        for _ in range(5):
            requests = [asyncio.ensure_future(hasher.run_job(steps.job(gate.work))) for _ in range(4)]
            await eventually(lambda: gate.inside == 2)
            for request in requests:
                await hang_up(request)
        assert gate.finished == 0
        late = asyncio.ensure_future(hasher.run_job(Steps().job(gate.work)))
        await anyio.sleep(0.02)
        assert gate.inside == gate.inside_max == 2
        gate.opened.set()
        assert await late == "hashed"
        assert gate.inside_max == 2
        # The two that ran are settled with their result; the eighteen that waited were never admitted.
        await eventually(lambda: len(steps.settled) == 2)
        assert steps.settled == ["hashed", "hashed"]
        assert steps.admitted == 2


async def test_a_waiting_job_whose_asker_left_frees_its_place() -> None:
    gate = Gate()
    async with running(threads=1, queue_max=2) as hasher:
        running_job = asyncio.ensure_future(hasher.run_job(Steps().job(gate.work)))
        await eventually(lambda: gate.inside == 1)
        before = waiting()
        waiters = [asyncio.ensure_future(hasher.run_job(Steps().job(gate.work))) for _ in range(2)]
        await eventually(lambda: waiting() == before + 2)
        await refused(ask(hasher, Steps().job(gate.work)))
        await hang_up(waiters[0])
        waiters.append(asyncio.ensure_future(hasher.run_job(Steps().job(gate.work))))
        gate.opened.set()
        assert await running_job == await waiters[1] == await waiters[2] == "hashed"
        assert gate.finished == 3
        assert waiting() == before


async def test_an_asker_who_leaves_during_admission_is_not_hashed_but_settled() -> None:
    steps, gate, reserving, go = Steps(), Gate(), Event(), Event()

    async def admit() -> Admission:
        reserving.set()
        await go.wait()
        return Admission.HASH

    async with running(threads=1) as hasher:
        job = Job(effort=EFFORT, work=gate.work, settle=steps.settle, admit=admit)
        request = asyncio.ensure_future(hasher.run_job(job))
        await reserving.wait()
        await hang_up(request)
        go.set()
        await eventually(lambda: steps.settled == [None])
        assert gate.finished == 0


async def test_a_full_queue_refuses_at_once() -> None:
    gate = Gate()
    async with running(threads=1, queue_max=3) as hasher, anyio.create_task_group() as requests:
        requests.start_soon(ask, hasher, Steps().job(gate.work))
        await eventually(lambda: gate.inside == 1)
        before, empty = refusals("full"), waiting()
        for _ in range(3):
            requests.start_soon(ask, hasher, Steps().job(gate.work))
        await eventually(lambda: waiting() == empty + 3)
        steps = Steps()
        await refused(ask(hasher, steps.job(gate.work)))
        assert refusals("full") == before + 1
        assert steps.admitted == 0 and steps.settled == []
        gate.opened.set()


@asynccontextmanager
async def flooded(hasher: Hasher, floods: list["Job[str, str | None]"], threads: int = 1) -> AsyncIterator[Gate]:
    """One hash runs on each thread until the gate is opened, and the others wait behind it, refused or not."""
    gate = Gate()
    async with anyio.create_task_group() as requests:
        for _ in range(threads):
            requests.start_soon(ask, hasher, Steps().job(gate.work, address=ATTACKER))
        await eventually(lambda: gate.inside == threads)
        asked = 0

        async def flood(job: "Job[str, str | None]") -> None:
            nonlocal asked
            asked += 1
            with suppress(Unavailable):
                await hasher.run_job(job)

        for job in floods:
            requests.start_soon(flood, job)
        await eventually(lambda: asked == len(floods))
        try:
            yield gate
        finally:
            gate.opened.set()


class Order:
    """Jobs, and their names in the order in which they were admitted: two threads may do them in another."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def job(self, name: str, **more: Any) -> "Job[str, str | None]":
        async def admit() -> Admission:
            self.names.append(name)
            return Admission.HASH

        return replace(Steps().job(lambda: name, **more), admit=admit)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("is_known", [False, True])
async def test_a_flood_of_one_network_costs_another_one_hash(is_known: bool, threads: int) -> None:
    order = Order()
    addresses = [f"198.51.100.{number % 250}" for number in range(500)]
    floods = [
        order.job("flood", address=address, account=f"account{number}", is_known=is_known)
        for number, address in enumerate(addresses)
    ]
    async with running(threads=threads, queue_max=64) as hasher, flooded(hasher, floods, threads) as gate:
        victims = [
            asyncio.ensure_future(ask(hasher, order.job(name, address=VICTIM, account="victim", is_known=is_known)))
            for name in ("first", "second", "third")
        ]
        await checkpoint()
        gate.opened.set()
        assert await asyncio.gather(*victims) == ["first", "second", "third"]
        served = order.names[: order.names.index("third") + 1]
        # And what another thread has done meanwhile.
        assert served.count("flood") <= 3 + threads - 1
        assert served.index("first") <= threads


async def test_a_flood_of_known_devices_leaves_the_others_their_part_and_the_other_way_round() -> None:
    for is_known, ahead_max in ((True, 1), (False, 4)):
        order = Order()
        floods = [
            order.job("flood", address=ATTACKER, account=f"account{number}", is_known=not is_known)
            for number in range(100)
        ]
        async with running(threads=1, queue_max=64) as hasher, flooded(hasher, floods) as gate:
            victim = asyncio.ensure_future(ask(hasher, order.job("victim", address=VICTIM, is_known=is_known)))
            await checkpoint()
            gate.opened.set()
            assert await victim == "victim"
            assert order.names.index("victim") <= ahead_max


async def test_neighbours_of_a_flood_are_served_in_turn_too() -> None:
    order = Order()
    floods = [order.job("flood", address=ATTACKER, account=f"account{number % 5}") for number in range(200)]
    async with running(threads=1, queue_max=64) as hasher, flooded(hasher, floods) as gate:
        # In the same /24: one of two addresses. At the same address: one of six accounts.
        neighbour = asyncio.ensure_future(ask(hasher, order.job("near", address="198.51.100.8", account="account0")))
        colleague = asyncio.ensure_future(ask(hasher, order.job("same", address=ATTACKER, account="victim")))
        await checkpoint()
        gate.opened.set()
        assert await neighbour == "near" and await colleague == "same"
        assert order.names.index("near") <= 2
        assert order.names.index("same") <= 2 * 6


async def test_one_ipv6_site_is_one_network() -> None:
    order = Order()
    floods = [order.job("flood", address=f"2001:db8:1:{number % 9}::1", account="a") for number in range(200)]
    async with running(threads=1, queue_max=64) as hasher, flooded(hasher, floods) as gate:
        victims = [
            asyncio.ensure_future(ask(hasher, order.job(address, address=address)))
            for address in ("2001:db8:2::1", "2001:db8:1:ffff::1")
        ]
        await checkpoint()
        gate.opened.set()
        assert await asyncio.gather(*victims) == ["2001:db8:2::1", "2001:db8:1:ffff::1"]
        assert order.names.index("2001:db8:2::1") <= 1
        assert order.names.index("2001:db8:1:ffff::1") <= 10 + 1


async def test_a_full_queue_gives_a_newcomer_the_place_of_who_holds_most() -> None:
    order = Order()
    floods = [order.job("flood", address=ATTACKER, account=f"account{number}") for number in range(8)]
    async with running(threads=1, queue_max=8) as hasher:
        displaced, full, before = refusals("displaced"), refusals("full"), waiting()
        async with flooded(hasher, floods) as gate:
            assert waiting() == before + 8
            # Who fills the queue displaces nobody; a newcomer displaces one, whose asker is answered at once.
            await refused(ask(hasher, order.job("flood", address=ATTACKER, account="another")))
            assert (refusals("displaced"), refusals("full")) == (displaced, full + 1)
            victim = asyncio.ensure_future(ask(hasher, order.job("victim", address=VICTIM)))
            await eventually(lambda: refusals("displaced") == displaced + 1)
            assert waiting() == before + 8
            gate.opened.set()
            assert await victim == "victim"
        assert order.names.count("flood") == 7


async def test_who_is_refused_for_the_load_is_told_so_after_a_pause() -> None:
    pause_s = 0.3
    floods = [Steps().job(str, address=ATTACKER)]
    async with running(threads=1, queue_max=1, refusal_pause_s=pause_s) as hasher, flooded(hasher, floods):
        before, asked_at = refusals("full"), anyio.current_time()
        await refused(ask(hasher, Steps().job(str, address=ATTACKER)))
        assert refusals("full") == before + 1
        # Half of it: uvloop's timers count whole milliseconds.
        assert anyio.current_time() - asked_at >= pause_s / 2


async def test_sixty_logins_of_one_user_at_once_are_hashed_with_the_default_queue() -> None:
    order = Order()
    default = {field.name: field.default for field in msgspec.structs.fields(Settings)}["hash_queue_max"]
    async with running(threads=1, queue_max=default) as hasher:
        logins = [ask(hasher, order.job("login", address=VICTIM, account="victim")) for _ in range(60)]
        assert await asyncio.gather(*logins) == ["login"] * 60


async def test_known_devices_are_served_three_times_for_each_other() -> None:
    order = Order()
    floods = [order.job(name, is_known=name == "known") for name in ["other"] * 20 + ["known"] * 30]
    async with running(threads=1) as hasher, flooded(hasher, floods) as gate:
        gate.opened.set()
        await eventually(lambda: len(order.names) == 50)
    for number in range(1, 41):
        assert abs(order.names[:number].count("known") - 0.75 * number) <= 1


async def test_a_flood_of_strangers_does_not_fill_the_queue_of_known_devices() -> None:
    floods = [Steps().job(str, account="flooded") for _ in range(4)]
    async with running(threads=1, queue_max=4) as hasher, flooded(hasher, floods) as gate:
        await refused(ask(hasher, Steps().job(gate.work, account="flooded")))
        known = asyncio.ensure_future(ask(hasher, Steps().job(gate.work, account="flooded", is_known=True)))
        await checkpoint()
        assert waiting("known") >= 1
        gate.opened.set()
        assert await known == "hashed"


async def test_a_known_device_is_not_refused_for_the_work_that_it_passes() -> None:
    gate = Gate()
    async with running(threads=1, deadline_s=100.0) as hasher, anyio.create_task_group() as requests:
        requests.start_soon(ask, hasher, Steps().job(gate.work))
        await eventually(lambda: gate.inside == 1)
        before = waiting()
        for _ in range(30):
            requests.start_soon(ask, hasher, Steps().job(gate.work))
        await eventually(lambda: waiting() == before + 30)
        one_s = hasher._times.of(EFFORT)
        # One of the thirty may be served before the first of the known, beside the one that runs.
        assert hasher._wait_s(Steps().job(gate.work, is_known=True)) <= 2.01 * one_s
        assert hasher._wait_s(Steps().job(gate.work)) >= 30 * one_s
        gate.opened.set()


async def test_a_wait_beyond_the_deadline_is_refused_before_any_hashing() -> None:
    gate = Gate()
    stored = [hash_password("x", cost) for cost in (4, 8)]
    async with running(threads=1, deadline_s=2.0) as hasher, anyio.create_task_group() as requests:
        # Measured, so that the estimate is what this machine takes.
        for one in stored * 3:
            assert await verify(hasher, "x", one)
        requests.start_soon(ask, hasher, Steps().job(gate.work))
        await eventually(lambda: gate.inside == 1)
        # An imported hash of a cost nobody has seen yet: minutes of work.
        requests.start_soon(
            expect_unavailable, partial(ask, hasher, Steps().job(gate.work, effort=Effort("bcrypt", 18)))
        )
        await anyio.sleep(0.01)
        before, steps, asked_at = refusals("estimate"), Steps(), time.monotonic()
        error = await refused(ask(hasher, steps.job(gate.work)))
        assert time.monotonic() - asked_at < 1.0
        assert error.retry_after_s is not None and error.retry_after_s > 2
        assert refusals("estimate") == before + 1
        assert steps.admitted == 0
        # Its asker gives up at the deadline, and with it the work ahead.
        await eventually(lambda: hasher._wait_s(Steps().job(gate.work)) < 1.0)
        gate.opened.set()


async def test_the_estimate_follows_what_hashes_take() -> None:
    async with running(threads=2) as hasher:
        for _ in range(30):
            await hasher.run_job(Job(effort=EFFORT, work=partial(time.sleep, 0.02), settle=_done))
        assert 0.015 < hasher._times.of(EFFORT) < 0.1
        # Costs not seen yet are estimated from rounds: each step doubles.
        assert hasher._times.of(Effort("bcrypt", 9)) == pytest.approx(32 * hasher._times._round_s * 16)


async def test_a_job_not_admitted_by_its_deadline_is_refused_and_never_hashed() -> None:
    gate, steps = Gate(), Steps()
    async with running(threads=1, deadline_s=0.2) as hasher:
        first = asyncio.ensure_future(hasher.run_job(Steps().job(gate.work)))
        await eventually(lambda: gate.inside == 1)
        before = refusals("deadline")
        await refused(ask(hasher, steps.job(gate.work)))
        assert refusals("deadline") == before + 1
        # The deadline bounds the wait alone: what runs, runs to its end.
        gate.opened.set()
        assert await first == "hashed"
        assert steps.admitted == 0 and steps.settled == []


async def test_what_admission_raises_reaches_the_asker_and_nothing_is_hashed() -> None:
    gate = Gate()
    gate.opened.set()
    async with running(threads=1) as hasher:
        for error in (Unavailable("session_store"), RuntimeError("a bug")):
            steps = Steps(error)
            with pytest.raises(type(error)) as caught:
                await hasher.run_job(steps.job(gate.work))
            assert caught.value is error
            assert steps.settled == [] and gate.finished == 0
        assert await hasher.run_job(Steps().job(gate.work)) == "hashed"


async def test_what_settling_raises_reaches_the_asker_and_the_next_job_is_served() -> None:
    gate = Gate()
    gate.opened.set()
    async with running(threads=1) as hasher:
        for error in (Unavailable("session_store"), RuntimeError("a bug")):
            with pytest.raises(type(error)) as caught:
                await hasher.run_job(Steps(settling=error).job(gate.work))
            assert caught.value is error
        assert await hasher.run_job(Steps().job(gate.work)) == "hashed"


async def test_broken_work_is_settled_without_a_result() -> None:
    def broken() -> str:
        raise RuntimeError("broken thread")

    steps = Steps()
    async with running(threads=1) as hasher:
        with pytest.raises(RuntimeError, match="broken thread"):
            await hasher.run_job(steps.job(broken))
    assert steps.settled == [None]


async def test_a_job_told_to_wait_lets_the_others_pass_and_is_asked_again() -> None:
    gate, waiter, others = Gate(), Steps(*[Admission.WAIT] * 3), Steps()
    gate.opened.set()
    order: list[str] = []
    async with running(threads=1) as hasher:

        async def ask_as(name: str, steps: Steps) -> None:
            await hasher.run_job(steps.job(gate.work))
            order.append(name)

        async with anyio.create_task_group() as requests:
            requests.start_soon(ask_as, "waiter", waiter)
            await eventually(lambda: waiter.admitted == 1)
            for _ in range(3):
                requests.start_soon(ask_as, "other", others)
    assert order == ["other"] * 3 + ["waiter"]
    assert waiter.admitted == 4
    assert waiter.settled == ["hashed"]


async def test_a_job_that_waits_too_long_is_refused_and_asked_no_more() -> None:
    gate, steps = Gate(), Steps(*[Admission.WAIT] * 1000)
    async with running(threads=1, deadline_s=0.3) as hasher:
        await refused(ask(hasher, steps.job(gate.work)))
        asked = steps.admitted
        assert 1 < asked <= 7
        await anyio.sleep(0.15)
        assert steps.admitted == asked
        assert steps.settled == [] and gate.finished == 0


async def test_shutdown_finishes_and_settles_what_runs_and_refuses_what_waits() -> None:
    gate, ran, waited = Gate(), Steps(), Steps(*[Admission.WAIT] * 1000)
    async with running(threads=1) as hasher:
        pass
    await refused(ask(hasher, ran.job(gate.work)))

    async with anyio.create_task_group() as requests:
        async with running(threads=2) as hasher:
            for _ in range(2):
                requests.start_soon(ask, hasher, ran.job(gate.work))
            await eventually(lambda: gate.inside == 2)
            requests.start_soon(expect_unavailable, partial(ask, hasher, waited.job(gate.work)))
            await anyio.sleep(0.01)
            requests.start_soon(open_later, gate)
        # The tree has ended here: after the hashes, not before.
        assert gate.finished == 2
        assert ran.settled == ["hashed", "hashed"]
    assert waited.admitted == 0


async def test_threads_are_never_overcommitted_by_a_crowd_that_comes_and_goes() -> None:
    gate, steps = Gate(), Steps()
    gate.opened.set()

    def work() -> str:
        gate.work()
        verify_password("x", None, COST)
        return "hashed"

    async with running(threads=2) as hasher:
        requests = [asyncio.ensure_future(hasher.run_job(steps.job(work))) for _ in range(300)]
        for request in requests[::3]:
            await checkpoint()
            request.cancel()
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert results.count("hashed") >= 200
        await eventually(lambda: len(steps.settled) == steps.admitted)
        assert gate.inside_max <= 2
        assert steps.settled.count("hashed") == gate.finished


async def expect_unavailable(call: Callable[[], Awaitable[object]]) -> None:
    await refused(call())


async def open_later(gate: Gate) -> None:
    await to_thread.run_sync(time.sleep, 0.05)
    gate.opened.set()


async def _done(value: T) -> T:
    return value
