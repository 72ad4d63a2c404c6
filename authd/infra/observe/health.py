"""Checks which parts answer, in a task and not for each probe: a flood of probes costs the stores nothing."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import anyio
import msgspec
import structlog
from anyio.abc import TaskStatus

from authd.errors import Unavailable

PROBE_INTERVAL_S = 1.0

_log = structlog.get_logger()


class Report(msgspec.Struct, frozen=True):
    """`status` is `unready` when a part is unavailable without which requests fail; `degraded` when only events wait:
    because there is no broker, none is configured, or one takes them too slowly. `events_oldest_s`: how long the oldest
    has.
    """

    status: Literal["ready", "degraded", "draining", "unready"]
    parts: dict[str, bool]
    events_oldest_s: int

    @property
    def is_ready(self) -> bool:
        return self.status in ("ready", "degraded")


class Health:
    """`required` parts are probed; each probe raises `Unavailable` within its own deadline. `events`, whether they are
    published in time, and `oldest_s`, how long one waits, are only asked.
    """

    def __init__(
        self,
        required: Mapping[str, Callable[[], Awaitable[object]]],
        events: Callable[[], bool],
        oldest_s: Callable[[], float] = float,
    ) -> None:
        self._required = required
        self._events = events
        self._oldest_s = oldest_s
        self._parts = dict.fromkeys(required, True)
        self.is_draining = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        await self._probe_all()
        task_status.started()
        while True:
            await anyio.sleep(PROBE_INTERVAL_S)
            await self._probe_all()

    def report(self) -> Report:
        parts = {**self._parts, "events": self._events()}
        oldest_s = int(self._oldest_s())
        if self.is_draining:
            return Report("draining", parts, oldest_s)
        if not all(self._parts.values()):
            return Report("unready", parts, oldest_s)
        return Report("ready" if parts["events"] else "degraded", parts, oldest_s)

    async def _probe_all(self) -> None:
        async with anyio.create_task_group() as group:
            for part in self._required:
                group.start_soon(self._probe, part)

    async def _probe(self, part: str) -> None:
        try:
            await self._required[part]()
        except Unavailable as error:
            if error.is_busy:
                return  # It answers others: nothing was learnt.
            answers = False
            cause = repr(error.__cause__)
        else:
            answers, cause = True, ""
        if answers != self._parts[part]:
            log = _log.info if answers else _log.error
            log("part_back" if answers else "part_away", part=part, cause=cause)
        self._parts[part] = answers
