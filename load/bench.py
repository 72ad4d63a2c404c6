"""Measures refresh and /auth/me beside a bare endpoint in the same run, with stores of its own; see `load/bench`.

Both services run from the start and are asked in turns, so that whatever else the machine does hits both alike. CPU is
that of the service and of the stores, counted by the kernel.
"""

import argparse
import http.client
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import anyio
import psutil

from authd.embedded import PostgresServer, RedisServer
from authd.embedded.processes import free_port, guarded

HERE = Path(__file__).parent
#: Of a refresh, in CPU of service and stores, and of the bare endpoint's rate.
CPU_MS_MAX, SHARE_MIN = 0.9, 0.75
WARM_UP_S, START_S = 0.5, 30.0
PASSWORD = "a pass phrase of the bench"
#: The requests that are measured, and whether each needs the token that the one before it gave.
REFRESHES = {"refresh": True, "me": False}


@dataclass
class Slice:
    """What one measurement of one service gave. CPU in seconds, of all processes together."""

    answers: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_s: float
    stores_s: float
    clients_s: float

    @property
    def rate(self) -> float:
        return self.answers / self.seconds


@dataclass
class Target:
    """A service under load. `tokens` and `slices`: by request; a token for each client."""

    name: str
    port: int
    process: psutil.Process
    tokens: dict[str, list[str]] = field(default_factory=dict)
    slices: dict[str, list[Slice]] = field(default_factory=dict)

    def cpu_ms(self, request: str, part: str = "cpu_s") -> float:
        """CPU of a request."""
        slices = self.slices[request]
        return sum(getattr(one, part) for one in slices) * 1000 / sum(one.answers for one in slices)

    def median(self, request: str, part: str) -> float:
        return statistics.median(getattr(one, part) for one in self.slices[request])


class Bench:
    """The process with the clients, and the stores of all targets."""

    def __init__(self, clients: "subprocess.Popen[str]", stores: list[psutil.Process]) -> None:
        self._clients = clients
        self._stores = stores

    async def measure(self, target: Target, request: str, seconds: float) -> Slice:
        job = {"port": target.port, "seconds": seconds, "refreshes": REFRESHES[request]}
        before = cpu_s(target.process), [cpu_s(store) for store in self._stores]
        with anyio.fail_after(seconds + START_S):
            result = await anyio.to_thread.run_sync(self._ask, job | {"tokens": target.tokens[request]})
        service_s = spent(before[0], cpu_s(target.process))
        stores_s = sum(spent(one, cpu_s(store)) for one, store in zip(before[1], self._stores, strict=True))
        target.tokens[request] = result.pop("tokens")
        return Slice(cpu_s=service_s + stores_s, stores_s=stores_s, **result)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._clients.stdin is not None and self._clients.stdout is not None
        print(json.dumps(job), file=self._clients.stdin, flush=True)
        result: dict[str, Any] = json.loads(self._clients.stdout.readline())
        return result

    async def run(self, targets: list[Target], options: argparse.Namespace) -> None:
        for request in REFRESHES:
            for target in targets:
                await self.measure(target, request, WARM_UP_S)
        for number in range(options.rounds):
            for request in REFRESHES:
                # In turns, and each time another one first.
                for target in targets[:: 1 if number % 2 else -1]:
                    target.slices.setdefault(request, []).append(await self.measure(target, request, options.seconds))


def cpu_s(process: psutil.Process) -> dict[int, float]:
    """Seconds of the process and of each of its children."""
    family = [process, *process.children(recursive=True)]
    return {one.pid: sum(one.cpu_times()[:2]) for one in family}


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


async def main(options: argparse.Namespace) -> int:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="authd-bench-")))
        postgres = await stack.enter_async_context(PostgresServer(folder / "postgres", durable=False))
        redis = await stack.enter_async_context(RedisServer(folder / "redis", durable=False))
        authd = await stack.enter_async_context(authd_running(folder, postgres, redis, options.clients))
        bare = await stack.enter_async_context(bare_running(folder, redis, options.clients))
        clients = stack.enter_context(clients_running())
        bench = Bench(clients, [psutil.Process(store.pid) for store in (postgres, redis)])
        await bench.run([bare, authd], options)
    return report(bare, authd, options)


