"""The clients of load/flood, in a process of their own: reads its task as JSON, and writes what it saw as JSON.

Every client asks again as soon as it is answered. `refresh_rate` bounds all refreshes together (per second), so that
two phases can be compared beside the same load.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop
from http_client import Connection

PROBE_INTERVAL_S = 0.05


class Watch:
    """What was answered within the measured time, which begins after the warm-up."""

    def __init__(self, warm_up_s: float, measured_s: float) -> None:
        self.begin = time.perf_counter() + warm_up_s
        self.end = self.begin + measured_s
        self.seconds: list[float] = []

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self.end

    async def time(self, call: Callable[[], Awaitable[None]]) -> None:
        start = time.perf_counter()
        await call()
        answered = time.perf_counter()
        if self.begin <= answered < self.end:
            self.seconds.append(answered - start)

    def summary(self) -> dict[str, float]:
        ordered = sorted(self.seconds) or [0.0]
        return {
            "rate": len(self.seconds) / (self.end - self.begin),
            "p50_ms": 1000 * ordered[len(ordered) // 2],
            "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
            "max_ms": 1000 * ordered[-1],
        }


async def refresh_for_ever(watch: Watch, port: int, token: str, interval_s: float) -> None:
    connection = await Connection.open(port)

    async def refresh() -> None:
        nonlocal token
        token = await connection.refresh(token)

    due = time.perf_counter()
    while not watch.is_over:
        await watch.time(refresh)
        if interval_s:
            due = max(due + interval_s, time.perf_counter() - interval_s)
            await asyncio.sleep(due - time.perf_counter())
    connection.close()


async def log_in_for_ever(watch: Watch, port: int, username: str, password: str, refused: Counter[int]) -> None:
    connection = await Connection.open(port)

    async def log_in() -> None:
        status, answer = await connection.login(username, password)
        if status != 200:
            refused[status] += 1
            raise ConnectionAbortedError(answer)

    while not watch.is_over:
        try:
            await watch.time(log_in)
        except ConnectionAbortedError:
            await asyncio.sleep(1)
    connection.close()


async def probe_for_ever(watch: Watch, port: int, lags_s: list[float]) -> None:
    """Beside the answers, how late this process itself wakes up: what a busy machine adds to every figure here."""
    connection = await Connection.open(port)

    async def probe() -> None:
        status, answer = await connection.request("GET", "/livez")
        assert status == 200, answer

    while not watch.is_over:
        await watch.time(probe)
        due = time.perf_counter() + PROBE_INTERVAL_S
        await asyncio.sleep(PROBE_INTERVAL_S)
        lags_s.append(time.perf_counter() - due)
    connection.close()


async def main(task: dict[str, Any]) -> dict[str, Any]:
    port, password = task["port"], task["password"]
    connection = await Connection.open(port)
    tokens = []
    for username in task["refreshers"]:
        status, answer = await connection.login(username, password)
        assert status == 200, answer
        tokens.append(json.loads(answer)["refresh_token"])
    connection.close()
    refreshes, logins, probes = (Watch(task["warm_up_s"], task["measured_s"]) for _ in range(3))
    refused: Counter[int] = Counter()
    lags_s = [0.0]
    interval_s = len(tokens) / task["refresh_rate"] if task["refresh_rate"] else 0.0
    async with asyncio.TaskGroup() as group:
        group.create_task(probe_for_ever(probes, port, lags_s))
        for token in tokens:
            group.create_task(refresh_for_ever(refreshes, port, token, interval_s))
        for username in task["floods"]:
            group.create_task(log_in_for_ever(logins, port, username, password, refused))
    return {
        "refresh": refreshes.summary(),
        "login": logins.summary(),
        "livez": probes.summary(),
        "refused": sum(refused.values()),
        "lag_ms": 1000 * max(lags_s),
    }


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(runner.run(main(json.load(sys.stdin))), sys.stdout)
