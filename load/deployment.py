"""authd with a Postgres and a Redis of its own in a folder that goes with it, for a measurement."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from http_client import Connection

from authd.embedded import PostgresServer, RedisServer
from authd.embedded.processes import free_port, guarded

START_S = 60.0
STOP_S = 40.0


@asynccontextmanager
async def deployment(**settings: str) -> AsyncIterator[int]:
    """The port of an authd that is ready, with these settings and the defaults for all others."""
    with tempfile.TemporaryDirectory(prefix="authd-load-") as name:
        folder = Path(name)
        async with PostgresServer(folder / "postgres") as postgres, RedisServer(folder / "redis") as redis:
            port = free_port()
            environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTHD_")} | {
                "AUTHD_BIND": f"127.0.0.1:{port}",
                "AUTHD_DATABASE_URL": postgres.url,
                "AUTHD_REDIS_URL": redis.url,
                "AUTHD_SECRET": secrets.token_urlsafe(48),
                "AUTHD_LOG_DIR": str(folder / "logs"),
                **settings,
            }
            with (folder / "output.txt").open("wb") as output:
                process = await anyio.open_process(
                    guarded([sys.executable, "-m", "authd", "serve"]),
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            try:
                await _until_ready(port, folder / "output.txt")
                yield port
            finally:
                process.terminate()
                with anyio.move_on_after(STOP_S, shield=True):
                    await process.wait()


async def _until_ready(port: int, output: Path) -> None:
    with anyio.move_on_after(START_S):
        while True:
            try:
                connection = await Connection.open(port)
                status, _ = await connection.request("GET", "/readyz")
                connection.close()
                if status == 200:
                    return
            except OSError:
                pass
            await anyio.sleep(0.1)
    raise SystemExit(f"authd did not start:\n{output.read_text()[-4000:]}")  # noqa: ASYNC240
