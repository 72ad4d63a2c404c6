"""A machine whose clock is wrong: a real process that believes it is another time."""

import os
from pathlib import Path

import pytest
from support.services import Services

AN_HOUR_AHEAD = "import time\n_real = time.time\ntime.time = lambda: _real() + 3600\n"


@pytest.fixture
def wrong_clock(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose clock is an hour ahead."""
    (tmp_path / "sitecustomize.py").write_text(AN_HOUR_AHEAD)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


async def test_a_replica_whose_clock_is_wrong_does_not_start_and_touches_no_key(
    services: Services, wrong_clock: dict[str, str]
) -> None:
    async with services.prepared() as process:
        done = await process.run("serve", **wrong_clock)
        assert done.returncode == 1
        assert "authd: This machine's clock is 3600." in done.stderr
        assert "ahead of Postgres's" in done.stderr and "ahead of Redis's" in done.stderr
        assert "Traceback" not in done.stderr
        assert await process.query("SELECT FROM keys") == []
        checked = await process.run("check", **wrong_clock)
        assert checked.returncode == 1
        assert "Clock: wrong: This machine's clock is 3600." in checked.stdout


async def test_a_right_clock_is_said_by_check_and_by_a_metric(services: Services) -> None:
    async with services.running() as process, process.api() as api:
        checked = await process.run("check")
        assert checked.returncode == 0
        lines = [line for line in checked.stdout.splitlines() if line.startswith("Clock:")]
        assert len(lines) == 2 and lines[0].endswith("s from Postgres's") and lines[1].endswith("s from Redis's")
        metrics = (await api.get("/metrics")).text
        for part in ("user_store", "session_store"):
            [value] = [line.split()[1] for line in metrics.splitlines() if f'clock_skew_seconds{{part="{part}"' in line]
            assert abs(float(value)) < 5
