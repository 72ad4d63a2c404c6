import pytest

from authd.infra.tasks.breaker import FAILURES_MAX, OPEN_S, Breaker


class Refused(Exception):
    pass


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def call(breaker: Breaker, error: Exception | None = None) -> None:
    with breaker.call((OSError,)):
        if error is not None:
            raise error


def open_breaker() -> tuple[Breaker, Clock]:
    clock = Clock()
    breaker = Breaker(Refused, clock)
    for _ in range(FAILURES_MAX):
        with pytest.raises(OSError):
            call(breaker, OSError())
    return breaker, clock


def test_calls_are_refused_after_failures_in_a_row() -> None:
    breaker, _ = open_breaker()
    with pytest.raises(Refused):
        call(breaker)


def test_a_success_between_failures_keeps_it_closed() -> None:
    breaker = Breaker(Refused, Clock())
    for _ in range(FAILURES_MAX):
        for _ in range(FAILURES_MAX - 1):
            with pytest.raises(OSError):
                call(breaker, OSError())
        call(breaker)


def test_what_says_nothing_about_the_part_does_not_count() -> None:
    breaker = Breaker(Refused, Clock())
    for _ in range(2 * FAILURES_MAX):
        with pytest.raises(ValueError):
            call(breaker, ValueError())
    call(breaker)


def test_one_call_finds_out_while_the_others_are_refused() -> None:
    breaker, clock = open_breaker()
    clock.now += OPEN_S
    with breaker.call((OSError,)), pytest.raises(Refused):
        call(breaker)
    call(breaker)


def test_a_call_that_finds_it_still_away_opens_it_again() -> None:
    breaker, clock = open_breaker()
    clock.now += OPEN_S
    with pytest.raises(OSError):
        call(breaker, OSError())
    with pytest.raises(Refused):
        call(breaker)
    clock.now += OPEN_S
    call(breaker)
