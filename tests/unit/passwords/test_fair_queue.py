"""The order in which jobs are served, whatever comes when. Costs are whole numbers, so that sums of them are exact."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count, product
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authd.passwords import fair_queue
from authd.passwords.fair_queue import FairQueue, Path

LONGEST = 10
NETWORKS = [("q", *names) for names in product("ABC", "12", "xy")]
#: One queue: its holders on three levels.
LEVELS = (2, 3, 4)

#: What happens to the queue: a job of a path and a cost comes (paused or not), one is served, one leaves.
arrivals = st.tuples(st.just("add"), st.sampled_from(NETWORKS), st.integers(1, LONGEST), st.booleans())
services = st.tuples(st.just("take"))
departures = st.tuples(st.just("discard"), st.integers(0, 1000))
histories = st.lists(st.one_of(arrivals, arrivals, services, departures), max_size=120)


@dataclass(frozen=True)
class Job:
    number: int
    path: Path
    cost: int


@dataclass
class Play:
    """Carries out a history, and keeps a book of its own."""

    size_max: int = 1000
    waiting: dict[Job, None] = field(default_factory=dict)
    ends: Counter[Job] = field(default_factory=Counter)
    served: list[Job] = field(default_factory=list)
    numbers: Any = field(default_factory=count)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.queue: FairQueue[Job] = FairQueue({"q": 1.0, "known": 3.0, "others": 1.0}, self.size_max)

    def add(self, path: Path, cost: int = 1, *, is_paused: bool = False) -> Job | None:
        """The job, unless it was refused."""
        job = Job(next(self.numbers), path, cost)
        left = self.queue.add(job, path, cost, self.now + 3 if is_paused else None)
        if left is not job:
            self.waiting[job] = None
        else:
            self.assert_refused_rightly(path)
        if left is not None:
            self.waiting.pop(left, None)
            self.ends[left] += 1
        return job if left is not job else None

    def assert_refused_rightly(self, path: Path) -> None:
        """On no level is there a holder that has more than that of the refused job would have had."""
        assert len(self.waiting) == self.size_max
        for level in LEVELS:
            beside = Counter(job.path[:level] for job in self.waiting if job.path[: level - 1] == path[: level - 1])
            assert max(beside.values(), default=0) <= beside[path[:level]] + 1

    def take(self) -> Job | None:
        self.now += 1
        job = self.queue.take(self.now)
        if job is not None:
            del self.waiting[job]
            self.ends[job] += 1
            self.served.append(job)
        return job

    def discard(self, index: int) -> None:
        if self.waiting:
            job = list(self.waiting)[index % len(self.waiting)]
            assert self.queue.discard(job)
            assert not self.queue.discard(job)
            del self.waiting[job]
            self.ends[job] += 1

    def act(self, kind: str, *more: Any) -> Job | None:
        if kind == "add":
            path, cost, is_paused = more
            self.add(path, cost, is_paused=is_paused)
        elif kind == "discard":
            self.discard(*more)
        else:
            return self.take()
        return None

    def take_all(self) -> list[Job]:
        first = len(self.served)
        while self.queue:
            self.take()
        return self.served[first:]

    def ready_of(self, holder: Path) -> bool:
        paused = self.queue._paused
        return any(job.path[: len(holder)] == holder and job not in paused for job in self.waiting)


@given(histories, st.integers(1, 12))
def test_every_job_ends_once_no_more_than_the_bound_wait_and_only_the_biggest_are_refused(
    history: list[tuple[Any, ...]], size_max: int
) -> None:
    play = Play(size_max)
    for step in history:
        play.act(*step)
        assert len(play.queue) == len(play.waiting) <= size_max
    waited = set(play.waiting)
    assert waited | set(play.take_all()[-len(waited) :] if waited else []) == waited
    assert not play.waiting and len(play.ends) == next(play.numbers)
    assert set(play.ends.values()) <= {1}
    # Nothing is remembered of who has left.
    assert not play.queue._root.children and not play.queue._leaves and not play.queue._paused


def longest_waits(history: list[tuple[Any, ...]], cost_of: Callable[[Job], int]) -> int:
    """The most that one holder was served while a holder beside it had a job ready and was not served."""
    play, worst = Play(), 0
    #: For each holder with a ready job: what its siblings were served since it came, or was served.
    since: dict[Path, Counter[Path]] = {}
    for step in [*history, *[("take",)] * 200]:
        job = play.act(*step)
        holders = {job.path[:level] for job in play.waiting for level in LEVELS}
        ready = {holder for holder in holders if play.ready_of(holder)}
        if job is not None:
            for holder in [job.path[:level] for level in LEVELS]:
                for beside, work in since.items():
                    if len(beside) == len(holder) and beside[:-1] == holder[:-1] and beside != holder:
                        work[holder] += cost_of(job)
                        worst = max(worst, work[holder])
                since[holder] = Counter()
        since = {holder: since.get(holder, Counter()) for holder in ready}
    assert not play.waiting
    return worst


@given(histories)
def test_no_holder_waits_for_more_than_two_of_the_longest_jobs_of_each_beside_it(
    history: list[tuple[Any, ...]],
) -> None:
    assert longest_waits(history, lambda job: job.cost) <= 2 * LONGEST


@given(histories)
def test_jobs_of_one_cost_are_served_in_turn(history: list[tuple[Any, ...]]) -> None:
    alike = [(step[0], step[1], 4, step[3]) if step[0] == "add" else step for step in history]
    assert longest_waits(alike, lambda job: 1) <= 1


@given(
    st.lists(st.tuples(st.sampled_from(NETWORKS[:6]), st.integers(1, LONGEST)), min_size=20, max_size=60),
    st.integers(0, 19),
    st.sampled_from(NETWORKS),
    st.integers(1, LONGEST),
)
def test_the_work_ahead_is_what_is_served_before_if_nothing_comes_after(
    jobs: list[tuple[Path, int]], served: int, path: Path, cost: int
) -> None:
    play = Play()
    for job in jobs:
        play.add(*job)
    for _ in range(served):
        play.take()
    foretold = play.queue.work_ahead_s(path, cost)
    beside = {job.path[:level] for job in play.waiting for level in LEVELS}
    mine = play.add(path, cost)
    assert mine is not None
    order = play.take_all()
    ahead = sum(job.cost for job in order[: order.index(mine)])
    assert ahead <= foretold <= ahead + LONGEST * len(beside)


@pytest.mark.parametrize("costs", [(1, 1), (1, 10), (7, 2)])
def test_two_that_always_have_jobs_get_equal_seconds_whatever_these_take(costs: tuple[int, int]) -> None:
    play = Play(size_max=10_000)
    for path, cost, jobs in ((NETWORKS[0], costs[0], 3000), (NETWORKS[-1], costs[1], 3000)):
        for _ in range(jobs):
            play.add(path, cost)
    work: Counter[Path] = Counter()
    for _ in range(1000):
        job = play.take()
        assert job is not None
        work[job.path] += job.cost
        assert abs(work[NETWORKS[0]] - work[NETWORKS[-1]]) <= sum(costs)


@pytest.mark.parametrize("cost", [1, LONGEST])
def test_a_network_that_leaves_and_comes_back_gains_nothing(cost: int) -> None:
    play = Play(size_max=10_000)
    for _ in range(5000):
        play.add(NETWORKS[0], 2)
    work: Counter[Path] = Counter()
    back = None
    for _ in range(1000):
        # It never has a second job that waits, so with each job served it is gone; and it leaves unserved, too.
        if back not in play.waiting:
            play.add(NETWORKS[-1], LONGEST)
            play.discard(-1)
            back = play.add(NETWORKS[-1], cost)
        job = play.take()
        assert job is not None
        work[job.path] += job.cost
    assert abs(work[NETWORKS[-1]] - work[NETWORKS[0]]) <= cost + 2


def test_newcomers_without_end_do_not_keep_out_one_who_waits() -> None:
    play = Play()
    play.add(("q", "old", "1", "x"), 1)
    play.add(("q", "old", "1", "x"), 1)
    for number in range(10):
        for new in range(3):
            play.add(("q", f"new{number}.{new}", "1", "x"), 1)
        play.take()
    assert [job.path[1] for job in play.served].count("old") == 2


def test_addresses_of_one_network_share_its_turns_and_accounts_those_of_an_address() -> None:
    play = Play()
    for _ in range(40):
        for path in (("q", "A", "1", "x"), ("q", "A", "2", "x"), ("q", "A", "2", "y"), ("q", "B", "1", "x")):
            play.add(path)
    first = Counter(job.path[1:] for job in (play.take() for _ in range(64)) if job is not None)
    assert first == {("B", "1", "x"): 32, ("A", "1", "x"): 16, ("A", "2", "x"): 8, ("A", "2", "y"): 8}


def test_known_devices_get_three_parts_in_four_while_both_wait() -> None:
    play = Play()
    for _ in range(100):
        play.add(("others", "A", "1", "x"), 3)
        play.add(("known", "A", "1", "x"), 3)
    for number in range(1, 101):
        play.take()
        known = [job.path[0] for job in play.served].count("known")
        assert abs(known - 0.75 * number) <= 1
    assert len(play.take_all()) == 100


# The full queue


def filled(*holders: tuple[Path, int]) -> Play:
    play = Play(size_max=sum(jobs for _, jobs in holders))
    for path, jobs in holders:
        for _ in range(jobs):
            assert play.add(path) is not None
    return play


def sizes(play: Play, level: int) -> Counter[Path]:
    return Counter(job.path[:level] for job in play.waiting)


def test_a_newcomer_displaces_the_newest_job_of_the_biggest_holder_on_each_level() -> None:
    big = ("q", "A", "2", "y")
    play = filled((("q", "A", "1", "x"), 3), (("q", "A", "2", "x"), 2), (big, 4), (("q", "B", "1", "x"), 5))
    newest = [job for job in play.waiting if job.path == big][-1]
    assert play.add(("q", "C", "1", "x")) is not None
    assert play.ends == {newest: 1}


def test_a_holder_that_has_its_share_displaces_nobody() -> None:
    play = filled((("q", "A", "1", "x"), 8), (("q", "B", "1", "x"), 8))
    for name in "AB":
        assert play.add(("q", name, "1", "x")) is None
    for _ in range(16):
        play.add(("q", "C", "1", "x"))
    assert sorted(sizes(play, 2).values()) == [5, 5, 6]


def test_the_neighbour_of_who_fills_the_queue_gets_a_place_from_that_one() -> None:
    # In the same network, and at the same address.
    play = filled((("q", "A", "1", "x"), 16))
    for _ in range(16):
        play.add(("q", "A", "2", "x"))
    assert sizes(play, 3) == {("q", "A", "1"): 8, ("q", "A", "2"): 8}
    for _ in range(8):
        play.add(("q", "A", "2", "y"))
    assert sizes(play, 4) == {("q", "A", "1", "x"): 8, ("q", "A", "2", "x"): 4, ("q", "A", "2", "y"): 4}


def test_where_everybody_has_one_place_the_next_is_refused() -> None:
    play = filled(*((("q", str(number), "1", "x"), 1) for number in range(16)))
    assert play.add(("q", "new", "1", "x")) is None
    assert play.add(("q", "3", "1", "y")) is None


def test_one_full_queue_says_nothing_of_the_other() -> None:
    play = filled((("others", "A", "1", "x"), 4))
    assert play.add(("known", "A", "1", "x")) is not None
    assert len(play.waiting) == 5


def test_a_paused_job_is_displaced_where_its_holder_has_no_other() -> None:
    play = Play(size_max=2)
    for _ in range(2):
        assert play.add(NETWORKS[0], is_paused=True) is not None
    assert play.add(NETWORKS[-1]) is not None
    assert play.queue.paused_until == 3
    assert [play.take() is not None for _ in range(4)] == [True, False, True, False]


# Its own work


def steps(call: Callable[[], object]) -> int:
    """The lines that the module runs in one call: work, without a clock."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != fair_queue.__file__:
            return None
        lines += event == "line" or event == "call"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def test_its_steps_do_not_grow_with_the_jobs_of_a_holder_and_grow_evenly_with_the_holders() -> None:
    def measured(networks: int, jobs: int) -> list[int]:
        play = Play(size_max=networks * jobs)
        for _ in range(jobs):
            for network in range(networks):
                play.add(("q", str(network), "1", "x"))
        new: Path = ("q", "new", "1", "x")
        foresee = partial(play.queue.work_ahead_s, new, 1)
        return [steps(foresee), steps(partial(play.add, new)), steps(play.take), steps(partial(play.discard, 1))]

    few, many_jobs, many_networks = measured(4, 2), measured(4, 500), measured(400, 2)
    # The same, but for which of the holders was left without a job.
    assert all(many <= one + 10 for one, many in zip(few, many_jobs, strict=True))
    assert all(many <= 100 * one for one, many in zip(few, many_networks, strict=True))
