"""Makes a part that does not answer cost one wait, and not one for each request.

After FAILURES_MAX calls in a row that failed, calls are refused at once for OPEN_S; then one call is let through, and
the others are refused until it succeeds. The health task calls every second, so a part that is back is in use again
within about two seconds, also where no request comes, and with no restart.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

FAILURES_MAX = 3
OPEN_S = 1.0


class Breaker:
    """Guards the calls to one store. `refusal` makes the exception that is raised instead of a call."""

    def __init__(self, refusal: Callable[[], Exception], clock: Callable[[], float] = time.monotonic) -> None:
        self._refusal = refusal
        self._clock = clock
        self._failures = 0
        self._refused_until = 0.0

    @contextmanager
    def call(self, failures: tuple[type[BaseException], ...]) -> Generator[None, None, None]:
        """Count a failure if one of `failures` is raised, and a success if nothing is. Other exceptions, such as the
        request's own end, say nothing about the store.
        """
        self.enter()
        try:
            yield
        except failures:
            self.failed()
            raise
        self.succeeded()

    def enter(self) -> None:
        """Raise the refusal, or let a call begin: the three methods are `call` where each microsecond counts."""
        if self._failures >= FAILURES_MAX:
            now = self._clock()
            if now < self._refused_until:
                raise self._refusal()
            # This call finds out; the others wait for what it finds.
            self._refused_until = now + OPEN_S

    def failed(self) -> None:
        self._failures += 1
        self._refused_until = self._clock() + OPEN_S

    def succeeded(self) -> None:
        self._failures = 0
