"""Pieces of work on their way to the tasks that do them."""

import math
from collections.abc import Awaitable, Callable, Iterable

import anyio

from authd.infra.tasks.every import every


class WorkSet:
    """Numbered pieces of work, such as buckets. A piece waits once, however often it is offered, and is with one task
    at a time; offered meanwhile, it waits for another turn. The set is bounded by the number of pieces there are.

    `gather_s`: how long a piece waits at least, so that one turn serves what follows at once.
    """

    def __init__(self, gather_s: float = 0.0) -> None:
        self._gather_s = gather_s
        # What waits and from when on a task may have it, soonest first.
        self._due: dict[int, float] = {}
        self._busy: set[int] = set()
        self._changed = anyio.Event()
        self.is_closed = False
        #: When tasks begin nothing more, on the loop's clock; infinite until closed.
        self.stop_at = math.inf
        #: Set while the last piece failed for a reason that concerns all: then one is tried at a time.
        self.is_probing = False

    def offer(self, piece: int) -> None:
        """Let a task do this piece soon. Never blocks or raises; does nothing once closed."""
        if not self.is_closed:
            self._add(piece)

    async def take(self) -> int | None:
        """Wait for the next piece and return it, busy until `done`; None when closed and there is nothing to begin."""
        while True:
            now = anyio.current_time()
            piece = next((piece for piece in self._due if piece not in self._busy), None)
            if self.is_closed and (piece is None or self.is_probing or now >= self.stop_at):
                return None
            if piece is None or (self.is_probing and self._busy):
                await self._changed.wait()
            elif self._due[piece] > now:
                await anyio.sleep(self._due[piece] - now)
            else:
                del self._due[piece]
                self._busy.add(piece)
                return piece

    def done(self, piece: int, *, again: bool = False) -> None:
        """Give back a piece that was taken. `again`: it waits for another turn, also when closed."""
        self._busy.discard(piece)
        if again:
            self._add(piece)
        self._notify()

    async def sweep(self, interval_s: float, find: Callable[[], Awaitable[Iterable[int]]]) -> None:
        """Offer what `find` returns, now and every `interval_s` seconds until cancelled: what other processes left, and
        what nobody offered.
        """

        async def offer_found() -> None:
            for piece in await find():
                self.offer(piece)

        await every(interval_s, offer_found, at_once=True)

    def forget(self) -> None:
        """Drop what waits; a sweep finds it again."""
        self._due.clear()
        self._notify()

    def close(self, stop_at: float = math.inf) -> None:
        """Accept no more offers; each `take` returns None when nothing waits, or after `stop_at`."""
        self.is_closed = True
        self.stop_at = stop_at
        self._notify()

    async def drain(self) -> None:
        """Return when nothing waits and no task is busy. The caller sets the deadline."""
        while self._due or self._busy:
            await self._changed.wait()

    def _add(self, piece: int) -> None:
        if piece not in self._due:
            self._due[piece] = anyio.current_time() + self._gather_s
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
