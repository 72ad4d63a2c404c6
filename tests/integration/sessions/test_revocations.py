import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from support.deployment import CLIENT, LOGGED, MakeWorld, ScriptCall, World, owner, together
from support.waiting import eventually

from authd.config import BUCKETS
from authd.embedded import PostgresServer
from authd.errors import Unavailable
from authd.infra.subject import Subject
from authd.sessions.postgres import CATCH_UP_ROWS
from authd.sessions.redis import Behind
from authd.tokens.access import SESSION_ID_BYTES
from authd.users.postgres import User

# Redis goes back in time


async def test_every_script_answers_behind_to_who_knows_more(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    lost = await world.login(user)
    await world.sessions.logout(pair.access_token, "current")
    head = (await world.revocations.heads())[user.id % BUCKETS]
    assert head == await world.applied(user.id) == 1
    token, store = world.token(lost), world.store
    before = await world.dump()
    asks: list[Callable[[int], Awaitable[object]]] = [
        partial(store.open, owner(user), secrets.token_bytes(SESSION_ID_BYTES), 1, CLIENT),
        partial(store.rebuild, owner(user), token, 1, CLIENT),
        partial(store.rotate, token, 1, CLIENT),
        partial(store.inspect, user.subject, token.session_id),
        partial(store.list_live, user.subject),
    ]
    for ask in asks:
        with pytest.raises(Behind) as caught:
            await ask(head + 1)
        assert caught.value.applied == head
    assert await world.dump() == before


@pytest.mark.parametrize("scope", ["current", "all"])
@pytest.mark.parametrize("mark", ["older", "gone"])
async def test_a_failover_that_loses_a_logout_revives_nobody(world: World, scope: str, mark: str) -> None:
    """Scenario 3: also for a replica that was told nothing but the heads."""
    user = await world.register()
    await world.sessions.end_logged(user.subject, [secrets.token_bytes(SESSION_ID_BYTES)], "logout")
    pair = await world.login(user)
    await world.bearer(pair.access_token)
    saved = await world.raw.hgetall(world.hash_key(user.id))
    other = await world.replica()
    await world.sessions.logout(pair.access_token, scope)
    other.feed.learn(user.id % BUCKETS, 2)

    async def fail_over() -> None:
        await world.raw.delete(world.hash_key(user.id), world.applied_key(user.id))
        await world.raw.hset(world.hash_key(user.id), mapping=saved)
        if mark == "older":
            await world.raw.set(world.applied_key(user.id), 1)

    for replica in (world, other):
        await fail_over()
        assert await replica.outcome(pair.refresh_token) == "session_ended"
        assert await world.applied(user.id) == 2
        await fail_over()
        assert await replica.bearer(pair.access_token) == "token_invalid"
        assert await world.live(user.id) == {}
        await fail_over()
        assert await replica.bearer((await replica.login(user)).access_token) == "ok"
        assert await replica.outcome(pair.refresh_token) == "session_ended"
    assert len(await world.rows(user.id)) == 2


async def test_a_replica_learns_the_heads_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("authd.sessions.feed.HEADS_INTERVAL_S", 0.01)
    user = await world.register()
    other = await world.replica()
    row = await world.endings.end_all(user.subject, "logout")
    assert row is not None

    async def is_known() -> bool:
        return other.feed.head(row.bucket) == row.number

    await eventually(is_known)
    later = await world.replica()
    assert later.feed.head(row.bucket) == row.number
    # Known, not applied: whoever asks next applies it.
    assert await world.applied(user.id) == 0
    await other.open(await world.find(user))
    assert await world.applied(user.id) == 1


async def test_an_ended_epoch_leaves_the_sessions_of_the_next_one(world: World) -> None:
    user = await world.register()
    old = await world.login(user)
    await world.end_all(user)
    new = await world.login(user)
    # Redis forgets that it applied the row, and applies it again.
    await world.raw.delete(world.applied_key(user.id))
    assert await world.outcome(old.refresh_token) == "session_ended"
    assert await world.applied(user.id) == 1
    assert await world.bearer(new.access_token) == "ok"
    assert await world.outcome(new.refresh_token) == "ok"


# The log


async def test_numbers_have_no_gaps_whatever_is_rolled_back(world: World) -> None:
    dice = random.Random(1)

    async def end() -> None:
        bucket = dice.choice([1, 2])
        async with world.database.transaction() as connection:
            await connection.execute(
                "WITH head AS (UPDATE revocation_heads SET last_number = last_number + 1 WHERE bucket = $1"
                " RETURNING last_number) INSERT INTO revocations"
                " (bucket, number, user_id, incarnation, epoch, reason, expires_at)"
                " SELECT $1, last_number, 1, 1, 1, 'logout', now() FROM head",
                bucket,
            )
            if dice.random() < 0.3:
                raise Unavailable("user_store")

    async def end_logged() -> None:
        bucket = dice.choice([1, 2])
        ids = [secrets.token_bytes(SESSION_ID_BYTES) for _ in range(dice.choice([1, 3]))]
        await world.endings.end_sessions(Subject(bucket, 1), ids, "logout")

    await together(*[dice.choice([end, end_logged]) for _ in range(100)])
    heads = await world.revocations.heads()
    for bucket in (1, 2):
        rows = await world.database.fetch("SELECT number FROM revocations WHERE bucket = $1 ORDER BY 1", bucket)
        assert [row["number"] for row in rows] == list(range(1, heads[bucket] + 1))


async def test_rows_that_expired_are_passed_over(world: World) -> None:
    user = await world.register()
    pair, dead = await world.login(user), await world.login(user)
    for _ in range(3):
        await world.sessions.end_logged(user.subject, [secrets.token_bytes(SESSION_ID_BYTES)], "logout")
    await world.database.fetch("UPDATE revocations SET expires_at = now() - interval '1 second'")
    assert await world.revocations.delete_expired() == 3
    assert await world.revocations.delete_expired() == 0
    await world.wipe()
    assert await world.outcome(pair.refresh_token) == "ok"
    assert await world.applied(user.id) == 3
    # Rows after, between and before expired ones.
    await world.sessions.end_logged(user.subject, [world.token(dead).session_id], "logout")
    await world.sessions.end_logged(user.subject, [secrets.token_bytes(SESSION_ID_BYTES)], "logout")
    await world.database.fetch("DELETE FROM revocations WHERE number = 5")
    await world.wipe()
    assert await world.outcome(dead.refresh_token) == "session_ended"
    assert await world.applied(user.id) == 5
    await world.raw.set(world.applied_key(user.id), 4)
    assert await world.outcome(dead.refresh_token) == "session_ended"
    assert await world.applied(user.id) == 5


async def test_two_replicas_apply_a_large_log_once_and_in_order(world: World, script_calls: list[ScriptCall]) -> None:
    count = 2 * CATCH_UP_ROWS + 50
    user = await world.register()
    bucket = user.id % BUCKETS
    pair, dead = await world.login(user), await world.login(user)
    other = await world.replica()
    async with world.database.transaction() as connection:
        await connection.execute(
            "INSERT INTO revocations (bucket, number, user_id, incarnation, session_id, reason, expires_at)"
            " SELECT $1, n, $2, $5, CASE n WHEN 7 THEN $3 ELSE substring(sha256(n::text::bytea), 1, 16) END, 'logout',"
            " now() + interval '1 day' FROM generate_series(1, $4::integer) n",
            bucket,
            user.id,
            world.token(dead).session_id,
            count,
            user.incarnation,
        )
        await connection.execute("UPDATE revocation_heads SET last_number = $2 WHERE bucket = $1", bucket, count)
    await world.wipe()
    script_calls.clear()
    applied_before = REGISTRY.get_sample_value("authd_revocations_applied_total") or 0.0
    for replica in (world, other):
        replica.feed.learn(bucket, count)
    replies = await together(*[partial(r.outcome, pair.refresh_token) for r in (world, other) for _ in range(5)])
    assert replies == ["ok"] * 10
    applied = [call for call in script_calls if call.status == "applied"]
    # Each row came after the one before it, and none twice.
    steps = sorted((int(call.arguments[1]), int(call.arguments[2])) for call in applied)
    assert steps == [(number - 1, number) for number in range(1, count + 1)]
    assert REGISTRY.get_sample_value("authd_revocations_applied_total") == applied_before + count
    assert await world.applied(user.id) == count
    assert await world.outcome(dead.refresh_token) == "session_ended"
    assert len(await world.live(user.id)) == 1


async def test_a_log_that_lost_rows_is_not_asked_for_them_without_end(world: World) -> None:
    """Postgres came back from an older backup while this replica ran."""
    user = await world.register()
    pair = await world.login(user)
    world.feed.learn(user.id % BUCKETS, 100)
    with anyio.fail_after(5), pytest.raises(Unavailable):
        await world.refresh(pair.refresh_token)


# Who waits, and who leaves


async def test_a_client_that_hangs_up_after_the_commit_stops_nothing(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    row = await world.endings.end_all(user.subject, "logout")
    assert row is not None
    with anyio.CancelScope() as request:
        request.cancel()
        await world.feed.wait_applied(row.bucket, row.number)
    assert request.cancelled_caught

    async def is_applied() -> bool:
        return await world.applied(user.id) == row.number

    await eventually(is_applied)
    assert await world.outcome(pair.refresh_token) == "session_ended"


async def test_many_logouts_at_once_are_all_applied_when_they_return(world: World) -> None:
    users = [await world.register() for _ in range(30)]
    other = await world.replica()
    pairs = {user.id: await world.open(user) for user in users}

    async def logout(user: User, replica: object) -> None:
        assert replica in (world, other)
        await (other if replica is other else world).sessions.logout(pairs[user.id].access_token, "all")
        assert await world.live(user.id) == {}
        assert await world.bearer(pairs[user.id].access_token) == "token_invalid"

    results = await together(*[partial(logout, user, (world, other)[user.id % 2]) for user in users])
    assert results == [None] * len(users)
    # One at a time in a bucket: its head is a lock.
    heads = await world.revocations.heads()
    assert heads == dict(Counter(user.id % BUCKETS for user in users))


async def test_an_ending_that_redis_decided_is_logged_although_nobody_waits(
    make_world: MakeWorld, postgres_server: PostgresServer
) -> None:
    world = await make_world(database_timeout_s=1.5)
    user = await world.register()
    ids = [secrets.token_bytes(SESSION_ID_BYTES) for _ in range(20)]
    await postgres_server.pause()
    with anyio.move_on_after(0.3) as request:
        await world.feed.record(user.subject, ids, "evicted")
    assert request.cancelled_caught
    await postgres_server.resume()
    rows = await world.until_rows(user.id, len(ids))
    assert sorted(rows) == sorted((id_, None, "evicted") for id_ in ids)

    async def is_applied() -> bool:
        values = await world.values(user.id)
        return len(values) == len(ids) and {value[0] for value in values.values()} == {LOGGED}

    await eventually(is_applied)


async def test_every_task_that_postgres_did_not_answer_is_counted(
    make_world: MakeWorld, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEADS_INTERVAL_S", "JANITOR_INTERVAL_S"):
        monkeypatch.setattr(f"authd.sessions.feed.{name}", 0.01)
    world = await make_world(database_timeout_s=1.5)
    user = await world.register()
    events = {"revocation_not_logged", "revocations_not_applied", "revocation_heads_unknown", "revocations_not_cleaned"}
    with capture_logs() as logged:
        before = times_away()
        await postgres_server.pause()
        try:
            with anyio.move_on_after(0.1):
                await world.feed.record(user.subject, [secrets.token_bytes(SESSION_ID_BYTES)], "evicted")
            with pytest.raises(Unavailable):
                await world.feed.wait_applied(user.id % BUCKETS, 1)

            async def has_logged_all() -> bool:
                return events <= {line["event"] for line in logged}

            await eventually(has_logged_all)
            assert times_away() - before == sum(line["event"] in events for line in logged)
        finally:
            await postgres_server.resume()


def times_away() -> float:
    return REGISTRY.get_sample_value("authd_unavailable_total", {"part": "user_store"}) or 0.0


async def test_a_redis_that_is_ahead_of_a_restored_postgres_misses_no_ending(make_world: MakeWorld) -> None:
    world = await make_world()
    user = await world.register()
    pair = await world.open(user)
    bucket = user.id % BUCKETS
    await world.raw.set(world.redis.key(bucket, "applied"), 100)
    await world.sessions.logout(pair.access_token, "all")
    assert await world.bearer(pair.access_token) == "token_invalid"
    assert await world.outcome(pair.refresh_token) == "session_ended"
    assert int(await world.raw.get(world.redis.key(bucket, "applied"))) == 1


async def test_a_log_that_lost_commits_is_noticed_before_its_numbers_come_again(world: World) -> None:
    """Postgres failed over to a standby that had not heard of the newest row."""
    user = await world.register()
    pairs = [await world.open(user) for _ in range(3)]
    bucket = user.id % BUCKETS
    for pair in pairs[:2]:
        await world.sessions.logout(pair.access_token, "current")
    assert await world.applied(user.id) == 2
    async with world.database.transaction() as connection:
        await connection.execute("DELETE FROM revocations WHERE bucket = $1 AND number = 2", bucket)
        await connection.execute("UPDATE revocation_heads SET last_number = 1 WHERE bucket = $1", bucket)

    async def has_begun_again() -> bool:
        return await world.applied(user.id) == 1

    await eventually(has_begun_again)
    await world.sessions.logout(pairs[2].access_token, "current")  # it is number 2 again
    assert await world.bearer(pairs[2].access_token) == "token_invalid"
    assert await world.outcome(pairs[2].refresh_token) == "session_ended"
