"""What becomes of a session, one request after the other; races are in test_session_races.py."""

import re
import secrets
import time
from functools import partial
from pathlib import Path

import msgspec
import pytest
from blockbuster import BlockBuster
from support.deployment import (
    CLIENT,
    EXPIRES,
    GRACE_S,
    LIVE,
    LOGGED,
    UNLOGGED,
    MakeWorld,
    World,
    answers,
    open_world,
    owner,
    together,
)
from support.waiting import eventually

from authd.config import BUCKETS
from authd.embedded import PostgresServer, RedisServer
from authd.errors import InvalidCredentials, SessionLimit, Unavailable, UnknownSession
from authd.infra.caller import Caller
from authd.sessions.redis import Denied, Opened
from authd.tokens.ring import MacKey

SMALL_GRACE_S = 0.05
KEY = re.compile(
    r"\{(\d+)\}:(user:\d+:\d+|applied|events|profile:\d+:\d+|throttle:(pair|account|address):[0-9a-f]{32})"
)


# One chain


async def test_a_refresh_makes_the_next_token_of_the_same_session(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    before, after = world.token(pair), world.token(await world.refresh(pair.refresh_token))
    assert after.counter == before.counter + 1
    assert (after.session_id, after.created_ms, after.epoch) == (before.session_id, before.created_ms, before.epoch)
    assert before.issued_ms <= after.issued_ms
    assert after.expires_ms == after.issued_ms + world.settings.refresh_ttl_s * 1000


async def test_within_the_grace_the_previous_token_gets_the_same_successor(world: World) -> None:
    user = await world.register()
    first = await world.login(user)
    second = await world.refresh(first.refresh_token)
    value = await world.values(user.id)
    for _ in range(3):
        again = await world.refresh(first.refresh_token)
        assert again.refresh_token == second.refresh_token
        assert await world.bearer(again.access_token) == "ok"
    assert await world.values(user.id) == value


async def test_the_grace_is_fixed_and_does_not_slide(make_world: MakeWorld) -> None:
    world = await make_world(refresh_grace_s=0.2)
    user = await world.register()
    first = await world.open(user)
    second = await world.refresh(first.refresh_token)
    over_ms = world.token(second).issued_ms + 200
    outcome, asked_ms = "ok", 0
    while outcome == "ok":
        asked_ms = await world.now_ms()
        outcome = await world.outcome(first.refresh_token)
        assert outcome == "ok" or await world.now_ms() > over_ms
    assert outcome == "refresh_token_reused"
    assert asked_ms <= over_ms + 5_000


async def test_a_tab_that_is_two_rotations_late_is_superseded_and_nothing_ends(world: World) -> None:
    user = await world.register()
    first = await world.login(user)
    second = await world.refresh(first.refresh_token)
    third = await world.refresh(second.refresh_token)
    value = await world.values(user.id)
    assert await world.outcome(first.refresh_token) == "refresh_token_superseded"
    assert await world.values(user.id) == value
    assert await world.bearer(third.access_token) == "ok"
    assert await world.outcome(third.refresh_token) == "ok"
    assert await world.rows(user.id) == []


async def test_a_clock_that_was_set_back_makes_no_long_grace_and_no_theft(world: World) -> None:
    """As if Redis's clock had been set back by an hour since the last rotation: what it stored is ahead of it."""
    user = await world.register()
    first = await world.login(user)
    second = await world.refresh(first.refresh_token)
    session_id, issued_ms = world.token(second).session_id, world.token(second).issued_ms
    ahead_ms = issued_ms + 3_600_000
    await world.change(user.id, session_id, issued=ahead_ms)
    value = await world.values(user.id)
    # How old it is nobody knows: it gets no successor, and it ends nothing.
    assert await world.outcome(first.refresh_token) == "refresh_token_superseded"
    assert await world.values(user.id) == value
    assert await world.rows(user.id) == []
    # The newest goes on, and from then on all is as ever.
    newest = msgspec.structs.replace(world.token(second), issued_ms=ahead_ms)
    third = await world.refresh(world.mint.make_refresh(newest))
    assert world.token(third).issued_ms < ahead_ms
    assert (await world.refresh(world.mint.make_refresh(newest))).refresh_token == third.refresh_token
    # What is older than it is a theft again, once the grace is over.
    await world.change(user.id, session_id, issued=issued_ms - 1000 * GRACE_S)
    assert await world.outcome(first.refresh_token) == "refresh_token_reused"


async def test_a_clock_that_is_slewed_by_less_than_a_second_is_no_step(world: World) -> None:
    user = await world.register()
    first = await world.login(user)
    second = await world.refresh(first.refresh_token)
    issued_ms = await world.now_ms() + 900
    await world.change(user.id, world.token(second).session_id, issued=issued_ms)
    again = world.token(await world.refresh(first.refresh_token))
    assert again == msgspec.structs.replace(world.token(second), issued_ms=issued_ms)


@pytest.mark.parametrize("age", [1, 2])
async def test_a_stolen_old_token_ends_the_session_in_that_call(make_world: MakeWorld, age: int) -> None:
    world = await make_world(refresh_grace_s=SMALL_GRACE_S)
    user = await world.register()
    pairs = [await world.open(user)]
    for _ in range(age):
        pairs.append(await world.refresh(pairs[-1].refresh_token))
    other = await world.open(user)
    await world.until_grace_is_over(pairs[-1])
    assert await world.outcome(pairs[0].refresh_token) == "refresh_token_reused"
    session_id = world.token(pairs[0]).session_id
    assert await world.rows(user.id) == [(session_id, None, "reused")]
    for pair in pairs:
        assert await world.bearer(pair.access_token) == "token_invalid"
        assert await world.outcome(pair.refresh_token) == "refresh_token_reused"
    # Asked again, it is one ending still, and the user's other session lives.
    assert await world.rows(user.id) == [(session_id, None, "reused")]
    assert await world.outcome(other.refresh_token) == "ok"


async def test_a_rotation_that_redis_lost_is_no_theft(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    saved = await world.values(user.id)
    for _ in range(3):
        pair = await world.refresh(pair.refresh_token)
    await world.raw.hset(world.hash_key(user.id), mapping=saved)
    following = await world.refresh(pair.refresh_token)
    assert world.token(following).counter == world.token(pair).counter + 1
    assert await world.outcome(following.refresh_token) == "ok"
    assert await world.rows(user.id) == []


async def test_a_rotation_that_redis_lost_does_not_expire_with_the_token_before_it(make_world: MakeWorld) -> None:
    world = await make_world(refresh_ttl_s=2)
    user = await world.register()
    first = await world.open(user)
    saved = await world.values(user.id)
    issued_ms = world.token(first).issued_ms
    await world.until_ms(issued_ms + 1000)
    second = await world.refresh(first.refresh_token)
    await world.open(user)  # so that the hash lives on
    await world.raw.hset(world.hash_key(user.id), mapping=saved)
    await world.until_ms(issued_ms + 2000)
    assert await world.outcome(first.refresh_token) == "refresh_token_expired"
    third = await world.refresh(second.refresh_token)
    assert world.token(third).counter == world.token(second).counter + 1


async def test_a_token_ahead_of_a_later_rotation_is_theft(make_world: MakeWorld) -> None:
    """Scenario 2: a thief's old token rotated the session that Redis lost, then the owner brings the newest."""
    world = await make_world(refresh_grace_s=SMALL_GRACE_S)
    user = await world.register()
    pairs = [await world.open(user)]
    for _ in range(3):
        pairs.append(await world.refresh(pairs[-1].refresh_token))
    await world.until_grace_is_over(pairs[-1])
    await world.wipe()
    stolen = await world.refresh(pairs[0].refresh_token)
    assert await world.outcome(pairs[-1].refresh_token) == "refresh_token_reused"
    assert await world.outcome(stolen.refresh_token) == "refresh_token_reused"
    assert [reason for _, _, reason in await world.rows(user.id)] == ["reused"]


async def test_the_successor_is_the_same_after_the_mac_key_changed(world: World) -> None:
    user = await world.register()
    first = await world.login(user)
    second = await world.refresh(first.refresh_token)
    old = world.ring.find_mac_key(1)
    signing = world.ring.signing_key("HS256", 0)
    assert old is not None
    world.ring.replace([signing], [old, MacKey(2, secrets.token_bytes(32), 1.0)])
    assert (await world.refresh(first.refresh_token)).refresh_token == second.refresh_token
    third = await world.refresh(second.refresh_token)
    assert (world.token(second).key_id, world.token(third).key_id) == (1, 2)
    assert (await world.refresh(second.refresh_token)).refresh_token == third.refresh_token


async def test_the_clocks_of_replicas_do_not_matter(world: World) -> None:
    user = await world.register()
    fast = await world.replica(clock=lambda: time.time() + 2)
    slow = await world.replica(clock=lambda: time.time() - 2)
    first = await fast.login(user)
    second = await slow.refresh(first.refresh_token)
    assert (await fast.refresh(first.refresh_token)).refresh_token == second.refresh_token
    assert await slow.bearer(second.access_token) == await fast.bearer(second.access_token) == "ok"
    now_ms = await world.now_ms()
    assert abs(now_ms - world.token(second).issued_ms) < 1_900


async def test_a_token_expires_by_rediss_clock_too(make_world: MakeWorld) -> None:
    world = await make_world(refresh_ttl_s=0.05)
    user = await world.register()
    pair = await world.open(user)
    expires_ms = (await world.store.list_live(user.subject, 0))[0].expires_ms
    slow = await world.replica(clock=lambda: 0.0)
    await world.until_ms(expires_ms)
    assert await slow.outcome(pair.refresh_token) == "refresh_token_expired"
    assert await world.outcome(pair.refresh_token) == "refresh_token_expired"
    assert await world.values(user.id) == {}
    assert await world.rows(user.id) == []


async def test_no_rotation_outlives_the_session(make_world: MakeWorld) -> None:
    world = await make_world(session_ttl_s=100, refresh_ttl_s=60)
    user = await world.register()
    pair = await world.login(user)
    session_id, created_ms = world.token(pair).session_id, world.token(pair).created_ms
    assert world.token(pair).expires_ms == created_ms + 60_000
    await world.change(user.id, session_id, created=created_ms - 70_000)
    token = world.token(await world.refresh(pair.refresh_token))
    assert token.expires_ms == created_ms + 30_000


async def test_counters_go_beyond_32_bits_and_ids_beyond_the_exact_doubles(world: World) -> None:
    await world.database.fetch(f"ALTER SEQUENCE users_id_seq RESTART WITH {2**53 + 1}")
    users = [await world.register() for _ in range(3)]
    assert [user.id for user in users] == [2**53 + 1, 2**53 + 2, 2**53 + 3]
    for user, counter in zip(users, (2**31 + 5, 2**32 + 5, 2**47 + 5), strict=True):
        pair = await world.login(user)
        await world.change(user.id, world.token(pair).session_id, counter=counter)
        crafted = msgspec.structs.replace(world.token(pair), counter=counter)
        for _ in range(2):
            text = world.mint.make_refresh(crafted)
            pair = await world.refresh(text)
            assert (await world.refresh(text)).refresh_token == pair.refresh_token
            assert world.token(pair).counter == crafted.counter + 1
            crafted = world.token(pair)
    assert [len(await world.live(user.id)) for user in users] == [1, 1, 1]
    await world.end_all(users[1])
    assert [len(await world.live(user.id)) for user in users] == [1, 0, 1]
    profile = await world.services.profiles.read((await world.login(users[2])).access_token)
    assert profile.user_id == 2**53 + 3


# The cap


async def test_the_eleventh_login_ends_the_oldest_session(world: World) -> None:
    user = await world.register()
    pairs = [await world.login(user) for _ in range(12)]
    created = sorted((world.token(pair).created_ms, world.token(pair).session_id) for pair in pairs)
    evicted = [session_id for _, session_id in created[:2]]
    assert sorted(await world.rows(user.id)) == sorted((session_id, None, "evicted") for session_id in evicted)
    for pair in pairs:
        is_evicted = world.token(pair).session_id in evicted
        assert await world.bearer(pair.access_token) == ("token_invalid" if is_evicted else "ok")
        assert await world.outcome(pair.refresh_token) == ("session_evicted" if is_evicted else "ok")


async def test_the_policy_refuse_answers_so_and_counts_no_failed_login(make_world: MakeWorld) -> None:
    world = await make_world(session_policy="refuse", max_active_sessions=2, max_login_attempts=3)
    user = await world.register()
    pairs = [await world.login(user) for _ in range(2)]
    for _ in range(5):
        with pytest.raises(SessionLimit):
            await world.login(user)
    await world.sessions.logout(pairs[0].access_token, "current")
    assert await world.bearer((await world.login(user)).access_token) == "ok"


async def test_the_policy_refuse_holds_for_a_session_that_redis_lost(make_world: MakeWorld) -> None:
    world = await make_world(session_policy="refuse", max_active_sessions=2)
    user = await world.register()
    lost = await world.login(user)
    await world.wipe()
    pairs = [await world.login(user) for _ in range(2)]
    with pytest.raises(SessionLimit):
        await world.refresh(lost.refresh_token)
    # It has not ended: when there is room it goes on.
    await world.sessions.logout(pairs[0].access_token, "current")
    assert await world.outcome(lost.refresh_token) == "ok"


async def test_an_expired_session_makes_room_and_nobody_is_evicted(world: World) -> None:
    user = await world.register()
    pairs = [await world.open(user) for _ in range(10)]
    now_ms = await world.now_ms()
    await world.change(user.id, world.token(pairs[7]).session_id, expires=now_ms - 1)
    pairs.append(await world.login(user))
    assert await world.rows(user.id) == []
    del pairs[7]
    assert {world.token(pair).session_id for pair in pairs} == (await world.live(user.id)).keys()
    assert [await world.outcome(pair.refresh_token) for pair in pairs] == ["ok"] * 10


async def test_a_rebuilt_session_older_than_a_full_set_is_the_one_refused(world: World) -> None:
    user = await world.register()
    old = await world.login(user)
    await world.until_ms(world.token(old).created_ms)
    await world.wipe()
    pairs = [await world.login(user) for _ in range(10)]
    assert await world.outcome(old.refresh_token) == "session_evicted"
    assert await world.rows(user.id) == [(world.token(old).session_id, None, "evicted")]
    assert [await world.outcome(pair.refresh_token) for pair in pairs] == ["ok"] * 10
    # Also when Redis loses that it refused it.
    await world.wipe()
    assert await world.outcome(old.refresh_token) == "session_evicted"


# Redis loses everything


async def test_after_a_wipe_every_device_refreshes_once_and_goes_on(world: World) -> None:
    user, other = await world.register(), await world.register()
    pairs = [await world.login(user) for _ in range(11)]
    gone = await world.login(other)
    await world.sessions.logout(gone.access_token, "all")
    kept = await world.login(other)
    revoked = await world.login(other)
    await world.sessions.logout(revoked.access_token, "current")
    evicted, *pairs = pairs
    await world.wipe()
    # An access token rebuilds nothing.
    for pair in (*pairs, kept):
        assert await world.bearer(pair.access_token) == "token_invalid"
    assert not await world.live(user.id)
    renewed = [await world.refresh(pair.refresh_token) for pair in pairs]
    for before, after in zip(pairs, renewed, strict=True):
        assert world.token(after).counter == world.token(before).counter + 1
        assert world.token(after).created_ms == world.token(before).created_ms
        assert await world.bearer(before.access_token) == await world.bearer(after.access_token) == "ok"
        # A lost reply is forgiven here, too.
        assert (await world.refresh(before.refresh_token)).refresh_token == after.refresh_token
    assert await world.outcome(kept.refresh_token) == "ok"
    # What had ended stays so.
    assert await world.outcome(evicted.refresh_token) == "session_evicted"
    assert await world.outcome(gone.refresh_token) == await world.outcome(revoked.refresh_token) == "session_ended"
    assert [await world.bearer(pair.access_token) for pair in (evicted, gone, revoked)] == ["token_invalid"] * 3


async def test_after_a_wipe_the_cap_holds_for_eleven_devices(make_world: MakeWorld) -> None:
    world = await make_world()
    user = await world.register()
    generous = await world.replica(max_active_sessions=11)
    pairs = [await generous.login(user) for _ in range(11)]
    await world.wipe()
    outcomes = [await world.outcome(pair.refresh_token) for pair in reversed(pairs)]
    assert outcomes == ["ok"] * 10 + ["session_evicted"]
    assert len(await world.live(user.id)) == 10
    await world.wipe()
    # Oldest first: the eleventh to come evicts the oldest that is back.
    outcomes = [await world.outcome(pair.refresh_token) for pair in pairs]
    assert outcomes == ["session_evicted"] + ["ok"] * 10
    assert len(await world.live(user.id)) == 10
    assert await world.rows(user.id) == [(world.token(pairs[0]).session_id, None, "evicted")]


async def test_a_session_that_is_here_is_not_rebuilt(world: World) -> None:
    user = await world.register()
    first = await world.login(user)
    second = await world.refresh(first.refresh_token)
    await world.refresh(second.refresh_token)
    before = await world.dump()
    # It would hand the newest token to whoever brings an old one.
    assert await world.store.rebuild(owner(user), world.token(first), 1, CLIENT, 0) == Denied("present")
    assert await world.dump() == before


async def test_a_rebuilt_session_evicts_the_oldest_and_logs_it(make_world: MakeWorld) -> None:
    world = await make_world(max_active_sessions=1)
    user = await world.register()
    old = await world.login(user)
    await world.until_ms(world.token(old).created_ms)
    generous = await world.replica(max_active_sessions=2)
    new = await generous.login(user)
    await world.raw.hdel(world.hash_key(user.id), world.token(new).session_id)
    assert await world.outcome(new.refresh_token) == "ok"
    assert await world.rows(user.id) == [(world.token(old).session_id, None, "evicted")]
    assert await world.outcome(old.refresh_token) == "session_evicted"


async def test_a_refused_rebuild_does_not_ask_postgres_again(world: World, postgres_server: PostgresServer) -> None:
    user = await world.register()
    pair = await world.login(user)
    await world.sessions.logout(pair.access_token, "current")
    await world.database.fetch("UPDATE revocations SET expires_at = now()")  # that Redis does not know it from the log
    for key in await world.keys():
        if not key.endswith("applied"):
            await world.raw.delete(key)
    assert await world.outcome(pair.refresh_token) == "session_ended"
    (marker,) = (await world.values(user.id)).values()
    assert marker[0] == LOGGED
    assert 0 < await world.raw.pttl(world.hash_key(user.id)) <= 60_000
    await postgres_server.pause()
    for _ in range(3):
        assert await world.outcome(pair.refresh_token) == "session_ended"
    await postgres_server.resume()


async def test_a_forged_access_token_brings_nothing_back(world: World) -> None:
    """Scenario 9: a service that holds the HS256 secret invents a session, or names one that Redis lost."""
    user = await world.register()
    lost = world.token(await world.login(user)).session_id
    await world.wipe()
    for session_id in (secrets.token_bytes(16), lost):
        assert await world.bearer(world.mint.make_access(user.subject, session_id, 1, "forged")) == "token_invalid"
    assert await world.keys() == []


async def test_the_tombstones_of_unlogged_endings_outlive_their_tokens(make_world: MakeWorld) -> None:
    world = await make_world(max_active_sessions=1)
    user = await world.register()
    store = world.store
    first, second = secrets.token_bytes(16), secrets.token_bytes(16)
    opened = await store.open(owner(user), first, 1, CLIENT, 0)
    assert isinstance(opened, Opened)
    evicting = await store.open(owner(user), second, 1, CLIENT, 0)
    assert isinstance(evicting, Opened) and evicting.evicted == [first]
    tombstone = (await world.values(user.id))[first]
    assert tombstone[0] == UNLOGGED
    assert int.from_bytes(tombstone[1:7], "big") == opened.session.expires_ms
    # Once the log has the row, Redis remembers it no longer than any request in flight takes.
    await world.feed.record(user.subject, [first], "evicted")
    await eventually(partial(_is_logged, world, user.id, first))
    tombstone = (await world.values(user.id))[first]
    assert int.from_bytes(tombstone[1:7], "big") < opened.session.expires_ms


async def _is_logged(world: World, user_id: int, session_id: bytes) -> bool:
    return (await world.values(user_id))[session_id][0] == LOGGED


# Parts that are away


async def test_while_postgres_is_away_a_refresh_works_and_an_unknown_session_waits(
    make_world: MakeWorld, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("authd.sessions.sessions.RECORD_WAIT_S", 0.1)
    world = await make_world(database_timeout_s=1.5, refresh_grace_s=SMALL_GRACE_S)
    user = await world.register()
    known, stolen, unknown = [await world.open(user) for _ in range(3)]
    await world.raw.hdel(world.hash_key(user.id), world.token(unknown).session_id)
    newer = await world.refresh(stolen.refresh_token)
    await world.until_grace_is_over(newer)
    await postgres_server.pause()
    known = await world.refresh(known.refresh_token)
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await world.refresh(unknown.refresh_token)
        assert caught.value.part == "user_store"
    # Theft ends the session at once; its row is written when Postgres is back.
    assert await world.outcome(stolen.refresh_token) == "refresh_token_reused"
    assert await world.bearer(newer.access_token) == "token_invalid"
    with pytest.raises(Unavailable):
        await world.login(user)
    with pytest.raises(Unavailable):
        await world.sessions.logout(known.access_token, "all")
    await postgres_server.resume()
    await eventually(partial(answers, world.database.ping))  # the breaker takes a moment to believe it
    assert (await world.until_rows(user.id, 1))[0] == (world.token(newer).session_id, None, "reused")

    async def is_back() -> bool:
        try:
            return await world.outcome(unknown.refresh_token) == "ok"
        except Unavailable:
            return False

    await eventually(is_back)


async def test_a_killed_postgres_is_found_again(make_world: MakeWorld, postgres_server: PostgresServer) -> None:
    world = await make_world(database_timeout_s=1.5)
    user = await world.register()
    pair = await world.login(user)
    await postgres_server.kill()
    pair = await world.refresh(pair.refresh_token)
    await world.wipe()
    with pytest.raises(Unavailable):
        await world.refresh(pair.refresh_token)
    await postgres_server.start()

    async def is_back() -> bool:
        try:
            return await world.outcome(pair.refresh_token) == "ok"
        except Unavailable:
            return False

    await eventually(is_back)


async def test_a_redis_that_wakes_after_the_clients_left_changes_nothing(
    database_url: str, no_blocking: BlockBuster, tmp_path: Path
) -> None:
    """Scenario 7. The abandoned scripts do run: they were sent."""
    async with (
        RedisServer(tmp_path, durable=False) as server,
        open_world(database_url, server.url, no_blocking, redis_timeout_s=1.5) as world,
    ):
        user, other = await world.register(), await world.register()
        pair, doomed, lost = await world.login(user), await world.login(other), await world.login(user)
        await world.end_all(await world.register())
        # Every script is loaded, every bucket's clock known, and a connection there for each call.
        pair = await world.refresh(pair.refresh_token)
        await world.store.bury(world.token(pair), "logout")
        await world.store.skip(user.id % BUCKETS, 0, 1)
        await together(*[world.redis.ping] * 20)
        await world.raw.hdel(world.hash_key(user.id), world.token(lost).session_id)
        before, ran_before = await world.dump(), await _scripts_run(world)
        calls = [
            partial(world.refresh, pair.refresh_token),
            partial(world.open, user),
            partial(world.store.rebuild, owner(user), world.token(lost), 1, CLIENT, 0),
            partial(world.store.bury, world.token(lost), "logout"),
            partial(world.store.skip, user.id % BUCKETS, 1, 9),
            partial(world.store.apply, user.subject, 1, 9, session_id=None, epoch=9, reason="logout"),
        ]
        await server.pause()
        for outcome in await together(*calls, partial(world.services.profiles.read, pair.access_token)):
            assert isinstance(outcome, Unavailable) and outcome.part == "session_store"
        # A logout that Postgres has stands, and is applied before the user is served.
        row = await world.endings.end_all(other.subject, "logout")
        assert row is not None
        with pytest.raises(Unavailable):
            await world.feed.wait_applied(row.bucket, row.number)
        await server.resume()

        async def have_run() -> bool:
            return await _scripts_run(world) >= ran_before + len(calls)

        await eventually(have_run)
        assert await world.dump() == before
        await eventually(partial(answers, world.redis.ping))  # the breaker takes a moment to believe it
        assert await world.outcome(doomed.refresh_token) == "session_ended"
        assert world.token(await world.refresh(pair.refresh_token)).counter == world.token(pair).counter + 1


async def _scripts_run(world: World) -> int:
    stats = (await world.raw.info("commandstats"))["cmdstat_evalsha"]
    return int(stats["calls"] - stats["failed_calls"])


async def test_a_redis_that_comes_back_empty_serves_at_once(
    database_url: str, no_blocking: BlockBuster, tmp_path: Path
) -> None:
    async with (
        RedisServer(tmp_path, durable=False) as server,
        open_world(database_url, server.url, no_blocking) as world,
    ):
        user = await world.register()
        pair, revoked = await world.login(user), await world.login(user)
        await world.sessions.logout(revoked.access_token, "current")
        await server.kill()
        with pytest.raises(Unavailable):
            await world.refresh(pair.refresh_token)
        await server.start()
        assert await world.outcome(revoked.refresh_token) == "session_ended"
        assert await world.outcome(pair.refresh_token) == "ok"
        await world.raw.script_flush()
        await world.raw.flushall()
        assert await world.outcome(revoked.refresh_token) == "session_ended"
        assert await world.outcome(pair.refresh_token) == "ok"


async def test_forgotten_scripts_are_loaded_again(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    for _ in range(3):
        await world.raw.script_flush()
        pair = await world.refresh(pair.refresh_token)
        await world.raw.script_flush()
        assert await world.bearer(pair.access_token) == "ok"
        await world.raw.script_flush()
        await world.sessions.logout((await world.login(user)).access_token, "current")


# The user


async def test_a_disabled_user_is_out_at_once_and_an_enabled_one_logs_in_anew(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    assert await world.bearer(pair.access_token) == "ok"
    await world.set_disabled(user, "user_disabled")
    for _ in range(2):
        assert await world.bearer(pair.access_token) == "token_invalid"
        assert await world.outcome(pair.refresh_token) == "user_disabled"
        with pytest.raises(InvalidCredentials):
            await world.login(user)
        await world.wipe()
    await world.set_disabled(user, "user_enabled")
    assert await world.outcome(pair.refresh_token) == "session_ended"
    assert await world.bearer((await world.login(user)).access_token) == "ok"


async def test_a_user_who_is_gone_is_refused_as_disabled(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    await world.database.fetch("DELETE FROM users WHERE id = $1", user.id)
    await world.wipe()
    assert await world.outcome(pair.refresh_token) == "user_disabled"
    assert await world.bearer(pair.access_token) == "token_invalid"
    with pytest.raises(InvalidCredentials):
        await world.login(user)


async def test_the_profile_comes_from_the_cache_while_postgres_is_away(
    make_world: MakeWorld, postgres_server: PostgresServer
) -> None:
    world = await make_world(database_timeout_s=1.5)
    user, stranger = await world.register(), await world.register()
    pair, unread = await world.login(user), await world.login(stranger)
    profile = await world.services.profiles.read(pair.access_token)
    assert (profile.user_id, profile.username, profile.full_name) == (user.id, user.username, "Some Body")
    await postgres_server.pause()
    assert await world.services.profiles.read(pair.access_token) == profile
    assert await world.bearer(unread.access_token) == "user_store_unavailable"
    await postgres_server.resume()

    async def is_back() -> bool:
        return await world.bearer(unread.access_token) == "ok"

    await eventually(is_back)


async def test_a_reader_with_the_old_row_cannot_store_it_after_the_change(world: World) -> None:
    """Scenario 21."""
    user = await world.register()
    await world.login(user)
    await world.set_disabled(user, "user_disabled")
    await world.set_disabled(user, "user_enabled")
    session_id = world.token(await world.login(user)).session_id

    async def cached() -> bytes:
        live = await world.store.inspect(user.subject, session_id, 0)
        assert not isinstance(live, Denied)
        return live.user_json

    # The change announced version 3, so the rows before it come too late.
    for version, text, expected in ((2, b"two", b""), (3, b"three", b"three"), (2, b"two", b"three")):
        await world.cache.store(user.subject, version, text)
        assert await cached() == expected
    await world.end_all(user)
    await world.cache.store(user.subject, 3, b"three")
    session_id = world.token(await world.login(user)).session_id
    assert await cached() == b""


# Sessions that a user sees


async def test_a_user_sees_and_ends_single_sessions(world: World) -> None:
    user, stranger = await world.register(), await world.register()
    phone = await world.login(user, caller=Caller("2001:db8::7", "a phone"))
    laptop = await world.login(user)
    theirs = (await world.sessions.list_own((await world.login(stranger)).access_token))[0]
    views = await world.sessions.list_own(laptop.access_token)
    assert [(v.address, v.user_agent, v.current) for v in views] == [
        ("2001:db8::7", "a phone", False),
        (CLIENT.address, CLIENT.user_agent, True),
    ]
    with pytest.raises(UnknownSession):
        await world.sessions.end(laptop.access_token, theirs.id)
    await world.sessions.end(laptop.access_token, views[0].id)
    assert await world.bearer(phone.access_token) == "token_invalid"
    assert await world.outcome(phone.refresh_token) == "session_ended"
    assert await world.rows(user.id) == [(world.token(phone).session_id, None, "logout")]
    others = [await world.login(user) for _ in range(3)]
    await world.sessions.logout(laptop.access_token, "others")
    assert [await world.bearer(pair.access_token) for pair in (laptop, *others)] == ["ok"] + ["token_invalid"] * 3
    await world.sessions.logout(laptop.access_token, "current")
    assert await world.bearer(laptop.access_token) == "token_invalid"


# What is in Redis


async def test_every_key_has_a_known_name_and_expires_but_the_applied_marks(make_world: MakeWorld) -> None:
    world = await make_world(max_active_sessions=2, refresh_grace_s=SMALL_GRACE_S)
    users = [await world.register() for _ in range(4)]
    pairs = [await world.login(user) for user in users]
    for user in users:
        await world.login(user)
        await world.login(user)
    for pair in pairs:
        await world.bearer(pair.access_token)
        assert await world.outcome(pair.refresh_token) == "session_evicted"
    with pytest.raises(InvalidCredentials):
        await world.login(users[0], "wrong")
    await world.end_all(users[0])
    await world.set_disabled(users[1], "user_disabled")
    stolen = await world.login(users[2])
    await world.until_grace_is_over(await world.refresh(stolen.refresh_token))
    assert await world.outcome(stolen.refresh_token) == "refresh_token_reused"
    await world.raw.delete(world.hash_key(users[3].id))
    await world.database.fetch("UPDATE users SET epoch = epoch + 1 WHERE id = $1", users[3].id)
    assert await world.outcome(pairs[3].refresh_token) == "session_evicted"
    prefix = f"authd:{world.settings.deployment}:"
    for key, (value, expires_ms) in (await world.dump()).items():
        found = KEY.fullmatch(key.removeprefix(prefix))
        assert found, key
        assert (expires_ms == -1) == key.endswith((":applied", ":events")), key
        if found[2].startswith("user:"):
            assert int(found[2].split(":")[1]) % BUCKETS == int(found[1])
            assert isinstance(value, dict)
            # The key lives as long as the longest-lived of its values.
            lives = [
                int.from_bytes(v[EXPIRES] if v[0] == LIVE else v[1:7], "big") for k, v in value.items() if k != b"e"
            ]
            assert expires_ms >= max(lives, default=0)
    assert any(":throttle:" in key for key in await world.keys())


async def test_a_users_hash_lives_as_long_as_the_longest_lived_of_its_values(world: World) -> None:
    user = await world.register()
    short = await world.replica(refresh_ttl_s=60)

    async def expires_ms() -> int:
        return int(await world.raw.pexpiretime(world.hash_key(user.id)))

    first = await short.open(user)
    assert await expires_ms() == world.token(first).expires_ms
    first = await short.refresh(first.refresh_token)
    assert await expires_ms() == world.token(first).expires_ms
    long = await world.open(user)
    assert await expires_ms() == world.token(long).expires_ms
    await short.refresh(first.refresh_token)
    assert await expires_ms() == world.token(long).expires_ms
    await world.wipe()
    long = await world.refresh(long.refresh_token)
    assert await expires_ms() == world.token(long).expires_ms
    await world.wipe()
    await world.store.bury(world.token(long), "logout")
    assert 0 < await expires_ms() <= await world.now_ms() + 60_000
    await world.sessions.end_logged(user.subject, [bytes(16)], "logout")
    assert await world.now_ms() + 60_000 < await expires_ms() <= await world.now_ms() + 600_000


async def test_a_session_is_small(world: World) -> None:
    user = await world.register()
    await world.open(user, Caller("2001:db8::1", "x" * 64))
    (value,) = (await world.values(user.id)).values()
    assert len(value) <= 128


async def test_a_token_of_another_deployment_finds_nothing(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    other = await world.replica(deployment="t-another")
    assert await other.bearer(pair.access_token) == "token_invalid"


async def test_a_revocation_that_is_asked_for_again_answers_when_redis_has_it(world: World) -> None:
    """The first answer was a 503: Postgres had the row, and Redis was away."""
    user = await world.register()
    pair = await world.login(user)
    other = await world.replica()
    await world.endings.end_sessions(user.subject, [world.token(pair).session_id], "logout")
    await world.sessions.end_of_token(world.token(pair), "revoked")
    assert await world.applied(user.id) == 1
    assert await other.bearer(pair.access_token) == "token_invalid"
    assert [reason for _, _, reason in await world.rows(user.id)] == ["logout"]
