"""Many requests at once. Invariants are counted, and times are Redis's, never the test's."""

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import anyio
import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from support.deployment import PASSWORD, MakeWorld, Replica, ScriptCall, World, heard, together
from support.waiting import eventually

from authd.errors import InvalidCredentials, Refusal, Unavailable
from authd.passwords.formats import hash_password
from authd.sessions.sessions import TokenPair
from authd.users.postgres import User

#: A user's rounds follow one another; so many users play at once.
LANES = 20
SEED = 20_260_101


def rounds(world: World, count: int) -> int:
    """A cluster shows no more in a fifth of the rounds than in all of them."""
    return count // 5 if world.is_cluster else count


# Refreshes of one token


async def test_two_hundred_refreshes_of_one_token_make_one_chain(world: World) -> None:
    user = await world.register()
    pair = await world.login(user)
    other = await world.replica()
    replies = await together(*[partial(r.refresh, pair.refresh_token) for r in (world, other) for _ in range(100)])
    assert all(isinstance(reply, TokenPair) for reply in replies), Counter(map(repr, replies))
    assert len({reply.refresh_token for reply in replies}) == 1
    assert world.token(replies[0]).counter == world.token(pair).counter + 1
    session_id = world.token(pair).session_id
    (session,) = await world.store.list_live(user.subject, 0)
    assert (session.id, session.counter) == (session_id, world.token(replies[0]).counter)
    assert {await world.bearer(reply.access_token) for reply in (pair, *replies[:5])} == {"ok"}
    assert await world.outcome(replies[0].refresh_token) == "ok"
    assert await world.rows(user.id) == []


async def test_a_hundred_refreshes_of_one_token_after_a_wipe_make_one_chain(world: World) -> None:
    user = await world.register()
    pair = await world.refresh((await world.login(user)).refresh_token)
    other = await world.replica()
    await world.wipe()
    replies = await together(*[partial(r.refresh, pair.refresh_token) for r in (world, other) for _ in range(50)])
    assert all(isinstance(reply, TokenPair) for reply in replies), Counter(map(repr, replies))
    assert len({reply.refresh_token for reply in replies}) == 1
    assert world.token(replies[0]).counter == world.token(pair).counter + 1
    assert len(await world.live(user.id)) == 1
    assert await world.outcome(replies[0].refresh_token) == "ok"


@dataclass
class Answer:
    """A tab's refresh, and when Redis decided it."""

    pair: TokenPair | None
    status: str
    decided_ms: int


@pytest.mark.proof
async def test_two_tabs_agree_within_the_grace_and_never_after_it(
    make_world: MakeWorld, script_calls: list[ScriptCall]
) -> None:
    grace_ms = 30
    world = await make_world(refresh_grace_s=grace_ms / 1000, max_active_sessions=1000)
    users = [await world.register() for _ in range(LANES)]
    rotations = {b"rotated", b"repeated", b"superseded", b"reused", b"ended"}
    seen: Counter[str] = Counter()

    async def refresh(token: str) -> Answer:
        heard.set(calls := [])
        try:
            pair = await world.refresh(token)
        except Refusal:
            pair = None
        (call,) = [c for c in calls if isinstance(c.reply, list) and c.reply[0] in rotations]
        return Answer(pair, call.status, int(call.reply[1]))

    async def tab(answers: list[Answer], token: str, delay_ms: float) -> None:
        await anyio.sleep(delay_ms / 1000)
        answers.append(await refresh(token))

    async def play(user: User, dice: random.Random) -> None:
        pair = await world.open(user)
        answers: list[Answer] = []
        async with anyio.create_task_group() as tabs:
            for _ in range(2):
                tabs.start_soon(tab, answers, pair.refresh_token, dice.uniform(0, 2 * grace_ms))
        # The replies may have come in another order than Redis decided.
        first, second = sorted(answers, key=lambda answer: (answer.status != "rotated", answer.decided_ms))
        assert first.status == "rotated" and first.pair is not None
        seen[second.status] += 1
        if second.decided_ms <= first.decided_ms + grace_ms:
            assert second.status == "repeated" and second.pair is not None
            assert second.pair.refresh_token == first.pair.refresh_token
            # What was lost in the crowd is nothing: the session goes on.
            third = await refresh(first.pair.refresh_token)
            assert third.status == "rotated" and third.pair is not None
            late = await refresh(pair.refresh_token)
            assert late.status == ("superseded" if late.decided_ms <= third.decided_ms + grace_ms else "reused")
            if late.status == "superseded":
                assert await world.bearer(third.pair.access_token) == "ok"
        else:
            assert second.status == "reused" and second.pair is None
            assert await world.bearer(first.pair.access_token) == "token_invalid"
            assert (await refresh(first.pair.refresh_token)).status == "ended"

    await in_lanes(users, rounds(world, 1000), play)
    assert min(seen["repeated"], seen["reused"]) > 10, seen
    # A row for each theft, whoever's.
    thefts = sum(1 for call in script_calls if call.status == "reused")
    rows = [row for user in users for row in await world.rows(user.id)]
    assert [reason for _, _, reason in rows] == ["reused"] * thefts


