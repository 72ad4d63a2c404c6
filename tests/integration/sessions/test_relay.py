import json
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import pytest
from blockbuster import BlockBuster
from prometheus_client import REGISTRY
from redis.asyncio import Redis, RedisCluster
from support.deployment import answers
from support.relaying import CLIENT, PATIENCE_S, Node, make_settings, open_node
from support.waiting import eventually

from authd.config import BUCKETS, Settings
from authd.embedded import PostgresServer
from authd.events.redis import event_stream
from authd.login.redis import Outcome, Reserved
from authd.sessions.redis import Live
from authd.sessions.relay import ENTRIES_MAX
from authd.tokens.access import encode_base64url

pytestmark = pytest.mark.timeout(120)

MakeNode = Callable[..., Awaitable[Node]]
#: Users of one bucket.
BUCKET = 7
OURS = [BUCKET + BUCKETS * number for number in range(1, 13)]


@pytest.fixture
async def make_node(
    database_url: str, redis_url: str, postgres_server: PostgresServer, no_blocking: BlockBuster
) -> AsyncIterator[MakeNode]:
    """Makes replicas of the test's deployment; the first one's settings are those of all."""
    shared: list[Settings] = []
    async with AsyncExitStack() as stack:

        async def make(*, relays: bool = True, sweep_s: float = 0.2, **changes: Any) -> Node:
            if not shared:
                shared.append(make_settings(database_url, redis_url, **changes))
            return await stack.enter_async_context(
                open_node(shared[0], no_blocking, relays=relays, relay_sweep_s=sweep_s)
            )

        yield make
        await postgres_server.resume()


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator["Redis | RedisCluster"]:
    first = redis_url.split(",")[0]
    async with RedisCluster.from_url(first) if "," in redis_url else Redis.from_url(first) as client:
        yield client


async def test_what_scripts_record_becomes_events_and_rows_of_the_log(make_node: MakeNode) -> None:
    node = await make_node(max_active_sessions=1)
    user = await node.register()
    first = await node.open(user)
    second = await node.open(user)
    await node.reuse(user, second)
    node.relay.offer(user % BUCKETS)
    await node.until_relayed()
    rows = [row for row in await node.rows(user_id=user) if row["type"] != "user.registered"]
    assert [row["type"] for row in rows] == [
        "session.opened",
        "session.evicted",
        "session.opened",
        "session.reuse_detected",
    ]
    sids = [encode_base64url(session.id) for session in (first, first, second, second)]
    values = [json.loads(row["value"]) for row in rows]
    assert [(value["user_id"], value["session_id"]) for value in values] == [(user, sid) for sid in sids]
    assert (values[0]["address"], values[0]["user_agent"]) == (CLIENT.address, CLIENT.user_agent)
    assert {row["message_key"] for row in rows} == {str(user)}
    assert await node.ended(user) == [(first.id, "evicted"), (second.id, "reused")]
    records = await node.rows("revocations", user)
    assert [row["message_key"] for row in records] == [sids[0], sids[2]]


async def test_an_ending_that_its_request_logged_is_not_logged_again_and_is_told_once(make_node: MakeNode) -> None:
    node = await make_node(max_active_sessions=1)
    user = await node.register()
    first = await node.open(user, offer=False)
    await node.open(user, offer=False)
    await node.feed.record(await node.subject(user), [first.id], "evicted")
    node.relay.offer(user % BUCKETS)
    await node.until_relayed()
    assert await node.ended(user) == [(first.id, "evicted")]
    assert len(await node.rows("revocations", user)) == 1
    assert [row["type"] for row in await node.rows(user_id=user)].count("session.evicted") == 1


