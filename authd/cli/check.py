"""`authd check`"""

import argparse
import math
import time

import anyio

from authd.cli.terminal import run, say
from authd.config import Settings
from authd.errors import Unavailable
from authd.infra.clocks import ClockWatch, WrongClock
from authd.infra.kafka.producer import KafkaSettings, Producer
from authd.infra.postgres.database import Database, open_database
from authd.infra.redis.client import NO_EVICTION, RedisClient, open_redis
from authd.infra.tasks.running import running
from authd.passwords.formats import COST_MAX, verify_password

#: What a guess may cost whoever has stolen the hashes, and what a login is worth waiting for.
HASH_TARGET_S = 0.25
#: OWASP's floor for bcrypt, also on a slow machine.
PROPOSED_COST_MIN = 10
MEASURED_COST, MEASURED_HASHES = 8, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=lambda _: run(check))


async def check(settings: Settings) -> int:
    """Print one line for each part. Return 1 when one is unavailable without which requests fail."""
    status = 0
    async with open_database(settings) as database, open_redis(settings) as redis:
        for part, probe in (("Postgres", database.ping), ("Redis", redis.ping)):
            try:
                await probe()
                say(f"{part}: answers")
            except Unavailable as error:
                status = 1
                say(f"{part}: away: {error.__cause__!r}")
        status |= await _check_clocks(settings, database, redis)
        for policy in sorted(redis.eviction_policies - {NO_EVICTION}):
            say(f"Redis: evicts ({policy}): sessions and lockouts go when its memory is full; set {NO_EVICTION}")
    say(f"Kafka: {await _check_kafka(settings)}")
    if settings.trusted_proxies:
        proxies = ", ".join(map(str, settings.trusted_proxies))
        say(f"Trusted proxies: {proxies}: of their X-Forwarded-For, the rightmost hop that is none of them")
    else:
        say("Trusted proxies: none: the client's address is the socket's, whatever the headers say")
    say(_measure_hashing(settings))
    return status


async def _check_clocks(settings: Settings, database: Database, redis: RedisClient) -> int:
    """Say how far this machine's clock is from the others; 1 where authd would not start."""
    watch = ClockWatch(database.time_s, redis.time_s, settings.clock_skew_max_s)
    try:
        skews = await watch.check()
    except WrongClock as error:
        say(f"Clock: wrong: {error}")
        return 1
    for name, skew_s in (("Postgres", skews.user_store), ("Redis", skews.session_store)):
        if skew_s is None:
            say(f"Clock: {name} was not asked")
        elif abs(skew_s) > settings.clock_skew_max_s:
            say(f"Clock: {skew_s:+.3f} s from {name}'s alone: {name}'s may be the wrong one; keys are not deleted")
        else:
            say(f"Clock: {skew_s:+.3f} s from {name}'s")
    return 0


async def _check_kafka(settings: Settings) -> str:
    if not settings.kafka_bootstrap_servers:
        return "none configured: events wait in the outbox"
    producer = Producer(settings.section(KafkaSettings))
    async with running(producer.run):
        with anyio.move_on_after(settings.kafka_timeout_s):
            await producer.wait_connected()
            return "answers"
    return "away: events wait in the outbox"


def _measure_hashing(settings: Settings) -> str:
    """Return what a login costs here, and the cost that comes nearest to HASH_TARGET_S."""
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
