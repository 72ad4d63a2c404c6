"""Whose clock is wrong: three of them, two must agree."""

from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import REGISTRY

from authd.errors import Unavailable
from authd.infra.clocks import ClockWatch, Skews, WrongClock

NOW, BOUND_S = 1_800_000_000.0, 5.0


def at(ahead_s: float | None) -> Callable[[], Awaitable[float]]:
    """A store whose clock is so far ahead; None: one that does not answer."""

    async def ask() -> float:
        if ahead_s is None:
            raise Unavailable("user_store")
        return NOW + ahead_s

    return ask


def times_away() -> float:
    return REGISTRY.get_sample_value("authd_unavailable_total", {"part": "user_store"}) or 0.0


@pytest.mark.parametrize(
    ("postgres_s", "redis_s", "differ"),
    [
        (0, 0, []),
        (4.9, -4.9, []),
        (3600, 0, ["user_store"]),
        (0, -3600, ["session_store"]),
        (3600, None, ["user_store"]),
        (None, None, []),
    ],
)
async def test_a_store_that_differs_alone_ends_no_start(
    postgres_s: float | None, redis_s: float | None, differ: list[str]
) -> None:
    before = times_away()
    skews = await ClockWatch(at(postgres_s), at(redis_s), BOUND_S, lambda: NOW).check()
    assert skews.beyond(BOUND_S) == differ
    assert times_away() - before == [postgres_s, redis_s].count(None)


@pytest.mark.parametrize(("postgres_s", "redis_s"), [(3600, 3600), (-5.1, -5.2), (6, -6)])
async def test_a_clock_that_differs_from_both_ends_the_start_with_a_sentence(postgres_s: float, redis_s: float) -> None:
    with pytest.raises(WrongClock, match=r"This machine's clock is .* Postgres's and .* Redis's\. .*SKEW_MAX_S \(5\)"):
        await ClockWatch(at(postgres_s), at(redis_s), BOUND_S, lambda: NOW).check()


async def test_the_time_that_an_answer_took_is_no_skew_and_the_metric_says_what_is() -> None:
    times = iter([NOW, NOW + 20, NOW + 30, NOW + 50])
    watch = ClockWatch(at(10), at(100), BOUND_S, lambda: next(times))
    assert await watch.measure() == Skews(user_store=0.0, session_store=-50.0)
    for part, skew_s in (("user_store", 0.0), ("session_store", -50.0)):
        assert REGISTRY.get_sample_value("authd_clock_skew_seconds", {"part": part}) == skew_s
