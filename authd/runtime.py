"""Owns the task tree of a replica. Read this first.

`_tasks` is the order of the start and, read backwards, of the shutdown: what feeds stops before what drains. Expected
trouble is handled inside each task; anything else escapes, cancels the tree and ends the process with an error:
starting again is the orchestrator's work.
"""

import gc
import os
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import structlog

from authd.assembly.app import build_app, build_operations_app
from authd.assembly.keys import build_keeper
from authd.assembly.postgres import PostgresStores
from authd.assembly.redis import RedisStores
from authd.assembly.services import Services
from authd.config import Settings
from authd.errors import Unavailable
from authd.events.publisher import FLUSH_S
from authd.infra.clocks import ClockWatch
from authd.infra.http.server.listening import Listeners
from authd.infra.http.server.server import HttpServer, ServerSettings
from authd.infra.observe.logs import flush_logs
from authd.infra.postgres.database import Database, open_database
from authd.infra.postgres.migrate import NOT_READY, migrate
from authd.infra.redis.client import RedisClient, open_redis
from authd.infra.tasks.backoff import Backoff
from authd.infra.tasks.running import Drain, Run, running

#: Time after all deadlines of a shutdown at which the process ends without ceremony.
LAST_RESORT_S = 10.0
START_RETRY_FIRST_S, START_RETRY_MAX_S = 0.1, 2.0
#: Connections at `AUTHD_OPERATIONS_BIND`, a worker: probes and scrapers are few.
OPERATIONS_CONNECTIONS_MAX = 64
#: How long a shutdown waits for what runs there: nothing that takes longer.
OPERATIONS_DRAIN_S = 1.0
#: New objects between two collections: Python's 700 are those of a request or two, and more than this take long enough
#: to be seen by who waits meanwhile.
GC_OBJECTS = 5_000

_log = structlog.get_logger()


async def run(settings: Settings, listeners: Listeners, *, on_ready: Callable[[], None] | None = None) -> None:
    """Serve on listening sockets until SIGTERM or SIGINT; a second signal ends at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as root:
            stop = anyio.Event()
            root.start_soon(_watch_signals, signals, stop, settings)
            async with open_database(settings) as database, open_redis(settings) as redis:
                await _wait_for_postgres(settings)
                clocks = ClockWatch(database.time_s, redis.time_s, settings.clock_skew_max_s)
                await clocks.check()
                async with running(clocks.run):
                    await _serve(settings, database, redis, listeners, stop, on_ready)
            root.cancel_scope.cancel()
    _log.info("stopped")


async def _serve(
    settings: Settings,
    database: Database,
    redis: RedisClient,
    listeners: Listeners,
    stop: anyio.Event,
    on_ready: Callable[[], None] | None,
) -> None:
    postgres = PostgresStores(settings, database)
    keeper = build_keeper(settings, postgres)
    ring = await keeper.load()
    services = Services(settings, postgres, RedisStores(settings, redis), ring)
    _log.info("trusted_proxies", networks=[str(network) for network in settings.trusted_proxies])
    async with AsyncExitStack() as tree:
        for run, drain in _tasks(services, partial(keeper.follow, ring)):
            await tree.enter_async_context(running(run, drain=drain))
        await tree.enter_async_context(_serving(services, listeners))
        # What is built by now stays: the collector need not look at it again, nor after every few requests.
        gc.freeze()
        gc.set_threshold(GC_OBJECTS)
        _log.info("ready", bind=settings.bind, pid=os.getpid())
        if on_ready is not None:
            on_ready()
        await stop.wait()
        _log.info("stopping")


def _tasks(services: Services, follow_keys: Run) -> Iterator[tuple[Run, Drain | None]]:
    """Return the tasks of a replica in the order of their start, each with what ends its work when those after it are
    gone.
    """
    yield follow_keys, None
    yield services.feed.run, None
    yield services.outbox_watch.run, None
    if services.producer is not None and services.publisher is not None:
        yield services.producer.run, None
        yield services.publisher.run, services.publisher.drain
    yield services.relay.run, services.relay.drain
    yield services.health.run, None
    yield services.hasher.run, None


@asynccontextmanager
async def _serving(services: Services, listeners: Listeners) -> AsyncGenerator[None, None]:
    settings = services.settings
    section = settings.section(ServerSettings)
    app = build_app(services)
    apps = [app]
    async with AsyncExitStack() as servers:
        if listeners.operations is not None:  # it stops last, to tell of the drain
            inner = build_operations_app(services)
            apps.append(inner)
            server = HttpServer(inner, section, connections_max=OPERATIONS_CONNECTIONS_MAX, drain_s=OPERATIONS_DRAIN_S)
            await servers.enter_async_context(server.serving(listeners.operations))
        server = HttpServer(app, section, connections_max=settings.connections_per_worker, drain_s=settings.drain_s)
        await servers.enter_async_context(server.serving(listeners.public))
        yield
        services.health.is_draining = True
        for each in apps:
            each.is_draining = True
        # The balancer sees /readyz and sends nobody else; a client that arrives meanwhile is answered and asked to
        # leave.
        await anyio.sleep(settings.unready_s)


async def _watch_signals(signals: AsyncIterator[signal.Signals], stop: anyio.Event, settings: Settings) -> None:
    async for number in signals:
        if stop.is_set():
            _log.warning("stopped_at_once", signal=number.name)
            _exit(1)
        _log.info("signal", signal=number.name)
        stop.set()
        # Behind every deadline of the shutdown, in case that one of them does not hold.
        last_resort = threading.Timer(
            settings.unready_s + settings.drain_s + FLUSH_S + settings.kafka_timeout_s + LAST_RESORT_S, _exit, (1,)
        )
        last_resort.daemon = True
        last_resort.start()


def _exit(status: int) -> None:
    flush_logs()
    os._exit(status)


async def _wait_for_postgres(settings: Settings) -> None:
    """Migrate; while Postgres is unavailable try again, for as long as `start_timeout_s`."""
    backoff = Backoff(START_RETRY_FIRST_S, START_RETRY_MAX_S)
    deadline = anyio.current_time() + settings.start_timeout_s
    while True:
        try:
            for name in await migrate(settings):
                _log.info("migrated", migration=name)
            return
        except NOT_READY as error:
            delay_s = backoff.next_s()
            if anyio.current_time() + delay_s > deadline:
                raise Unavailable("user_store") from error
            _log.warning("postgres_away", cause=repr(error), retry_in_s=round(delay_s, 3))
        await anyio.sleep(delay_s)
