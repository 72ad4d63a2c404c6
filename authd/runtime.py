"""Builds every object and owns the task tree. Read this first.

The nesting of `run` is the order of start, and, read from the inside out, the order of shutdown: whoever feeds stops
before whoever drains. Expected trouble is handled inside each task; anything else escapes, cancels the tree and ends
the process with an error: starting again is the orchestrator's work.
"""

import gc
import os
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import structlog

from authd.accounts.http import make_account_endpoints
from authd.accounts.registration import Accounts
from authd.config import Settings
from authd.errors import Unavailable
from authd.events.publisher import FLUSH_S, OutboxWatch, Publisher
from authd.infra.clocks import ClockWatch, WrongClock
from authd.infra.http.app import App
from authd.infra.http.endpoint import Endpoint
from authd.infra.http.openapi import make_openapi_endpoints
from authd.infra.http.operations import make_operation_endpoints, make_probe_endpoints
from authd.infra.http.server.listening import Listeners
from authd.infra.http.server.server import HttpServer
from authd.infra.kafka.producer import Producer
from authd.infra.observe.health import Health
from authd.infra.observe.logs import flush_logs
from authd.infra.postgres.database import Database, open_database
from authd.infra.postgres.migrate import MIGRATION_ERRORS, NOT_READY, migrate
from authd.infra.redis.client import RedisClient, open_redis
from authd.login.http import make_login_endpoints
from authd.login.password import PasswordCheck
from authd.oauth.clients import ClientRegistry
from authd.oauth.http import make_oauth_endpoints
from authd.oauth.introspection import TokenDesk
from authd.passwords.hasher import Hasher
from authd.sessions.feed import RevocationFeed
from authd.sessions.http import make_session_endpoints
from authd.sessions.relay import EventRelay
from authd.sessions.sessions import Sessions
from authd.stores import PostgresStores, RedisStores
from authd.tokens.access import TokenMint
from authd.tokens.device import DeviceMint
from authd.tokens.http import make_key_endpoints
from authd.tokens.keeper import KeyKeeper, SealedByAnotherSecret
from authd.tokens.ring import KeyRing
from authd.users.http import make_user_endpoints

#: Time after all deadlines of a shutdown at which the process ends without ceremony.
LAST_RESORT_S = 10.0
START_RETRY_MAX_S = 2.0
#: Connections at `AUTHD_OPERATIONS_BIND`, a worker: probes and scrapers are few.
OPERATIONS_CONNECTIONS_MAX = 64
#: How long a shutdown waits for what runs there: nothing that takes longer.
OPERATIONS_DRAIN_S = 1.0
#: New objects between two collections: Python's 700 are those of a request or two, and more than this take long enough
#: to be seen by who waits meanwhile.
GC_OBJECTS = 5_000

#: What ends a start with a sentence and not with a traceback.
START_ERRORS = (*MIGRATION_ERRORS, SealedByAnotherSecret, WrongClock)

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
    remembered = PostgresStores(settings, database)
    keeper = KeyKeeper(settings, remembered.keys)
    ring = await keeper.load()
    decided = RedisStores(settings, redis, ring.digest_key())
    mint = TokenMint(settings, ring)
    hasher = Hasher(settings)
    producer = Producer(settings) if settings.kafka_bootstrap_servers else None
    publisher = Publisher(settings, remembered.outbox, producer) if producer is not None else None
    outbox = OutboxWatch(settings, remembered.outbox)

    def offer_lane(lane: int) -> None:
        if publisher is not None:
            publisher.offer(lane)

    feed = RevocationFeed(remembered.revocations, decided.sessions, offer_lane)
    relay = EventRelay(decided.streams, remembered.relay, remembered.events, feed, offer_lane)
    passwords = PasswordCheck(settings, remembered.users, decided.throttle, hasher, DeviceMint(ring))
    sessions = Sessions(
        mint,
        remembered.users,
        remembered.revocations,
        decided.sessions,
        decided.user_cache,
        passwords,
        feed,
        relay.offer,
    )
    health = Health(
        {"user_store": database.ping, "session_store": redis.ping},
        events=lambda: producer is not None and producer.connected and not outbox.is_late,
        oldest_s=lambda: outbox.oldest_s,
    )
    accounts = Accounts(remembered.users, hasher, decided.throttle, offer_lane)
    desk = TokenDesk(mint, sessions)
    app = App(
        settings,
        make_endpoints(settings, accounts, sessions, ClientRegistry(remembered.clients), desk, ring, health),
    )
    _log.info("trusted_proxies", networks=[str(network) for network in settings.trusted_proxies])
    async with AsyncExitStack() as tree:
        await tree.enter_async_context(running(partial(keeper.follow, ring)))
        await tree.enter_async_context(running(feed.run))
        await tree.enter_async_context(running(outbox.run))
        if producer is not None and publisher is not None:
            await tree.enter_async_context(running(producer.run))
            await tree.enter_async_context(running(publisher.run, last=publisher.drain))
        await tree.enter_async_context(running(relay.run, last=relay.drain))
        await tree.enter_async_context(running(health.run))
        await tree.enter_async_context(running(hasher.run))
        await tree.enter_async_context(_serving(app, listeners, settings, health))
        # What is built by now stays: the collector need not look at it again, nor after every few requests.
        gc.freeze()
        gc.set_threshold(GC_OBJECTS)
        _log.info("ready", bind=settings.bind, pid=os.getpid())
        if on_ready is not None:
            on_ready()
        await stop.wait()
        _log.info("stopping")


