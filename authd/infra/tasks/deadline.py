"""The deadline of what is done for every request.

Not anyio's scope, which costs several times as much, and not asyncio's `timeout`, which cancels once: asyncpg,
cancelled while Postgres is frozen, would wait for it again to give the connection back.
"""

import asyncio
from types import TracebackType
from typing import Any, cast

#: Between one cancellation and the next, until the request gives in.
CANCEL_AGAIN_S = 0.05


class Deadline:
    """Cancel the body's task after `seconds`, or at `end`, repeatedly until it stops. Cancellations from elsewhere
    still propagate. `is_over` says afterwards whether the body was ended.
    """

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._seconds = seconds
        self._cancellations = 0

    def __enter__(self) -> "Deadline":
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self.end)
        return self

    def end(self) -> None:
        """Cancel the body now."""
        self._timer.cancel()
        self._cancellations += 1
        self._task.cancel()
        self._timer = asyncio.get_running_loop().call_later(CANCEL_AGAIN_S, self.end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._timer.cancel()
        others = 0
        for _ in range(self._cancellations):
            others = self._task.uncancel()
        self.is_over = self._cancellations > 0 and kind is asyncio.CancelledError and not others
        return self.is_over