# Logins


@pytest.mark.proof
async def test_five_hundred_logins_of_one_user_leave_ten_sessions(
    make_world: MakeWorld, script_calls: list[ScriptCall]
) -> None:
    world = await make_world(hash_queue_max=2000, hash_deadline_s=60.0, hash_threads=8, database_timeout_s=60.0)
    count = 100 if world.is_cluster else 500
    user = await world.register()
    replies = await together(*[partial(world.login, user)] * count)
    assert all(isinstance(reply, TokenPair) for reply in replies), Counter(map(repr, replies))
    live = await world.live(user.id)
    assert len(live) == 10
    tokens = [world.token(reply) for reply in replies]
    kept = [token for token in tokens if token.session_id in live]
    evicted = [token for token in tokens if token.session_id not in live]
    assert (len(kept), len(evicted)) == (10, count - 10)
    # Those that the script opened last. Within a millisecond there is no order but the ids'.
    assert min(token.created_ms for token in kept) >= max(token.created_ms for token in evicted)
    await world.until_rows(user.id, count - 10)
    rows = await world.rows(user.id)
    assert sorted(rows) == sorted((token.session_id, None, "evicted") for token in evicted)
    opened = [call for call in script_calls if call.status == "opened"]
    assert len(opened) == count
    assert Counter(id_ for call in opened for id_ in call.reply[4:]) == Counter(t.session_id for t in evicted)
    for reply in replies[::10]:
        is_live = world.token(reply).session_id in live
        assert await world.outcome(reply.refresh_token) == ("ok" if is_live else "session_evicted")
        assert await world.bearer(reply.access_token) == ("ok" if is_live else "token_invalid")


async def test_logins_at_two_replicas_hold_one_cap(world: World, script_calls: list[ScriptCall]) -> None:
    user = await world.register()
    other = await world.replica()
    async with anyio.create_task_group() as tree:
        await tree.start(world.relay.run)
        replies = await together(*[partial(r.open, user) for r in (world, other) for _ in range(60)])
        assert all(isinstance(reply, TokenPair) for reply in replies), Counter(map(repr, replies))
        assert len(await world.live(user.id)) == 10
        # A login that a script has to be run for twice may evict twice; none of them is missing in the log.
        evicted = {id_ for call in script_calls if call.status == "opened" for id_ in call.reply[4:]}
        assert len(evicted) >= 110
        await world.until_rows(user.id, len(evicted))
        tree.cancel_scope.cancel()
    assert {id_ for id_, _, _ in await world.rows(user.id)} == evicted


# Endings that race


@pytest.mark.proof
async def test_a_logout_that_races_a_refresh_leaves_no_live_token(world: World) -> None:
    users = [await world.register() for _ in range(LANES)]
    other = await world.replica()
    aim = Aim()

    async def play(user: User, dice: random.Random) -> None:
        found = await world.find(user)
        pair = await world.open(found)
        scope = dice.choice(["all", "current"])
        logout = partial(world.sessions.logout, pair.access_token, scope)
        refresh = partial(dice.choice([world, other]).refresh, pair.refresh_token)
        ended, refreshed = await together(logout, partial(aim.delayed, dice, refresh))
        assert ended is None
        pairs = [pair]
        if isinstance(refreshed, TokenPair):
            pairs.append(refreshed)
        else:
            assert refreshed.code == "session_ended"
        aim.learn(was_late=not isinstance(refreshed, TokenPair))
        # Where the logout was asked for, at once; elsewhere Redis says the same.
        for replica in (world, other):
            assert {await replica.outcome(p.refresh_token) for p in pairs} == {"session_ended"}
            assert {await replica.bearer(p.access_token) for p in pairs} == {"token_invalid"}

    await in_lanes(users, rounds(world, 1000), play)
    aim.assert_met_both()


