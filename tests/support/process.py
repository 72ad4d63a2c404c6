"""Fixtures: authd as operators run it, a process over the real stores with a database, key prefix and topic of its own.

A process that ends in order is also read: what it logged holds no traceback and no secret that a test used.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

import anyio
import anyio.abc
import asyncpg
import httpx
import psutil
import pytest
from redis.asyncio import Redis
from support.lock_order import watch_lock_order
from support.waiting import eventually

from authd.config import parse_settings, read_values
from authd.embedded import PostgresServer, RedisServer
from authd.embedded.processes import free_port, guarded
from authd.infra.postgres.migrate import migrate

START_S = 30.0
STOP_S = 40.0
POLL_S = 0.02
ARRIVE_S = 40.0
#: How much of a process's output a failure shows.
TAIL_CHARS = 3000
#: Shorter strings could stand in a log by chance.
SECRET_CHARS_MIN = 8
#: What a process needs of its surroundings; no AUTHD_ name, so that no developer's setting has a say.
INHERITED = {"HOME", "JAVA_HOME", "LANG", "PATH", "PYTHONPATH", "PYTHONSAFEPATH", "TMPDIR", "XDG_CACHE_HOME"}
#: In the URL of every database, which trusts anybody: it must stand in no log.
DATABASE_PASSWORD = "canary-of-the-database"
TRACEBACK = re.compile(r'Traceback|"exception"\s*:|"event"\s*:\s*"fault"')

T = TypeVar("T")
#: A service client's id and secret.
Credentials = tuple[str, str]


class Secrets:
    """Every password, token and key that a test made, for the reading of the log."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def add(self, *texts: str) -> None:
        for text in texts:
            # A token's last part alone is a secret too: the signature, or a refresh token without its version.
            self._texts |= {part for part in (text, text.rpartition(".")[2]) if len(part) >= SECRET_CHARS_MIN}

    def found_in(self, text: str) -> list[str]:
        return [secret for secret in self._texts if secret in text or json.dumps(secret)[1:-1] in text]


@dataclass(frozen=True)
class Account:
    """A user that a test registered, and the answer to that."""

    username: str
    password: str
    user_id: int
    registered: dict[str, Any]


class Api(httpx.AsyncClient):
    """A client of one process that speaks the contract. It comes from a loopback address of its own, where the system
    has more than one, so that no test's failed logins lock out another's; or from the address that is named.
    """

    def __init__(self, url: str, known: Secrets, address: str | None = None) -> None:
        host = ".".join(["127", *(str(1 + secrets.randbelow(254)) for _ in range(3))])
        address = address or (host if sys.platform == "linux" else None)
        # `verify` only saves the time to load the certificates: nothing here speaks TLS.
        transport = httpx.AsyncHTTPTransport(local_address=address, verify=False)
        super().__init__(base_url=url, transport=transport, timeout=30)
        self._known = known

    async def register(self, username: str, password: str, **more: Any) -> httpx.Response:
        self._known.add(password)
        return await self.post("/auth/register", json={"username": username, "password": password, **more})

    async def login(self, username: str, password: str, **more: str) -> httpx.Response:
        self._known.add(password)
        form = {"username": username, "password": password, **more}
        return self._noted(await self.post("/auth/login", data=form))

    async def refresh(self, refresh_token: str) -> httpx.Response:
        self._known.add(refresh_token)
        return self._noted(await self.post("/auth/refresh_token", json={"refresh_token": refresh_token}))

    async def logout(self, access_token: str) -> httpx.Response:
        return await self.post("/auth/logout", headers=self.bearer(access_token))

    async def me(self, access_token: str) -> httpx.Response:
        return await self.get("/auth/me", headers=self.bearer(access_token))

    async def introspect(self, credentials: Credentials, token: str, **more: str) -> httpx.Response:
        self._known.add(token)
        return await self.post("/auth/introspect", data={"token": token, **more}, auth=credentials)

    async def revoke(self, credentials: Credentials, token: str, **more: str) -> httpx.Response:
        self._known.add(token)
        return await self.post("/auth/revoke", data={"token": token, **more}, auth=credentials)

    def bearer(self, access_token: str) -> dict[str, str]:
        self._known.add(access_token)
        return {"Authorization": f"Bearer {access_token}"}

    async def new_account(self, **more: Any) -> Account:
        username, password = f"{uuid.uuid4().hex}@example.com", f"pass phrase {secrets.token_hex(8)}"
        answer = await self.register(username, password, **more)
        assert answer.status_code == 201, answer.text
        return Account(username, password, answer.json()["user_id"], answer.json())

    async def new_session(self, account: Account) -> dict[str, Any]:
        """A token pair."""
        answer = await self.login(account.username, account.password)
        assert answer.status_code == 200, answer.text
        pair: dict[str, Any] = answer.json()
        return pair

    def _noted(self, answer: httpx.Response) -> httpx.Response:
        if answer.status_code == 200:
            self._known.add(answer.json()["access_token"], answer.json()["refresh_token"])
        return answer


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


