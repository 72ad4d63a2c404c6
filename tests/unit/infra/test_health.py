import anyio
import pytest

from authd.errors import Unavailable
from authd.infra.observe.health import Health


class Part:
    """A part that answers or not, as the test says."""

    def __init__(self) -> None:
        self.is_there = True
        self.probes = 0

    async def probe(self) -> None:
        self.probes += 1
        if not self.is_there:
            raise Unavailable("user_store")


async def report_of(users: Part, sessions: Part, *, events: bool = True, draining: bool = False):
    health = Health({"user_store": users.probe, "session_store": sessions.probe}, lambda: events)
    health.is_draining = draining
    async with anyio.create_task_group() as group:
        await group.start(health.run)
        report = health.report()
        group.cancel_scope.cancel()
    return report


@pytest.mark.parametrize(
    ("users", "sessions", "events", "draining", "status", "is_ready"),
    [
        (True, True, True, False, "ready", True),
        (True, True, False, False, "degraded", True),
        (False, True, True, False, "unready", False),
        (True, False, True, False, "unready", False),
        (True, False, False, False, "unready", False),
        (True, True, True, True, "draining", False),
        (False, False, False, True, "draining", False),
    ],
)
async def test_the_status_follows_the_parts(
    users: bool, sessions: bool, events: bool, draining: bool, status: str, is_ready: bool
) -> None:
    parts = Part(), Part()
    parts[0].is_there, parts[1].is_there = users, sessions
    report = await report_of(*parts, events=events, draining=draining)
    assert (report.status, report.is_ready) == (status, is_ready)
    assert report.parts == {"user_store": users, "session_store": sessions, "events": events}


async def test_whoever_asks_costs_the_parts_nothing() -> None:
    users, sessions = Part(), Part()
    health = Health({"user_store": users.probe, "session_store": sessions.probe}, lambda: True)
    async with anyio.create_task_group() as group:
        await group.start(health.run)
        for _ in range(100):
            assert health.report().is_ready
        group.cancel_scope.cancel()
    assert (users.probes, sessions.probes) == (1, 1)