async def test_entries_that_come_back_bring_the_same_events_and_no_second_ending(
    make_node: MakeNode, raw: "Redis | RedisCluster"
) -> None:
    """What a crash between commit and deletion leaves, and what an older snapshot brings back."""
    node = await make_node(relays=False, max_active_sessions=1)
    user = await node.register()
    first = await node.open(user)
    await node.open(user)
    await node.reuse(user, await node.open(user))
    await lock_a_pair(node, user)
    streams = {bucket: event_stream(node.redis, bucket) for bucket in await node.decided.streams.filled()}
    saved = {stream: await raw.dump(stream) for stream in streams.values()}
    other = await make_node()
    await other.until_relayed()
    before, ended = await ids(node), await node.ended(user)
    assert first.id in {session_id for session_id, _ in ended}
    for stream, dump in saved.items():
        await raw.restore(stream, 0, dump, replace=True)
    await other.until_relayed()
    after = await ids(node)
    assert len(after) == 2 * len(before)
    assert set(after) == set(before)
    assert after[: len(before)] == before
    assert await node.ended(user) == ended


async def test_two_replicas_move_everything_in_each_users_order(make_node: MakeNode) -> None:
    one, other = await make_node(max_active_sessions=2), await make_node()
    users = [await one.register() for _ in range(10)] + [await one.add_user(user) for user in OURS[:6]]
    opened: dict[int, list[str]] = {user: [] for user in users}

    async def log_in(user: int) -> None:
        for number in range(12):
            session = await (one, other)[number % 2].open(user)
            opened[user].append(encode_base64url(session.id))
            # Within a millisecond of Redis's clock there is no order but the ids'.
            await anyio.sleep(0.002)

    async with anyio.create_task_group() as group:
        for user in users:
            group.start_soon(log_in, user)
    await one.until_relayed()
    for user in users:
        told = first_of_each(await one.rows(user_id=user), "session.opened")
        assert told == opened[user]
        evicted = first_of_each(await one.rows(user_id=user), "session.evicted")
        assert evicted == opened[user][:-2]
        assert [encode_base64url(id_ or b"") for id_, _ in await one.ended(user)] == evicted


async def test_a_stream_that_was_wiped_or_whose_ids_went_back_is_moved_on(
    make_node: MakeNode, raw: "Redis | RedisCluster"
) -> None:
    node = await make_node()
    user = await node.register()
    await node.open(user)
    await node.until_relayed()
    await raw.delete(event_stream(node.redis, user % BUCKETS))
    # A new master whose clock is years behind: its ids are lower than all before.
    await raw.xadd(
        event_stream(node.redis, user % BUCKETS), {"t": "session.evicted", "u": user, "s": b"s" * 16}, id="5-1"
    )
    await node.until_relayed()
    assert [row["type"] for row in await node.rows(user_id=user)][-2:] == ["session.opened", "session.evicted"]
    assert await node.ended(user) == [(b"s" * 16, "evicted")]


async def test_a_full_stream_drops_what_is_only_told_and_never_an_ending(make_node: MakeNode) -> None:
    node = await make_node(relays=False, stream_max=1, max_active_sessions=1, max_login_attempts=1, lockout_s=1)
    user = await node.add_user(OURS[0])
    dropped, dropped_locks = count("authd_events_dropped_total", "session.opened"), count_locks()
    sessions = [await node.open(user) for _ in range(6)]
    # The first entry is an opening; then there is room for evictions alone.
    assert count("authd_events_dropped_total", "session.opened") - dropped == 5
    assert (await node.decided.streams.filled())[BUCKET] == 6
    for _ in range(2):
        await lock_a_pair(node, user)
    assert count_locks() - dropped_locks == 1
    other = await make_node()
    await other.until_relayed()
    assert [id_ for id_, _ in await node.ended(user)] == [session.id for session in sessions[:-1]]


async def test_without_a_broker_only_endings_are_recorded(make_node: MakeNode) -> None:
    node = await make_node(
        relays=False, kafka_bootstrap_servers=(), max_active_sessions=1, max_login_attempts=1, stream_max=100
    )
    user = await node.add_user(OURS[0])
    first = await node.open(user)
    await node.open(user)
    await lock_a_pair(node, user)
    assert await node.decided.streams.filled() == {BUCKET: 1}
    other = await make_node()
    await other.until_relayed()
    assert await node.ended(user) == [(first.id, "evicted")]
    assert await ids(node) == []


