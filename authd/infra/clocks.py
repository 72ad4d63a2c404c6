"""Compares this machine's clock with those of Postgres and of Redis.

The three decide different things: Redis's lockouts and refresh tokens, Postgres's keys and the log, and this one the
times in access and device tokens, which every verifier compares with its own. Two that agree find the third wrong.
"""

import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog
from anyio.abc import TaskStatus

from authd.errors import Unavailable
from authd.infra.observe import metrics
from authd.infra.tasks.every import every

INTERVAL_S = 30.0
#: Seconds since the epoch.
Clock = Callable[[], float]

_log = structlog.get_logger()


class WrongClock(Exception):
    """This machine's clock is too far from both Postgres's and Redis's."""


class Skews(msgspec.Struct, frozen=True):
    """How far this machine's clock is ahead of the others at least, in seconds; None where one could not be asked."""

    user_store: float | None
    session_store: float | None

    def beyond(self, bound_s: float) -> list[str]:
        """Return the stores whose clocks are further away than that."""
        skews = {"user_store": self.user_store, "session_store": self.session_store}
        return [part for part, skew_s in skews.items() if skew_s is not None and abs(skew_s) > bound_s]


class ClockWatch:
    """`ask_postgres` and `ask_redis` return the time of a store in epoch seconds, or raise `Unavailable`. `bound_s`:
    how far clocks may be apart.
    """

    def __init__(
        self,
        ask_postgres: Callable[[], Awaitable[float]],
        ask_redis: Callable[[], Awaitable[float]],
        bound_s: float,
        clock: Clock = time.time,
    ) -> None:
        self._ask_postgres = ask_postgres
        self._ask_redis = ask_redis
        self._bound_s = bound_s
        self._clock = clock

    async def measure(self) -> Skews:
        """Ask both stores, and show what they say as metrics."""
        skews = Skews(await self._skew(self._ask_postgres), await self._skew(self._ask_redis))
        for part, skew_s in (("user_store", skews.user_store), ("session_store", skews.session_store)):
            if skew_s is not None:
                metrics.clock_skew.labels(part).set(skew_s)
        return skews

    async def check(self) -> Skews:
        """Measure once, as a start does.

        :raises WrongClock: where both stores say so. Where one does, it is that one's clock, or nobody knows.
        """
        skews = await self.measure()
        beyond = skews.beyond(self._bound_s)
        if len(beyond) == 2:
            raise WrongClock(
                f"This machine's clock is {_apart(skews.user_store)} Postgres's and {_apart(skews.session_store)}"
                f" Redis's. Set it, or raise AUTHD_CLOCK_SKEW_MAX_S ({self._bound_s:g})."
            )
        for part in beyond:
            _log.warning("clock_differs", part=part, skew_s=round(getattr(skews, part), 3))
        return skews

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Check every INTERVAL_S. A clock that becomes wrong while authd serves is reported, and ends nothing: what it
        decides alone is the life of access tokens.
        """
        await every(INTERVAL_S, self._check_again, task_status=task_status)

    async def _check_again(self) -> None:
        try:
            await self.check()
        except WrongClock as error:
            _log.error("clock_wrong", cause=str(error))

    async def _skew(self, ask: Callable[[], Awaitable[float]]) -> float | None:
        asked_at = self._clock()
        try:
            theirs = await ask()
        except Unavailable as error:
            metrics.unavailable.labels(error.part).inc()
            return None
        answered_at = self._clock()
        # The store read its clock somewhere between the two.
        if theirs < asked_at:
            return asked_at - theirs
        return min(0.0, answered_at - theirs)


def _apart(skew_s: float | None) -> str:
    skew_s = skew_s or 0.0
    return f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'}"
