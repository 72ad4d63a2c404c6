"""The commands that look at a deployment or change something in it."""

import math
import sys
import time
from collections.abc import Iterable, Sequence

import anyio

from authd.config import Settings
from authd.errors import Unavailable
from authd.events.postgres import PARKED_ROWS
from authd.infra.clocks import ClockWatch, WrongClock
from authd.infra.kafka.producer import Producer
from authd.infra.postgres.database import Database, open_database
from authd.infra.postgres.migrate import migrate as run_migrations
from authd.infra.redis.client import NO_EVICTION, RedisClient, open_redis
from authd.oauth.clients import FRESH_S, ClientRegistry
from authd.passwords.formats import COST_MAX, verify_password
from authd.runtime import running
from authd.sessions.feed import RevocationFeed
from authd.sessions.redis import SessionStore
from authd.stores import PostgresStores, RedisStores
from authd.tokens.keeper import DATA, KeyKeeper
from authd.users.usernames import username_key

#: What a guess may cost whoever has stolen the hashes, and what a login is worth waiting for.
HASH_TARGET_S = 0.25
#: OWASP's floor for bcrypt, also on a slow machine.
PROPOSED_COST_MIN = 10
MEASURED_COST, MEASURED_HASHES = 8, 5


async def migrate(settings: Settings) -> int:
    names = await run_migrations(settings)
    _say("\n".join(f"applied {name}" for name in names) or "The schema is up to date.")
    return 0


async def restored(settings: Settings) -> int:
    """What has to be done once after Postgres was restored from a backup, before the first replica starts."""
    await migrate(settings)  # the backup may be of an older version
    async with open_database(settings) as database:
        done = await PostgresStores(settings, database).deployment.mark_restored()
    _say(f"New users get ids above {done.last_user_id}.")
    _say(f"Restored at {done.restored_at.isoformat(timespec='seconds')}; the log of endings is {done.log_id} now.")
    _say(f"Delete the keys authd:{settings.deployment}:* in Redis before a replica starts.")
    return 0


async def check(settings: Settings) -> int:
    """One line for each part; 1 when one is away without which requests fail."""
    status = 0
    async with open_database(settings) as database, open_redis(settings) as redis:
        for part, probe in (("Postgres", database.ping), ("Redis", redis.ping)):
            try:
                await probe()
                _say(f"{part}: answers")
            except Unavailable as error:
                status = 1
                _say(f"{part}: away: {error.__cause__!r}")
        status |= await _check_clocks(settings, database, redis)
        for policy in sorted(redis.eviction_policies - {NO_EVICTION}):
            _say(f"Redis: evicts ({policy}): sessions and lockouts go when its memory is full; set {NO_EVICTION}")
    _say(f"Kafka: {await _check_kafka(settings)}")
    if settings.trusted_proxies:
        proxies = ", ".join(map(str, settings.trusted_proxies))
        _say(f"Trusted proxies: {proxies}: of their X-Forwarded-For, the rightmost hop that is none of them")
    else:
        _say("Trusted proxies: none: the client's address is the socket's, whatever the headers say")
    _say(_measure_hashing(settings))
    return status


async def show_user(settings: Settings, username: str) -> int:
    async with open_database(settings) as database:
        user = await PostgresStores(settings, database).users.find_by_username_key(username_key(username))
    if user is None:
        return _no_user()
    state = "disabled" if user.disabled else "active"
    _say(f"{user.id} {user.username} {state}, registered {user.created_at.isoformat()}, version {user.version}")
    return 0


async def disable_user(settings: Settings, username: str) -> int:
    return await _set_disabled(settings, username, disabled=True)


async def enable_user(settings: Settings, username: str) -> int:
    return await _set_disabled(settings, username, disabled=False)


async def unlock_user(settings: Settings, username: str, address: str | None) -> int:
    """Forget the failures of the account, and of its pair with the address. What stays locked is said."""
    account = username_key(username)
    async with open_database(settings) as database, open_redis(settings) as redis:
        ring = await KeyKeeper(settings, PostgresStores(settings, database).keys).load()
        throttle = RedisStores(settings, redis, ring.digest_key()).throttle
        forgiven = await throttle.forgive(account, address)
        _say(f"Account: forgot {forgiven.account} failures.")
        if address is None:
            _say("Pairs of address and account cannot be listed: name one with --address to unlock it, too.")
            return 0
        _say(f"Pair with {address}: forgot {forgiven.pair} failures.")
        locked_s = await throttle.locked_s(address, account)
    if locked_s is not None:
        _say(f"{address} itself is locked for {locked_s} s more, for its failures on any accounts.")
    return 0


async def add_client(settings: Settings, name: str) -> int:
    async with open_database(settings) as database:
        client = await ClientRegistry(PostgresStores(settings, database).clients).add(name)
    _say(f"client_id={client.client_id}\nclient_secret={client.secret}")
    return 0


async def list_clients(settings: Settings) -> int:
    async with open_database(settings) as database:
        for client in await PostgresStores(settings, database).clients.list_all():
            _say(f"{client.client_id}  {client.created_at.isoformat(timespec='seconds')}  {client.name}")
    return 0


async def remove_client(settings: Settings, client_id: str) -> int:
    async with open_database(settings) as database:
        if not await PostgresStores(settings, database).clients.delete(client_id):
            return _complain("No such client.")
    _say(f"Removed. Running replicas forget it within {FRESH_S:.0f} s.")
    return 0