async def test_streams_are_bounded_while_postgres_is_away_and_moved_when_it_is_back(
    make_node: MakeNode, postgres_server: PostgresServer
) -> None:
    node = await make_node(stream_max=50, database_timeout_s=1.5, max_active_sessions=100)
    user = await node.add_user(OURS[0])
    await postgres_server.pause()
    for _ in range(80):
        await node.open(user)
    assert (await node.decided.streams.filled())[BUCKET] == 50
    with anyio.fail_after(2):
        await node.relay.drain()
    assert (await node.decided.streams.filled())[BUCKET] == 50
    await postgres_server.resume()
    await node.until_relayed()
    # The breaker may be open for a moment after Postgres is back.
    await eventually(partial(answers, node.database.ping))
    assert len(set(await ids(node))) == 50


async def test_thousands_of_entries_are_moved_in_order(make_node: MakeNode, raw: "Redis | RedisCluster") -> None:
    node = await make_node()
    user = await node.add_user(OURS[0])
    sids = [secrets.token_bytes(16) for _ in range(2000)]
    stream = event_stream(node.redis, BUCKET)
    pipeline = raw.pipeline(transaction=False)
    for sid in sids:
        pipeline.execute_command("XADD", stream, "*", "t", "session.reuse_detected", "u", user, "s", sid)
    await pipeline.execute()
    await node.until_relayed()
    assert first_of_each(await node.rows(user_id=user), "session.reuse_detected") == [
        encode_base64url(sid) for sid in sids
    ]
    assert [sid for sid, _ in await node.ended(user)] == sids


async def test_what_this_version_cannot_read_stays_and_holds_up_nothing(
    make_node: MakeNode, raw: "Redis | RedisCluster"
) -> None:
    node = await make_node(relays=False)
    user = await node.add_user(OURS[0])
    stream = event_stream(node.redis, BUCKET)
    for number in range(ENTRIES_MAX + 5):
        await raw.xadd(stream, {"t": "session.renamed", "u": user, "n": number})
    await raw.xadd(stream, {"t": "session.opened", "u": "nobody", "s": b"s" * 16, "c": b""})
    await node.open(user)
    other = await make_node()

    async def is_moved() -> bool:
        return [row["type"] for row in await node.rows(user_id=user)] == ["session.opened"]

    await eventually(is_moved)
    await eventually(lambda: has_length(other, ENTRIES_MAX + 6))