def make_endpoints(
    settings: Settings,
    accounts: Accounts,
    sessions: Sessions,
    registry: ClientRegistry,
    desk: TokenDesk,
    ring: KeyRing,
    health: Health,
) -> list[Endpoint]:
    """Return what is served at `AUTHD_BIND`: with `AUTHD_OPERATIONS_BIND` nothing of it is for operators alone."""
    endpoints = [
        *make_account_endpoints(settings, accounts),
        *make_login_endpoints(settings, sessions),
        *make_session_endpoints(settings, sessions),
        *make_user_endpoints(sessions.profile),
        *make_oauth_endpoints(settings, registry, desk),
        *make_key_endpoints(settings, ring),
        *(make_probe_endpoints(health) if settings.operations_bind else make_operation_endpoints(health)),
    ]
    return [*endpoints, *make_openapi_endpoints(settings.issuer, endpoints)]


@asynccontextmanager
async def running(
    task: Callable[..., Coroutine[Any, Any, None]], *, last: Callable[[], Awaitable[None]] | None = None
) -> AsyncGenerator[None, None]:
    """A task that is ready before the body runs and is cancelled after it, and after `last`."""
    async with anyio.create_task_group() as group:
        await group.start(task)
        yield
        if last is not None:
            await last()
        group.cancel_scope.cancel()


@asynccontextmanager
async def _serving(app: App, listeners: Listeners, settings: Settings, health: Health) -> AsyncGenerator[None, None]:
    apps = [app]
    async with AsyncExitStack() as servers:
        if listeners.operations is not None:  # it stops last, to tell of the drain
            inner = App(settings, make_operation_endpoints(health))
            apps.append(inner)
            server = HttpServer(inner, settings, connections_max=OPERATIONS_CONNECTIONS_MAX, drain_s=OPERATIONS_DRAIN_S)
            await servers.enter_async_context(server.serving(listeners.operations))
        server = HttpServer(app, settings, connections_max=settings.connections_per_worker, drain_s=settings.drain_s)
        await servers.enter_async_context(server.serving(listeners.public))
        yield
        health.is_draining = True
        for each in apps:
            each.is_draining = True
        # The balancer sees /readyz and sends nobody else; who comes meanwhile is answered, and told to leave.
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
    """Migrate; while Postgres is away try again, for as long as `start_timeout_s`."""
    delay_s = 0.1
    deadline = anyio.current_time() + settings.start_timeout_s
    while True:
        try:
            for name in await migrate(settings):
                _log.info("migrated", migration=name)
            return
        except NOT_READY as error:
            if anyio.current_time() + delay_s > deadline:
                raise Unavailable("user_store") from error
            _log.warning("postgres_away", cause=repr(error), retry_in_s=delay_s)
        await anyio.sleep(delay_s)
        delay_s = min(2 * delay_s, START_RETRY_MAX_S)
