"""What is done again and again, for as long as the process serves."""

from collections.abc import Awaitable, Callable

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from authd.errors import Unavailable
from authd.infra.observe import metrics

_logger = structlog.get_logger()  # `_log` is for events whose name stands beside it

Job = Callable[[], Awaitable[object]]


async def every(
    interval_s: float,
    job: Job,
    *,
    at_once: bool = False,
    event: str = "",
    task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
) -> None:
    """Run `job` until cancelled, `interval_s` seconds after the start and after the end of each run.

    `at_once`: run it at the start too; the task is ready after that. A job that raises `Unavailable` has its next turn
    as any other; it is counted, and logged as a warning where `event` names that. Anything else escapes.
    """
    if at_once:
        await _run(job, event)
    task_status.started()
    while True:
        await anyio.sleep(interval_s)
        await _run(job, event)


async def _run(job: Job, event: str) -> None:
    try:
        await job()
    except Unavailable as error:
        metrics.unavailable.labels(error.part).inc()
        if event:
            _logger.warning(event, part=error.part)
