"""A user whose row is gone, whoever deleted it and however, and an id that comes again."""

from datetime import timedelta
from functools import partial

import asyncpg
import pytest
from support.deployment import CLIENT, Replica, World, owner, together
from support.relaying import make_settings, open_node
from support.waiting import eventually

from authd.config import BUCKETS
from authd.errors import InvalidAccessToken, UnknownSession
from authd.oauth.introspection import TokenDesk
from authd.sessions.redis import Opened
from authd.sessions.sessions import TokenPair
from authd.users.postgres import User


async def delete(world: World, *users: User) -> None:
    await world.database.fetch("DELETE FROM users WHERE id = ANY ($1::bigint[])", [user.id for user in users])


async def until_out(replica: Replica, pair: TokenPair) -> None:
    """Until the replica has heard of the last row of the log, which it looks for every second."""
    token = replica.token(pair)

    async def has_heard() -> bool:
        bucket = token.user_id % BUCKETS
        return replica.feed.head(bucket) == (await replica.revocations.heads()).get(bucket)

    await eventually(has_heard)
    assert await replica.bearer(pair.access_token) == "token_invalid"


async def test_a_deletion_is_a_row_of_the_log_in_the_same_transaction(world: World) -> None:
    users = [await world.register() for _ in range(3)]
    await world.end_all(users[0])
    with pytest.raises(asyncpg.RaiseError):
        async with world.database.transaction() as connection:
            await connection.execute("DELETE FROM users")
            await connection.execute("DO $$ BEGIN RAISE 'no'; END $$")
    assert [len(await world.rows(user.id)) for user in users] == [1, 0, 0]
    await delete(world, *users)
    assert [(await world.rows(user.id))[-1] for user in users] == [
        (None, 3, "user_deleted"),  # above the epoch of the ending before
        (None, 2, "user_deleted"),
        (None, 2, "user_deleted"),
    ]
    rows = await world.database.fetch("SELECT * FROM revocations WHERE reason = 'user_deleted' ORDER BY user_id")
    assert [(row["bucket"], row["incarnation"]) for row in rows] == [(u.id % BUCKETS, u.incarnation) for u in users]
    # As long as any session may live.
    assert all(row["expires_at"] - row["ended_at"] == timedelta(days=366) for row in rows)
    heads = await world.revocations.heads()
    assert [heads[user.id % BUCKETS] for user in users] == [2, 1, 1]


async def test_a_deletion_and_logouts_in_one_bucket_leave_no_gap(world: World) -> None:
    await world.database.fetch("ALTER SEQUENCE users_id_seq INCREMENT BY 256")
    users = [await world.register() for _ in range(20)]
    calls = [partial(delete, world, user) for user in users[:10]]
    calls += [partial(world.endings.end_all, user.subject, "logout") for user in users]
    await together(*calls)
    (bucket,) = await world.revocations.heads()
    rows = await world.database.fetch("SELECT number FROM revocations WHERE bucket = $1 ORDER BY 1", bucket)
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 20


async def test_a_deleted_user_is_out_at_every_replica(world: World) -> None:
    user = await world.register()
    other = await world.replica()
    here, there = await world.login(user), await other.login(user)
    for replica, pair in ((world, here), (other, there)):
        assert await replica.bearer(pair.access_token) == "ok"  # cached from now on
    await delete(world, user)
    for replica, pair in ((other, here), (world, there)):
        await until_out(replica, pair)
        assert await replica.outcome(pair.refresh_token) == "user_disabled"
        assert await replica.outcome(here.refresh_token) == "user_disabled"
        with pytest.raises(InvalidAccessToken):
            await replica.sessions.list_own(pair.access_token)
    assert await world.live(user.id) == {}
    # Nor after Redis forgot it, nor when it is what it was before.
    await world.wipe()
    assert await world.outcome(here.refresh_token) == "user_disabled"
    assert await other.bearer(there.access_token) == "token_invalid"


