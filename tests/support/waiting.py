"""Waits for what happens soon, under a deadline that only a hang exceeds."""

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, TypeVar, overload

import anyio

WITHIN_S = 40.0
POLL_S = 0.01

T = TypeVar("T")


@overload
async def eventually(look: Callable[[], Awaitable[T]], within_s: float = WITHIN_S) -> T: ...
@overload
async def eventually(look: Callable[[], T], within_s: float = WITHIN_S) -> T: ...
async def eventually(look: Callable[[], Any], within_s: float = WITHIN_S) -> Any:
    """Return what `look` returns as soon as that is true; it is asked again and again until the deadline."""
    with anyio.fail_after(within_s):
        while True:
            found = look()
            result = await found if isawaitable(found) else found
            if result:
                return result
            await anyio.sleep(POLL_S)
