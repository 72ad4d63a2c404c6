"""Fixtures: processes over the shared stores, each with a database, key prefix and topic of its own."""

import secrets
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from support.api import Api
from support.process import DATABASE_PASSWORD, ServiceProcess
from support.waiting import WITHIN_S, eventually

from authd.config import read_values
from authd.embedded import PostgresServer, RedisServer
from authd.embedded.processes import free_port


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
                async with _ending(process):
                    yield process
            finally:
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
            async with _ending(replica):
                if process.is_running:
                    await replica.start()
                yield replica

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


@asynccontextmanager
async def _ending(process: ServiceProcess) -> AsyncIterator[None]:
    """After the body stop the process in order, unless it has ended, and read its log; kill it in any case."""
    try:
        yield
        if process.is_running:
            assert await process.stop() == 0, "it did not end in order"
        await process.check_log()
    except Exception as error:
        error.add_note(process.tail)
        raise
    finally:
        await process.kill()


@pytest.fixture(scope="session")
def services(postgres_server: PostgresServer, redis_server: RedisServer, database_template: str) -> Services:
    return Services(postgres_server, redis_server, database_template)


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    """One process for all tests of a module, with the default settings and no Kafka: events wait in its outbox."""
    async with services.running() as process:
        yield process


@pytest.fixture
async def api(service: ServiceProcess) -> AsyncIterator[Api]:
    async with service.api() as client:
        yield client


async def until_published(process: ServiceProcess, within_s: float = WITHIN_S) -> None:
    """Wait until its outbox is empty: every event has been acknowledged by the broker."""

    async def is_empty() -> bool:
        # Each look is a connection of its own to Postgres.
        await anyio.sleep(0.1)
        return not await process.query("SELECT 1 FROM outbox LIMIT 1")

    await eventually(is_empty, within_s)