async def test_endings_that_both_sides_write_at_once_never_wait_for_each_other(make_node: MakeNode) -> None:
    """The relay locks the users of a batch, a logout its own, and both the bucket's head."""
    node = await make_node(max_active_sessions=1)
    for user in OURS:
        await node.add_user(user)
    is_over = anyio.Event()

    async def log_in(user: int) -> None:
        while not is_over.is_set():
            await node.open(user)
            await node.end(user, await node.open(user))

    async with anyio.create_task_group() as group:
        for user in OURS:
            group.start_soon(log_in, user)

        async def are_many() -> bool:
            return len(await node.rows("revocations")) > 400

        await eventually(are_many)
        is_over.set()
    await node.until_relayed()
    [row] = await node.database.fetch("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert row["deadlocks"] == 0
    numbers = await node.database.fetch("SELECT number FROM revocations WHERE bucket = $1 ORDER BY number", BUCKET)
    assert [row["number"] for row in numbers] == list(range(1, len(numbers) + 1))


async def test_a_drained_relay_has_moved_what_was_there(make_node: MakeNode) -> None:
    node = await make_node(sweep_s=3600)
    for _ in range(20):
        await node.open(await node.register(), offer=False)
    with anyio.fail_after(PATIENCE_S):  # and not only after a sweep
        await node.relay.drain()
    assert await node.decided.streams.filled() == {}


async def test_a_lock_is_told_in_its_users_lane_though_it_was_counted_elsewhere(make_node: MakeNode) -> None:
    node = await make_node(max_login_attempts=1)
    user = await node.register()
    await lock_a_pair(node, user)
    await node.until_relayed()
    [row] = [row for row in await node.rows(user_id=user) if row["type"] == "login.locked"]
    value = json.loads(row["value"])
    assert (value["user_id"], value["address"], value["counter"]) == (user, CLIENT.address, "pair")
    assert row["lane"] == user % BUCKETS


async def test_a_logout_after_the_relay_stands_behind_its_own_login(make_node: MakeNode) -> None:
    node = await make_node()
    user = await node.register()
    session = await node.open(user)
    await node.until_relayed()
    await node.end(user, session)
    assert [row["type"] for row in await node.rows(user_id=user)][1:] == ["session.opened", "session.ended"]


# Revocations


async def test_a_tombstone_follows_its_record_and_spares_a_newer_one(make_node: MakeNode) -> None:
    node = await make_node()
    user, other = await node.register(), await node.register()
    for somebody in (user, other):
        await node.end(somebody, await node.open(somebody))
        await node.end_all(somebody)
    twice = await node.open(user, 2)
    await node.end(user, twice)
    assert await node.remembered.endings.enqueue_tombstones() == 0
    await node.database.fetch("UPDATE revocations SET announced_until = now() - interval '2 minutes'")
    # Newer endings under two of the keys.
    await node.end_all(user)
    await node.end(user, twice)
    while await node.remembered.endings.enqueue_tombstones():
        pass
    by_key: dict[str, list[bool]] = {}
    for row in await node.rows("revocations"):
        by_key.setdefault(row["message_key"], []).append(row["value"] is None)
    assert by_key.pop(f"user:{user}") == [False, False]
    assert by_key.pop(encode_base64url(twice.id)) == [False, False]
    assert list(by_key.values()) == [[False, True]] * 3
    assert len(await node.ended(user)) == 5  # the log itself is for longer


async def test_an_applied_ending_is_dead_at_once_though_nobody_waited(make_node: MakeNode) -> None:
    node = await make_node(max_active_sessions=1)
    user = await node.register()
    first = await node.open(user)
    await node.open(user)
    await node.until_relayed()

    async def is_applied() -> bool:
        return node.feed.head(user % BUCKETS) == 1

    await eventually(is_applied)
    assert not isinstance(await node.decided.sessions.inspect(await node.subject(user), first.id, 0), Live)


async def lock_a_pair(node: Node, user_id: int) -> None:
    """Fail as many logins as it takes, after the last lock."""
    for _ in range(node.settings.max_login_attempts):

        async def has_failed() -> bool:
            attempt = await node.throttle.reserve(CLIENT.address, f"{user_id}@example.org", user_id)
            if isinstance(attempt, Reserved):
                await node.throttle.settle(attempt, Outcome.FAILED)
            return isinstance(attempt, Reserved)

        await eventually(has_failed)


async def ids(node: Node) -> list[uuid.UUID]:
    """Of the events born in Redis."""
    return [row["event_id"] for row in await node.rows() if row["type"].startswith(("session.", "login."))]


async def has_length(node: Node, length: int) -> bool:
    return sum((await node.decided.streams.filled()).values()) == length


def first_of_each(rows: list[Any], kind: str) -> list[str]:
    """The sessions of the events of a kind, each where it came first."""
    return list(dict.fromkeys(json.loads(row["value"])["session_id"] for row in rows if row["type"] == kind))


def count(name: str, kind: str) -> float:
    return REGISTRY.get_sample_value(name, {"type": kind}) or 0.0


def count_locks() -> float:
    return count("authd_events_dropped_total", "login.locked")