class Services:
    """Starts processes over the shared stores. Each has its own database, cloned from a migrated one."""

    def __init__(
        self, postgres: PostgresServer, redis: RedisServer, template: str, defaults: dict[str, str] | None = None
    ) -> None:
        self._defaults = {"AUTHD_BCRYPT_COST": "4"} | (defaults or {})
        self._postgres = postgres
        self._redis = redis
        self._template = template

    @asynccontextmanager
    async def prepared(self, *, empty: bool = False, **settings: str) -> AsyncIterator[ServiceProcess]:
        """A process that is not started yet. `empty`: its database has no schema."""
        name = f"e2e-{uuid.uuid4().hex[:16]}"
        await self._postgres.create_database(name, None if empty else self._template)
        with tempfile.TemporaryDirectory(prefix="authd-e2e-") as folder:
            process = ServiceProcess(Path(folder), self._settings(name) | settings)
            try:
                yield process
                if process.is_running:
                    assert await process.stop() == 0, process.output[-4000:]
                await process.check_log()
            except Exception as error:
                error.add_note(process.tail)
                raise
            finally:
                await process.kill()
                with anyio.CancelScope(shield=True):
                    await self._postgres.drop_database(name)

    @asynccontextmanager
    async def running(self, *, empty: bool = False, **settings: str) -> AsyncIterator[ServiceProcess]:
        """A process that is ready. After the body it is stopped in order, unless it has ended, and its log is read."""
        async with self.prepared(empty=empty, **settings) as process:
            await process.start()
            yield process

    @asynccontextmanager
    async def replica(self, process: ServiceProcess, **settings: str) -> AsyncIterator[ServiceProcess]:
        """Another process of the same deployment; started if `process` is."""
        with tempfile.TemporaryDirectory(prefix="authd-e2e-") as folder:
            replica = ServiceProcess(
                Path(folder), process.settings | {"AUTHD_BIND": f"127.0.0.1:{free_port()}"} | settings
            )
            try:
                if process.is_running:
                    await replica.start()
                yield replica
                if replica.is_running:
                    assert await replica.stop() == 0, replica.output[-4000:]
                await replica.check_log()
            finally:
                await replica.kill()

    def _settings(self, name: str) -> dict[str, str]:
        url = self._postgres.database_url(name).replace("postgres@", f"postgres:{DATABASE_PASSWORD}@")
        # Where there is a `.test.env`, it may change how the processes run, but not where they find their stores.
        chosen = self._defaults | read_values({}, env_file=Path(".test.env"))
        return chosen | {
            "AUTHD_BIND": f"127.0.0.1:{free_port()}",
            "AUTHD_DATABASE_URL": f"{url}?sslmode=disable",
            "AUTHD_REDIS_URL": self._redis.url,
            "AUTHD_DEPLOYMENT": name,
            "AUTHD_SECRET": secrets.token_urlsafe(48),
            "AUTHD_KAFKA_REGISTRATION_TOPIC": name,
        }


@pytest.fixture(scope="session")
async def services(postgres_server: PostgresServer, redis_server: RedisServer) -> AsyncIterator[Services]:
    template = await make_template(postgres_server, redis_server)
    yield Services(postgres_server, redis_server, template)
    await postgres_server.drop_database(template)


async def make_template(postgres: PostgresServer, redis: RedisServer) -> str:
    """The name of a migrated, empty database."""
    template = f"e2e-template-{uuid.uuid4().hex[:16]}"
    url = await postgres.create_database(template)
    await migrate(parse_settings({"AUTHD_DATABASE_URL": url, "AUTHD_REDIS_URL": redis.url, "AUTHD_SECRET": "s" * 32}))
    await watch_lock_order(url)
    return template


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    """One process for all tests of a module, with the default settings and no Kafka: events wait in its outbox."""
    async with services.running() as process:
        yield process


@pytest.fixture
async def api(service: ServiceProcess) -> AsyncIterator[Api]:
    async with service.api() as client:
        yield client


async def until_published(process: ServiceProcess) -> None:
    """Wait until its outbox is empty: every event has been acknowledged by the broker."""

    async def is_empty() -> bool:
        return not await process.query("SELECT 1 FROM outbox LIMIT 1")

    await eventually(is_empty, ARRIVE_S)


def assert_problem(answer: httpx.Response, status: int | Iterable[int], code: str | None = None) -> dict[str, Any]:
    """The problem of a refusal, whose form the contract fixes."""
    expected = {status} if isinstance(status, int) else set(status)
    assert answer.status_code in expected, (answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    # `error` is for the libraries of OAuth (RFC 6749, 5.2).
    assert problem.keys() - {"errors", "error"} == {"type", "title", "status", "detail", "code"}
    assert problem["status"] == answer.status_code
    assert all(isinstance(problem[name], str) and problem[name] for name in ("type", "title", "detail", "code"))
    if code is not None:
        assert problem["code"] == code
    for error in problem.get("errors", []):
        assert error.keys() == {"field", "detail"}
    return problem