async def test_a_redis_that_went_back_before_a_deletion_revives_nobody(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    saved = await world.raw.hgetall(world.hash_key(user.id))
    await delete(world, user)
    await until_out(world, pair)
    await world.raw.delete(world.hash_key(user.id), world.applied_key(user.id))
    await world.raw.hset(world.hash_key(user.id), mapping=saved)
    assert await world.outcome(pair.refresh_token) == "user_disabled"
    assert await world.live(user.id) == {}


@pytest.mark.parametrize("scope", ["current", "others", "all"])
@pytest.mark.parametrize("logged", [True, False])
async def test_a_logout_of_a_user_who_is_gone_ends_what_it_was_asked_to(world: World, scope: str, logged: bool) -> None:
    """Also where the deletion is in no log: its trigger was off, or a restored backup lacks the user."""
    user = await world.register()
    pair, other = await world.login(user), await world.login(user)
    if not logged:
        await world.database.fetch("ALTER TABLE users DISABLE TRIGGER user_deleted")
    await delete(world, user)
    await together(partial(world.sessions.logout, pair.access_token, scope))
    ended = [pair, other] if logged or scope == "all" else [pair] if scope == "current" else [other]
    for each in (pair, other):
        if each in ended:
            await until_out(world, each)
            assert await world.outcome(each.refresh_token) in ("user_disabled", "session_ended")
        else:
            assert world.token(each).session_id in await world.live(user.id)


async def test_an_id_given_twice_whose_first_user_left_no_trace_shows_nothing_of_the_second(world: World) -> None:
    """As after a failover to a standby that lacked the registration: nobody was told, and Redis has her session."""
    ada = await world.register()
    hers = await world.login(ada)
    await world.database.fetch("ALTER TABLE users DISABLE TRIGGER user_deleted")
    await delete(world, ada)
    await world.database.fetch(f"ALTER SEQUENCE users_id_seq RESTART WITH {ada.id}")
    bob = await world.register()
    his = await world.login(bob)
    assert bob.id == ada.id
    hers = await world.refresh(hers.refresh_token)
    assert world.token(hers).subject == ada.subject != bob.subject
    assert await world.bearer(hers.access_token) == "token_invalid"  # Postgres knows nobody of that incarnation
    assert len(await world.sessions.list_own(hers.access_token)) == 1
    with pytest.raises(UnknownSession):
        await world.sessions.end(hers.access_token, (await world.sessions.list_own(his.access_token))[0].id)
    await world.sessions.logout(hers.access_token, "all")
    assert await world.outcome(hers.refresh_token) == "session_ended"
    # His is untouched, and alone.
    assert len(await world.sessions.list_own(his.access_token)) == 1
    assert await world.bearer(his.access_token) == "ok"
    assert await world.outcome(his.refresh_token) == "ok"


async def test_a_service_can_revoke_the_session_of_a_user_who_is_gone(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    await world.database.fetch("ALTER TABLE users DISABLE TRIGGER user_deleted")
    await delete(world, user)
    desk = TokenDesk(world.mint, world.sessions)
    for _ in range(3):
        await desk.revoke(pair.refresh_token)
    assert await world.bearer(pair.access_token) == "token_invalid"
    assert await world.rows(user.id) == [(world.token(pair).session_id, None, "revoked")]


async def test_a_login_that_races_the_deletion_ends_with_it(world: World) -> None:
    """The password was right while the user was there; the row of the log comes after the session."""
    user = await world.register()
    await delete(world, user)
    opened = await world.store.open(owner(user), bytes(16), 1, CLIENT, user.revocation)
    assert isinstance(opened, Opened)
    pair = world.sessions._pair(user.subject, opened.session)
    await until_out(world, pair)
    assert await world.outcome(pair.refresh_token) == "user_disabled"


async def test_an_announced_ending_of_a_user_who_is_gone_gets_its_tombstone_and_goes(
    database_url: str, redis_url: str, no_blocking: object
) -> None:
    settings = make_settings(database_url, redis_url)
    async with open_node(settings, no_blocking, relays=False) as node:  # type: ignore[arg-type]
        gone, there = await node.register(), await node.register()
        for user in (gone, there):
            await node.end(user, await node.open(user))
            await node.end_all(user)
        await node.database.fetch("DELETE FROM users WHERE id = $1", gone)
        await node.database.fetch("UPDATE revocations SET announced_until = now() - interval '2 minutes'")
        while await node.remembered.endings.enqueue_tombstones():
            pass
        for user in (gone, there):
            records = await node.rows("revocations", user)
            assert [row["value"] is None for row in records] == [False, False, True, True]
            assert {row["message_key"] for row in records[2:]} == {row["message_key"] for row in records[:2]}
        await node.database.fetch("UPDATE revocations SET expires_at = now() - interval '1 minute'")
        assert await node.remembered.revocations.delete_expired() == 5


async def test_each_row_has_an_incarnation_of_its_own(world: World) -> None:
    users = [await world.register() for _ in range(50)]
    drawn = {user.incarnation for user in users}
    assert len(drawn) == len(users)
    # Of all 32 bits: some have the highest, some have not.
    assert {incarnation >> 31 for incarnation in drawn} == {0, 1}
    with pytest.raises(asyncpg.CheckViolationError):
        await world.database.fetch("UPDATE users SET incarnation = 0")
