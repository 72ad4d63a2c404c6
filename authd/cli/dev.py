"""`authd dev`: the service with its own Postgres, Redis and Kafka, whose data stay in a folder between runs."""

import argparse
import os
import secrets
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from authd import runtime
from authd.cli.terminal import say
from authd.config import ConfigError, parse_settings, read_values
from authd.infra.http.server.listening import open_listeners
from authd.infra.observe.logs import start_logs

DEV_BIND = "127.0.0.1:8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path(".authd-dev"), help="the folder (default: .authd-dev)")
    parser.set_defaults(command=lambda options: anyio.run(run_dev, options.data, backend_options={"use_uvloop": True}))


async def run_dev(folder: Path) -> int:
    """Serve until a signal. A store that the environment or `.env` names is used instead of an embedded one."""
    try:
        from authd.embedded import KafkaBroker, PostgresServer, RedisServer, StoreError, fetch_libs
    except ImportError as error:
        raise ConfigError(f"`authd dev` needs the extra: pip install 'authd[dev]' ({error.name} is missing).") from None

    chosen = read_values(os.environ)
    values = {"AUTHD_BIND": DEV_BIND, "AUTHD_SECRET": _kept_secret(folder)}
    async with AsyncExitStack() as stores:
        try:
            if "AUTHD_DATABASE_URL" not in chosen:
                say("Starting Postgres.")
                postgres = await stores.enter_async_context(PostgresServer(folder / "postgres"))
                values["AUTHD_DATABASE_URL"] = postgres.url
            if "AUTHD_REDIS_URL" not in chosen:
                say("Starting Redis.")
                redis = await stores.enter_async_context(RedisServer(folder / "redis"))
                values["AUTHD_REDIS_URL"] = redis.url
        except StoreError as error:
            raise ConfigError(str(error)) from None
        if "AUTHD_KAFKA_BOOTSTRAP_SERVERS" not in chosen:
            try:
                say("Starting Kafka (the first time it is downloaded, 43 MB).")
                broker = await stores.enter_async_context(KafkaBroker(folder / "kafka", await fetch_libs()))
                values["AUTHD_KAFKA_BOOTSTRAP_SERVERS"] = broker.bootstrap_servers
            except StoreError as error:
                say(f"No Kafka: {error}. Events wait in the outbox.")
        settings = parse_settings(values | chosen)
        start_logs(settings)
        listeners = open_listeners(settings)
        await runtime.run(settings, listeners, on_ready=lambda: say(_WHAT_TO_TRY.format(settings.bind)))
    return 0


_WHAT_TO_TRY = """
authd is ready on http://{0}   (Ctrl-C stops it; its data stay)

  curl -X POST http://{0}/auth/register -H 'Content-Type: application/json' \\
       -d '{{"username": "ada@example.com", "password": "correct horse", "full_name": "Ada"}}'
  curl -X POST http://{0}/auth/login -d username=ada@example.com -d 'password=correct horse'
  curl http://{0}/auth/me -H "Authorization: Bearer $ACCESS_TOKEN"
  curl http://{0}/readyz
"""


def _kept_secret(folder: Path) -> str:
    """Return the master secret of this folder's data, made once: only who runs `dev` can read it."""
    file = folder / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return file.read_text().strip()
    secret = secrets.token_urlsafe(48)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secret)
    return secret