@pytest.mark.proof
async def test_a_logout_that_races_a_login_ends_it_or_was_before_it(world: World) -> None:
    users = [await world.register() for _ in range(LANES)]
    aim = Aim()

    async def play(user: User, dice: random.Random) -> None:
        found = await world.find(user)
        pair = await world.open(found)
        logout = partial(world.sessions.logout, pair.access_token, "all")
        login = partial(world.login, user)
        ended, opened = await together(partial(aim.delayed, dice, logout), login)
        assert ended is None
        assert isinstance(opened, TokenPair)
        now = await world.find(user)
        is_live = world.token(opened).epoch == now.epoch
        aim.learn(was_late=not is_live)
        assert await world.outcome(opened.refresh_token) == ("ok" if is_live else "session_ended")
        assert await world.outcome(pair.refresh_token) == "session_ended"
        await world.end_all(user)

    await in_lanes(users, rounds(world, 300), play)
    aim.assert_met_both()


@pytest.mark.parametrize("password_changes", [True, False])
async def test_a_login_that_verifies_while_all_sessions_end_opens_none_with_the_old_password(
    make_world: MakeWorld, password_changes: bool
) -> None:
    """Scenario 4."""
    world = await make_world(hash_deadline_s=20.0)
    user = await world.register()
    pair = await world.login(user)
    slow = hash_password(PASSWORD, 11)
    await world.database.fetch("UPDATE users SET password_hash = $2 WHERE id = $1", user.id, slow)
    async with anyio.create_task_group() as group:
        replies: list[object] = []

        async def login() -> None:
            replies.extend(await together(partial(world.login, user)))

        group.start_soon(login)

        async def is_hashing() -> bool:
            counters = [value for key, (value, _) in (await world.dump()).items() if ":throttle:pair:" in key]
            return any(name.startswith(b"r:") for value in counters for name in value if isinstance(value, dict))

        await eventually(is_hashing)
        if password_changes:
            changed = hash_password("another one", 4)
            await world.database.fetch(
                "UPDATE users SET password_hash = $2, password_version = password_version + 1 WHERE id = $1",
                user.id,
                changed,
            )
        await world.sessions.logout(pair.access_token, "all")
        assert replies == []
    if password_changes:
        assert isinstance(replies[0], InvalidCredentials)
        assert await world.live(user.id) == {}
    else:
        assert isinstance(replies[0], TokenPair)
        assert await world.outcome(replies[0].refresh_token) == "ok"


async def test_a_hash_that_a_parallel_login_renewed_is_no_other_password(world: World) -> None:
    """All sessions end while a login holds the row of before, and another login has renewed the hash meanwhile."""
    user = await world.register()
    await world.end_all(user)
    assert await world.users.set_password_hash(user.id, user.password_hash, hash_password(PASSWORD, 4))
    pair = await world.open(user)
    assert await world.bearer(pair.access_token) == "ok"
    await world.database.fetch("UPDATE users SET password_version = password_version + 1 WHERE id = $1", user.id)
    await world.end_all(user)
    with pytest.raises(InvalidCredentials):
        await world.open(user)


@pytest.mark.proof
async def test_a_rebuild_that_races_a_logout_leaves_no_live_token(world: World) -> None:
    users = [await world.register() for _ in range(LANES)]
    other = await world.replica()
    aim = Aim()

    async def play(user: User, dice: random.Random) -> None:
        found = await world.find(user)
        lost, kept = await world.open(found), await world.open(found)
        await world.raw.hdel(world.hash_key(user.id), world.token(lost).session_id)
        rebuild = partial(dice.choice([world, other]).refresh, lost.refresh_token)
        if dice.random() < 0.5:
            logout = partial(world.sessions.logout, kept.access_token, "all")
        else:
            logout = partial(world.sessions.end_logged, user.subject, [world.token(lost).session_id], "logout")
        ended, rebuilt = await together(logout, partial(aim.delayed, dice, rebuild))
        assert ended is None
        pairs = [lost]
        if isinstance(rebuilt, TokenPair):
            pairs.append(rebuilt)
        else:
            assert rebuilt.code == "session_ended"
        aim.learn(was_late=not isinstance(rebuilt, TokenPair))
        for replica in (world, other):
            assert {await replica.outcome(p.refresh_token) for p in pairs} == {"session_ended"}
            assert {await replica.bearer(p.access_token) for p in pairs} == {"token_invalid"}

    await in_lanes(users, rounds(world, 1000), play)
    aim.assert_met_both()


# A slot that moves


