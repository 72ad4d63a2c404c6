"""How long to wait before the next try."""

from random import SystemRandom

_random = SystemRandom()


class Backoff:
    """Delays in seconds that double from `first_s` to `max_s`, each shortened by up to a half at random."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._delay_s = first_s

    def next_s(self) -> float:
        """Return the next delay."""
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self._max_s)
        return delay_s * _random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin again with `first_s`, after a success."""
        self._delay_s = self._first_s
