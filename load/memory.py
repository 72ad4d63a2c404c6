"""Measures what 100,000 sessions of 50,000 users take in Redis, opened as a login opens them; see `load/memory`.

Nothing else is there: no cached user, and the streams of events are empty, as they are once the relay has read them.
"""

import argparse
import re
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import anyio
from redis.asyncio import Redis

from authd.config import Secret, Settings
from authd.embedded import RedisServer
from authd.infra.caller import USER_AGENT_BYTES_MAX, Caller
from authd.infra.redis.client import open_redis
from authd.infra.subject import Subject
from authd.sessions.redis import Opened, Owner, SessionSettings, SessionStore

BYTES_MAX = 300
CONCURRENT = 64
#: What Redis starts with, and what docs/operations.md proposes.
CONFIGS: dict[str, dict[str, str]] = {"default": {}, "hash-max-listpack-value 160": {"hash-max-listpack-value": "160"}}
#: A first id as a database of some age has it.
FIRST_USER = 1_000_000
EPOCH, KEY = 1, 3
#: Of each bucket, and there for good. Every other key must expire.
FIXED = re.compile(r"authd:memory:\{\d+\}:(applied|events)")
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"[:USER_AGENT_BYTES_MAX]


async def main(options: argparse.Namespace) -> int:
    passed = [await measure(name, config, options) for name, config in CONFIGS.items()]
    return 0 if all(passed) else 1


async def measure(name: str, config: dict[str, str], options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory(prefix="authd-memory-") as folder:
        async with RedisServer(Path(folder), durable=False, config=config) as server:
            settings = Settings(
                database_url=Secret("unused"),
                redis_url=Secret(server.url),
                secret=Secret("-"),
                deployment="memory",
                kafka_bootstrap_servers=("unused",),  # so that events are told, and their streams are there
            )
            async with Redis.from_url(server.url) as redis:
                started = time.monotonic()
                async with open_redis(settings) as client:
                    store = SessionStore(client, settings.section(SessionSettings))
                    # The scripts, the first connections and their buffers are there either way.
                    await open_sessions(store, range(FIRST_USER - CONCURRENT, FIRST_USER))
                    await redis.flushdb()
                    before = await used_memory(redis)
                    users = range(FIRST_USER, FIRST_USER + options.users)
                    await open_sessions(store, [user for user in users for _ in range(options.sessions // len(users))])
                    await empty_streams(redis)
                    after = await used_memory(redis)
                seconds = time.monotonic() - started
                version = (await redis.info("server"))["redis_version"]
                keys, forever = await survey(redis)
    each = (after - before) / options.sessions
    is_met = each <= BYTES_MAX and not forever
    print(f"Redis {version}, {name}: {options.sessions} sessions of {options.users} users, opened in {seconds:.0f} s")
    print(f"  used_memory {before} before, {after} after: {each:.0f} bytes a session, wanted {BYTES_MAX} or less")
    print(f"  keys: {', '.join(f'{count} {kind}' for kind, count in sorted(keys.items()))}")
    print(f"  without an expiry, but for the fixed ones of a bucket: {', '.join(forever[:5]) or 'none'}")
    print("PASS" if is_met else "FAIL", name, flush=True)
    return is_met


async def open_sessions(store: SessionStore, users: "range | list[int]") -> None:
    waiting = iter(users)

    async def open_some() -> None:
        for user_id in waiting:  # shared: each takes the next
            caller = Caller(f"203.0.113.{user_id % 256}", USER_AGENT)
            answer = await store.open(Owner(Subject(user_id, 1), EPOCH, 0), secrets.token_bytes(16), KEY, caller, 0)
            assert isinstance(answer, Opened) and not answer.evicted, answer

    async with anyio.create_task_group() as group:
        for _ in range(CONCURRENT):
            group.start_soon(open_some)


async def empty_streams(redis: Redis) -> None:
    async for key in redis.scan_iter(count=1000, _type="stream"):
        await redis.xtrim(key, maxlen=0, approximate=False)


async def used_memory(redis: Redis) -> int:
    await redis.memory_purge()
    return int((await redis.info("memory"))["used_memory"])


async def survey(redis: Redis) -> tuple[Counter[str], list[str]]:
    """How many keys there are of each kind, and those that should expire and do not."""
    kinds: Counter[str] = Counter()
    forever = []
    batch: list[str] = []

    async def look() -> None:
        async with redis.pipeline(transaction=False) as pipeline:
            for key in batch:
                pipeline.pttl(key)
            answers = await pipeline.execute()
        for key, ttl_ms in zip(batch, answers, strict=True):
            kinds[key.split(":")[3]] += 1
            if ttl_ms == -1 and not FIXED.fullmatch(key):
                forever.append(key)
        batch.clear()

    async for key in redis.scan_iter(count=1000):
        batch.append(key.decode())
        if len(batch) == 1000:
            await look()
    await look()
    return kinds, forever


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="load/memory", description="Measure what sessions take in Redis.")
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--sessions", type=int, default=100_000, help="a multiple of the users")
    sys.exit(anyio.run(main, parser.parse_args(), backend_options={"use_uvloop": True}))
