"""What the commands share: how they run and what they print."""

import os
import sys
from collections.abc import Awaitable, Callable

import anyio

from authd.config import Settings, load_settings


def run(command: Callable[[Settings], Awaitable[int]]) -> int:
    """Run a command with the settings of the environment and of `.env`, and return its exit status."""
    return anyio.run(command, load_settings(os.environ), backend_options={"use_uvloop": True})


def say(line: str) -> None:
    """Print a line, at once also where a program reads it."""
    print(line, flush=True)  # noqa: T201


def complain(*sentences: str) -> int:
    """Print what went wrong and return the exit status for that."""
    for sentence in sentences:
        print(f"authd: {sentence}", file=sys.stderr)  # noqa: T201
    return 1