async def list_keys(settings: Settings) -> int:
    async with open_database(settings) as database:
        for key in await KeyKeeper(settings, PostgresStores(settings, database).keys).read():
            since = max(key.active_at, key.created_at).isoformat(timespec="seconds")
            use = "never rotates; made" if key.purpose == DATA else "signs from"
            _say(f"{key.kid}  {key.purpose:8}  {use} {since}")
    return 0


async def rotate_keys(settings: Settings) -> int:
    async with open_database(settings) as database:
        for kid in await KeyKeeper(settings, PostgresStores(settings, database).keys).rotate():
            _say(f"{kid}  published; signs in {settings.key_publish_s} s")
    return 0


async def list_outbox(settings: Settings) -> int:
    """What waits, and a line for each event that is set aside; never its value, which is about a person."""
    async with open_database(settings) as database:
        outbox = PostgresStores(settings, database).outbox
        backlog, parked = await outbox.backlog(), await outbox.parked()
    _say(f"waiting: {backlog.events}, the oldest for {backlog.oldest_s:.0f} s")
    _say(f"set aside: {backlog.parked}")
    for row in parked:
        _say(
            f"{row.id}  {row.type}  channel={row.channel}  user={row.user_id}  attempts={row.attempts}"
            f"  error={row.last_error}  age={row.age_s:.0f}s"
        )
    if backlog.parked > len(parked):
        _say(f"These are the {PARKED_ROWS} oldest.")
    return 0


async def retry_outbox(settings: Settings, ids: Sequence[int] | None) -> int:
    """Give events that were set aside their attempts again; None: all of them."""
    async with open_database(settings) as database:
        unparked = await PostgresStores(settings, database).outbox.unpark(ids)
    for row_id in sorted(unparked.retried):
        _say(f"{row_id}  waits for the broker again")
    for row_id in sorted(unparked.overtaken):
        _say(f"{row_id}  dropped: its revocation is over, or a newer one says more")
    return _complain_of_missing(ids or [], {*unparked.retried, *unparked.overtaken})


async def drop_outbox(settings: Settings, ids: Sequence[int]) -> int:
    async with open_database(settings) as database:
        dropped = await PostgresStores(settings, database).outbox.drop(ids)
    for row_id in sorted(dropped):
        _say(f"{row_id}  dropped")
    return _complain_of_missing(ids, set(dropped))


async def _set_disabled(settings: Settings, username: str, *, disabled: bool) -> int:
    async with open_database(settings) as database, open_redis(settings) as redis:
        stores = PostgresStores(settings, database)
        row = await stores.users.set_disabled(username_key(username), disabled=disabled)
        if row is None:
            return _no_user("or it is so already")
        feed = RevocationFeed(stores.revocations, SessionStore(redis, settings))
        async with running(feed.run):
            try:
                await feed.applied(row.bucket, row.number)
            except Unavailable:
                _say("Done in Postgres. Redis is away and will be told before it serves this user.")
                return 0
    _say("Done.")
    return 0


async def _check_clocks(settings: Settings, database: Database, redis: RedisClient) -> int:
    """Say how far this machine's clock is from the others; 1 where authd would not start."""
    watch = ClockWatch(database.time_s, redis.time_s, settings.clock_skew_max_s)
    try:
        skews = await watch.check()
    except WrongClock as error:
        _say(f"Clock: wrong: {error}")
        return 1
    for name, skew_s in (("Postgres", skews.user_store), ("Redis", skews.session_store)):
        if skew_s is None:
            _say(f"Clock: {name} was not asked")
        elif abs(skew_s) > settings.clock_skew_max_s:
            _say(f"Clock: {skew_s:+.3f} s from {name}'s alone: {name}'s may be the wrong one; keys are not deleted")
        else:
            _say(f"Clock: {skew_s:+.3f} s from {name}'s")
    return 0


async def _check_kafka(settings: Settings) -> str:
    if not settings.kafka_bootstrap_servers:
        return "none configured: events wait in the outbox"
    producer = Producer(settings)
    async with running(producer.run):
        with anyio.move_on_after(settings.kafka_timeout_s):
            await producer.wait_connected()
            return "answers"
    return "away: events wait in the outbox"


def _complain_of_missing(wanted: Iterable[int], found: set[int]) -> int:
    missing = sorted(set(wanted) - found)
    return _complain(f"Not set aside: {', '.join(map(str, missing))}.") if missing else 0


def _measure_hashing(settings: Settings) -> str:
    """What a login costs here, and the cost that comes nearest to HASH_TARGET_S."""
    samples_s = []
    for _ in range(MEASURED_HASHES):
        start = time.perf_counter()
        verify_password("", None, MEASURED_COST)
        samples_s.append(time.perf_counter() - start)
    # The fastest: others on the machine only slow a hash down. Each step of the cost doubles it.
    round_s = min(samples_s) / 2**MEASURED_COST
    proposed = min(max(PROPOSED_COST_MIN, round(math.log2(HASH_TARGET_S / round_s))), COST_MAX)
    took_ms, proposed_ms = (1000 * round_s * 2**cost for cost in (settings.bcrypt_cost, proposed))
    return (
        f"Hashing: cost {settings.bcrypt_cost} takes {took_ms:.0f} ms on one thread;"
        f" proposed: AUTHD_BCRYPT_COST={proposed} ({proposed_ms:.0f} ms)"
    )


def _no_user(more: str = "") -> int:
    return _complain(f"No such user{', ' * bool(more)}{more}.")


def _complain(sentence: str) -> int:
    print("authd:", sentence, file=sys.stderr)  # noqa: T201
    return 1


def _say(line: str) -> None:
    print(line)  # noqa: T201