@pytest.mark.parametrize("redis_url", ["cluster"], indirect=True)
async def test_while_a_slot_moves_nobody_gets_a_wrong_answer(make_world: MakeWorld) -> None:
    world = await make_world(redis_timeout_s=2.0)
    assert isinstance(world.raw, RedisCluster)
    user = await world.register()
    await world.end_all(user)  # so that the bucket's mark is a key that moves, too
    found = await world.find(user)
    pairs = [await world.open(found) for _ in range(8)]
    revoked = await world.open(found)
    await world.sessions.logout(revoked.access_token, "current")
    source = world.raw.get_node_from_key(world.hash_key(user.id))
    target = next(node for node in world.raw.get_primaries() if node != source)
    slot = world.raw.keyslot(world.hash_key(user.id))
    seen: Counter[str] = Counter()
    done = anyio.Event()

    async def device(index: int) -> None:
        while not done.is_set():
            try:
                pairs[index] = await world.refresh(pairs[index].refresh_token)
                assert await world.bearer(pairs[index].access_token) in ("ok", "session_store_unavailable")
                seen["ok"] += 1
            except Unavailable as error:
                assert error.part == "session_store"
                seen["unavailable"] += 1
                await anyio.sleep(0.01)  # a refusal of the breaker takes no time at all
            assert await dead_outcome(world, revoked) in ("session_ended", "unavailable")

    async with anyio.create_task_group() as devices:
        for index in range(len(pairs)):
            devices.start_soon(device, index)
        for here, there in ((source, target), (target, source)):
            await move_slot(world, slot, here, there, pause=partial(until_more, seen))
        done.set()
    assert seen["ok"] > 0
    for pair in pairs:
        assert await available_outcome(world, pair) == "ok"
    assert await available_outcome(world, revoked) == "session_ended"
    assert await world.rows(user.id) == [(None, 2, "logout"), (world.token(revoked).session_id, None, "logout")]


async def move_slot(
    world: World, slot: int, here: ClusterNode, there: ClusterNode, *, pause: Callable[[], Awaitable[None]]
) -> None:
    async with Redis(host=here.host, port=here.port) as source, Redis(host=there.host, port=there.port) as target:
        here_id, there_id = await source.execute_command("CLUSTER MYID"), await target.execute_command("CLUSTER MYID")
        await target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", here_id)
        await source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", there_id)
        await pause()
        for key in await source.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
            await source.execute_command("MIGRATE", there.host, there.port, key, 0, 5000)
            await pause()
        for node in world.raw.get_primaries():  # type: ignore[union-attr]
            async with Redis(host=node.host, port=node.port) as client:
                await client.execute_command("CLUSTER SETSLOT", slot, "NODE", there_id)
        await pause()


async def until_more(seen: Counter[str]) -> None:
    before = seen.total()

    async def is_more() -> bool:
        return seen.total() >= before + 8

    await eventually(is_more)


async def available_outcome(replica: Replica, pair: TokenPair) -> str:
    """When the breaker has found out that Redis is back."""
    outcome = "unavailable"

    async def is_available() -> bool:
        nonlocal outcome
        outcome = await dead_outcome(replica, pair)
        return outcome != "unavailable"

    await eventually(is_available)
    return outcome


async def dead_outcome(replica: Replica, pair: TokenPair) -> str:
    try:
        return await replica.outcome(pair.refresh_token)
    except Unavailable:
        return "unavailable"


# Helpers


async def in_lanes(users: list[User], count: int, play: Callable[[User, random.Random], Awaitable[None]]) -> None:
    """Play `count` rounds, of one user one after the other."""

    async def lane(number: int) -> None:
        dice = random.Random(SEED + number)
        for _ in range(count // len(users)):
            await play(users[number], dice)

    with anyio.fail_after(100):
        async with anyio.create_task_group() as group:
            for number in range(len(users)):
                group.start_soon(lane, number)


class Aim:
    """Delays one of two calls so that each is first in about half of the rounds, however busy the machine is."""

    def __init__(self) -> None:
        self._delay_s = 0.01
        self.seen: Counter[bool] = Counter()

    async def delayed(self, dice: random.Random, call: Callable[[], Awaitable[object]]) -> object:
        await anyio.sleep(self._delay_s * dice.uniform(0.5, 1.5))
        return await call()

    def learn(self, *, was_late: bool) -> None:
        self.seen[was_late] += 1
        self._delay_s = min(5.0, self._delay_s * (0.75 if was_late else 1.33))

    def assert_met_both(self) -> None:
        assert min(self.seen[True], self.seen[False]) >= 5, self.seen