def report(bare: Target, authd: Target, options: argparse.Namespace) -> int:
    print(f"{options.clients} clients, {options.rounds} rounds of {options.seconds:g} s. CPU: ms a request.\n")
    print(f"{'':14}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU':>8}{'stores':>8}{'clients':>9}{'of bare':>9}")
    for request in REFRESHES:
        for target in (bare, authd):
            columns = [
                f"{request + ' ' + target.name:14}",
                f"{target.median(request, 'rate'):12.0f}",
                *(f"{target.median(request, part):9.1f}" for part in ("p50_ms", "p99_ms")),
                *(f"{target.cpu_ms(request, part):8.2f}" for part in ("cpu_s", "stores_s", "clients_s")),
                f"{share_of_rate(bare, authd, request):10.0%}" if target is authd else "",
            ]
            print("".join(columns))
    share, cpu_ms = share_of_rate(bare, authd, "refresh"), authd.cpu_ms("refresh")
    checks = [
        (share >= SHARE_MIN, f"refresh at {share:.0%} of the bare rate, wanted {SHARE_MIN:.0%} or more"),
        (cpu_ms <= CPU_MS_MAX, f"refresh in {cpu_ms:.2f} ms of CPU, wanted {CPU_MS_MAX} ms or less"),
    ]
    print()
    for is_met, sentence in checks:
        print("PASS" if is_met else "FAIL", sentence)
    return 0 if all(is_met for is_met, _ in checks) else 1


def share_of_rate(bare: Target, authd: Target, request: str) -> float:
    """The median over the rounds: within one, whatever else the machine did hit both alike."""
    rounds = zip(authd.slices[request], bare.slices[request], strict=True)
    return statistics.median(ours.rate / theirs.rate for ours, theirs in rounds)


@contextmanager
def clients_running() -> Iterator["subprocess.Popen[str]"]:
    command = guarded([sys.executable, str(HERE / "clients.py")])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@asynccontextmanager
async def authd_running(
    folder: Path, postgres: PostgresServer, redis: RedisServer, clients: int, **environment: str
) -> AsyncIterator[Target]:
    port = free_port()
    settings = {
        "AUTHD_BIND": f"127.0.0.1:{port}",
        "AUTHD_DATABASE_URL": f"{await postgres.create_database(f'bench-{port}')}?sslmode=disable",
        "AUTHD_REDIS_URL": redis.url,
        "AUTHD_DEPLOYMENT": f"bench-{port}",
        "AUTHD_SECRET": secrets.token_hex(32),
        "AUTHD_BCRYPT_COST": "4",
    }
    async with running(folder, [sys.executable, "-m", "authd", "serve"], settings | environment, port) as pid:
        tokens = await anyio.to_thread.run_sync(log_in, port, clients)
        yield Target("authd", port, psutil.Process(pid), tokens)


@asynccontextmanager
async def bare_running(folder: Path, redis: RedisServer, clients: int) -> AsyncIterator[Target]:
    port = free_port()
    command = [sys.executable, str(HERE / "bare.py"), f"127.0.0.1:{port}", redis.url]
    async with running(folder, command, {}, port) as pid:
        yield Target("bare", port, psutil.Process(pid), {request: ["x" * 150] * clients for request in REFRESHES})


@asynccontextmanager
async def running(folder: Path, command: Sequence[str], settings: dict[str, str], port: int) -> AsyncIterator[int]:
    """A process that listens. No setting of the developer's has a say."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTHD_")}
    log = folder / f"{port}.log"
    with log.open("wb") as output:
        process = await anyio.open_process(
            guarded(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment | settings,
        )
    async with process:
        try:
            with anyio.fail_after(START_S):
                while not await answers(port):
                    if process.returncode is not None:
                        raise SystemExit(f"{command[1:]} ended:\n{log.read_text()}")
                    await anyio.sleep(0.05)
            yield process.pid
        finally:
            if process.returncode is None:
                process.terminate()


async def answers(port: int) -> bool:
    try:
        async with await anyio.connect_tcp("127.0.0.1", port):
            return True
    except OSError:
        return False


def log_in(port: int, clients: int) -> dict[str, list[str]]:
    """A session for each client, each of a user of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    ask = partial(_ask, connection)
    pairs = []
    for number in range(clients):
        credentials = {"username": f"bench-{number}@example.com", "password": PASSWORD}
        ask("POST", "/auth/register", json.dumps(credentials), "application/json")
        pairs.append(ask("POST", "/auth/login", urlencode(credentials), "application/x-www-form-urlencoded"))
    return {"refresh": [one["refresh_token"] for one in pairs], "me": [one["access_token"] for one in pairs]}


def _ask(connection: http.client.HTTPConnection, method: str, path: str, body: str | None, kind: str) -> Any:
    connection.request(method, path, body, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status not in (200, 201):
        raise SystemExit(f"{method} {path} was answered {answer.status}: {text!r}")
    return json.loads(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="load/bench", description="Measure authd beside a bare endpoint.")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    sys.exit(anyio.run(main, parser.parse_args(), backend_options={"use_uvloop": True}))
