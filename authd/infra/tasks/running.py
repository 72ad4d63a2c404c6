"""A task for as long as a body runs: nested, their order is that of the start, and from the inside out of the stop."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio

#: A coroutine function that takes anyio's `task_status`, and calls `started` once it is ready.
Run = Callable[..., Coroutine[Any, Any, None]]
Drain = Callable[[], Awaitable[None]]


@asynccontextmanager
async def running(run: Run, *, drain: Drain | None = None) -> AsyncGenerator[None, None]:
    """Start `run` and wait until it is ready; after the body wait for `drain`, then cancel what still runs."""
    async with anyio.create_task_group() as group:
        await group.start(run)
        yield
        if drain is not None:
            await drain()
        group.cancel_scope.cancel()
