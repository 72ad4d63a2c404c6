"""What a flood of logins costs those who are logged in already; all phases in one run, on one machine.

1. Refreshes alone. 2. The same refresh clients beside login clients. 3. Refreshes at the rate of phase 2 beside as many
bare bcrypt threads as authd has: what the machine could hash at best while it serves them.
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import bcrypt
import uvloop
from deployment import deployment
from http_client import Connection

CLIENTS = 16
PASSWORD = "correct horse battery staple"
#: Two waits of 16 logins at cost 12 on two cores: the queue is as it stays.
WARM_UP_S = 4.0
RATE_KEPT_MIN, P99_FACTOR_MAX, LOGINS_PART_MIN, LIVEZ_MS_MAX = 0.5, 3.0, 0.85, 100.0


async def run(seconds: float, cost: int, threads: int) -> int:
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before the run: others' work distorts it")
    async with deployment(AUTHD_BCRYPT_COST=str(cost), AUTHD_HASH_THREADS=str(threads)) as port:
        names = [f"{secrets.token_hex(8)}@example.com" for _ in range(2 * CLIENTS)]
        connection = await Connection.open(port)
        for name in names:
            await connection.register(name, PASSWORD)
        connection.close()
        task = {
            "port": port,
            "password": PASSWORD,
            "refreshers": names[:CLIENTS],
            "floods": [],
            "refresh_rate": 0,
            "warm_up_s": WARM_UP_S,
            "measured_s": seconds,
        }
        alone = await clients(task)
        show("refreshes alone", alone)
        flooded = await clients(task | {"floods": names[CLIENTS:]})
        show(f"beside {CLIENTS} login clients", flooded)
        bare = await anyio.open_process([sys.executable, __file__, "--bare", str(threads), "--cost", str(cost)])
        paced = await clients(task | {"refresh_rate": flooded["refresh"]["rate"]})
        bare.terminate()
        assert bare.stdout is not None
        bare_rate = hashes_within(json.loads(b"".join([part async for part in bare.stdout])), seconds)
        show(f"beside {threads} bare bcrypt threads", paced)
        print(f"bcrypt, cost {cost}: {bare_rate:.2f} bare hashes/s; {flooded['login']['rate']:.2f} logins/s", end="; ")
        print(f"{flooded['refused']} logins refused")
    return judge(alone, flooded, bare_rate)


def judge(alone: dict[str, Any], flooded: dict[str, Any], bare_rate: float) -> int:
    kept = flooded["refresh"]["rate"] / alone["refresh"]["rate"]
    factor = flooded["refresh"]["p99_ms"] / alone["refresh"]["p99_ms"]
    part = flooded["login"]["rate"] / bare_rate
    livez_ms = flooded["livez"]["max_ms"]
    limits = [
        (kept >= RATE_KEPT_MIN, f"refresh rate kept: {kept:.0%} (at least {RATE_KEPT_MIN:.0%})"),
        (factor <= P99_FACTOR_MAX, f"refresh p99: {factor:.2f} times (at most {P99_FACTOR_MAX:g})"),
        (part >= LOGINS_PART_MIN, f"logins: {part:.0%} of bare bcrypt (at least {LOGINS_PART_MIN:.0%})"),
        (livez_ms <= LIVEZ_MS_MAX, f"/livez, the slowest: {livez_ms:.0f} ms (at most {LIVEZ_MS_MAX:g})"),
    ]
    for holds, sentence in limits:
        print("PASS" if holds else "FAIL", sentence)
    return 0 if all(holds for holds, _ in limits) else 1


def show(phase: str, seen: dict[str, Any]) -> None:
    refresh, livez = seen["refresh"], seen["livez"]
    print(f"{phase:28} {refresh['rate']:7.1f} refreshes/s, p50 {refresh['p50_ms']:.1f} ms,", end=" ")
    print(
        f"p99 {refresh['p99_ms']:.1f} ms; /livez p99 {livez['p99_ms']:.1f} ms, max {livez['max_ms']:.1f} ms;", end=" "
    )
    print(f"the client itself woke up to {seen['lag_ms']:.0f} ms late", flush=True)


async def clients(task: dict[str, Any]) -> dict[str, Any]:
    done = await anyio.run_process(
        [sys.executable, str(Path(__file__).with_name("flood_clients.py"))],
        input=json.dumps(task).encode(),
        stderr=None,
    )
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def hashes_within(ended_at: list[float], seconds: float) -> float:
    """Hashes per second in the middle of the run, where the clients were measured, too."""
    middle = [at for at in ended_at if ended_at[-1] - seconds <= at]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def hash_until_told(threads: int, cost: int) -> None:
    """On bare threads; then write when each hash ended, in s of the monotonic clock."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in every thread, for sigwait
    ended_at: list[float] = []
    salt = bcrypt.gensalt(cost)

    def work() -> None:
        while True:
            bcrypt.hashpw(PASSWORD.encode(), salt)
            ended_at.append(time.monotonic())

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    signal.sigwait({signal.SIGTERM})
    print(json.dumps(sorted(ended_at)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="measured in each phase")
    parser.add_argument("--cost", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        hash_until_told(options.bare, options.cost)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise SystemExit(runner.run(run(options.seconds, options.cost, options.threads)))
