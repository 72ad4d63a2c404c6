"""authd as operators run it: a process over real stores.

A process that ends in order is also read: what it logged holds no traceback and no secret that a test used.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, ClassVar
from weakref import WeakSet

import anyio
import anyio.abc
import asyncpg
import httpx
import psutil
import pytest
from redis.asyncio import Redis
from support.api import Api, Credentials, Secrets
from support.waiting import eventually

from authd.embedded.processes import guarded

START_S = 30.0
STOP_S = 40.0
#: How much of a process's output a failure shows.
TAIL_CHARS = 4000
#: What a process needs of its surroundings; no AUTHD_ name, so that no developer's setting has a say.
INHERITED = {"HOME", "JAVA_HOME", "LANG", "PATH", "PYTHONPATH", "PYTHONSAFEPATH", "TMPDIR", "XDG_CACHE_HOME"}
#: In the URL of every database, which trusts anybody: it must stand in no log.
DATABASE_PASSWORD = "canary-of-the-database"
TRACEBACK = re.compile(r'Traceback|"exception"\s*:|"event"\s*:\s*"fault"')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the processes that still run said last."""
    report = yield
    if report.failed:
        report.sections += [(f"Output of {process.folder.name}", process.tail) for process in ServiceProcess.running]
    return report


class ServiceProcess:
    """One `python -m authd …`, run in an empty folder with nothing but `settings` in its environment."""

    #: All that a test of this worker has begun, and not ended.
    running: ClassVar[WeakSet["ServiceProcess"]] = WeakSet()

    def __init__(self, folder: Path, settings: dict[str, str], command: Sequence[str] = ("serve",)) -> None:
        self.folder = folder
        self.settings = settings
        self.secrets = Secrets()
        self._command = command
        self._process: anyio.abc.Process | None = None
        self.secrets.add(*(value for name, value in settings.items() if "SECRET" in name), DATABASE_PASSWORD)

    @property
    def url(self) -> str:
        return f"http://{self.settings['AUTHD_BIND']}"

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.settings["AUTHD_BIND"].rpartition(":")
        return host, int(port)

    @property
    def database_url(self) -> str:
        return self.settings["AUTHD_DATABASE_URL"]

    @property
    def topic(self) -> str:
        return self.settings["AUTHD_KAFKA_REGISTRATION_TOPIC"]

    @property
    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name in INHERITED} | self.settings

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def output(self) -> str:
        """What it has written to the terminal so far."""
        file = self.folder / "output.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def tail(self) -> str:
        """What a failure shows of it."""
        return self.output[-TAIL_CHARS:]

    @property
    def log_file(self) -> Path:
        return self.folder / "media" / "logs" / "auth_service.log"

    @property
    def everything_logged(self) -> str:
        files = (self.folder / "media").rglob("*.log*")
        return "\n".join([self.output, *(file.read_text(errors="replace") for file in files)])

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log lines of this event so far."""
        found = (json.loads(line) for line in self.output.splitlines() if line.startswith("{") and line.endswith("}"))
        return [line for line in found if line["event"] == event]

    async def launch(self) -> None:
        """Start, and wait for nothing."""
        with (self.folder / "output.txt").open("ab") as output:
            self._process = await anyio.open_process(
                guarded([sys.executable, "-m", "authd", *self._command]),
                stdin=DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
            )
        self.running.add(self)

    async def start(self, within_s: float = START_S) -> None:
        """Start and wait until it is ready."""
        await self.launch()
        async with self.api() as api:

            async def is_ready() -> bool:
                assert self.is_running, f"it ended at its start:\n{self.output}"
                try:
                    return (await api.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(is_ready, within_s)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self, within_s: float = STOP_S) -> int:
        """Its exit code, when it has ended."""
        assert self._process is not None
        with anyio.fail_after(within_s):
            return await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM, and its exit code."""
        if self.is_running:
            self.signal()
        return await self.wait()

    async def kill(self) -> None:
        """SIGKILL, for its workers and stores too."""
        if self._process is not None and self._process.returncode is None:
            with anyio.CancelScope(shield=True):
                family = self.children()
                self._process.kill()
                for child in family:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                await self._process.wait()
        self.running.discard(self)

    def children(self) -> list[psutil.Process]:
        """The processes that it started, and theirs."""
        return psutil.Process(self.pid).children(recursive=True)

    def api(self) -> Api:
        return Api(self.url, self.secrets)

    async def run(self, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        """Run another command of authd in the same folder with the same settings, or those changed."""
        done = await anyio.run_process(
            guarded([sys.executable, "-m", "authd", *arguments]),
            stdin=DEVNULL,
            check=False,
            cwd=self.folder,
            env=self.environment | settings,
        )
        return subprocess.CompletedProcess(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())

    async def new_client(self, name: str = "shop") -> Credentials:
        """Register a service, as an operator does."""
        added = await self.run("clients", "add", name)
        assert (added.returncode, added.stderr) == (0, "")
        found = re.fullmatch(r"client_id=(\S+)\nclient_secret=(\S+)\n", added.stdout)
        assert found, added.stdout
        self.secrets.add(found[2])
        return found[1], found[2]

    async def query(self, statement: str, *arguments: object) -> list[dict[str, Any]]:
        """Ask its database, past authd."""
        connection = await asyncpg.connect(self.database_url, timeout=5)
        try:
            return [dict(row) for row in await connection.fetch(statement, *arguments)]
        finally:
            await connection.close(timeout=5)

    async def sessions_key(self, user_id: int) -> str:
        """The name that the sessions of the user who has the id now have in Redis."""
        (row,) = await self.query("SELECT incarnation FROM users WHERE id = $1", user_id)
        return f"authd:{self.settings['AUTHD_DEPLOYMENT']}:{{{user_id % 256}}}:user:{user_id}:{row['incarnation']}"

    async def wipe_redis(self) -> None:
        """Take from Redis all that it knows of this deployment, as a failover to an empty replica would."""
        async with Redis.from_url(self.settings["AUTHD_REDIS_URL"]) as redis:
            keys = [key async for key in redis.scan_iter(f"authd:{self.settings['AUTHD_DEPLOYMENT']}:*", 1000)]
            if keys:
                await redis.delete(*keys)

    async def check_log(self) -> None:
        """Fail where the log tells of a fault, or tells a secret."""
        if "AUTHD_DATABASE_URL" in self.settings:  # else it had a store of its own, which has gone with it
            self.secrets.add(*await self._password_hashes())
        logged = self.everything_logged
        if fault := TRACEBACK.search(logged):
            pytest.fail(f"the log tells of a fault:\n{logged[max(0, fault.start() - 500) :][:4000]}", pytrace=False)
        if leaked := self.secrets.found_in(logged):
            pytest.fail(f"the log holds secrets: {leaked}", pytrace=False)

    async def _password_hashes(self) -> list[str]:
        if not (await self.query("SELECT to_regclass('users') IS NOT NULL AS exists"))[0]["exists"]:
            return []
        return [row["password_hash"] for row in await self.query("SELECT password_hash FROM users")]
