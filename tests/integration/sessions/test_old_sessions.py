"""Sessions and tokens of before incarnations: Redis as the version before left it, and tokens `v1.` of its clients."""

import hmac
import struct
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from functools import partial

import pytest
from support.deployment import CLIENT, UNLOGGED, MakeWorld, World, together

from authd.config import BUCKETS
from authd.oauth.introspection import TokenDesk
from authd.tokens.refresh import PASSWORD_FACTOR, USER_KIND
from authd.users.postgres import User

#: Longer than any grace here, and no expiry.
AGO_MS = 3600 * 1000


@dataclass(frozen=True)
class Old:
    """A session of before: what its token says, and Redis had."""

    session_id: bytes
    epoch: int
    counter: int
    created_ms: int
    issued_ms: int
    expires_ms: int


class Past:
    """Writes what the version before wrote, by its own formats and not by our code."""

    def __init__(self, world: World) -> None:
        self.world = world

    def key(self, user: User) -> str:
        return self.world.redis.key(user.id % BUCKETS, f"user:{user.id}")

    async def session(self, user: User, number: int = 1, *, counter: int = 1, age_ms: int = 0, epoch: int = 1) -> Old:
        """A session that was opened after the user registered, the lower numbers earlier, and rotated `age_ms` ago."""
        now_ms = await self.world.now_ms()
        issued_ms = now_ms - age_ms
        old = Old(bytes([number] * 16), epoch, counter, user.registered_ms + number, issued_ms, now_ms + 86_400_000)
        await self.put(user, old.session_id, self.value(old), old.expires_ms)
        return old

    async def put(self, user: User, field: bytes, value: bytes, expires_ms: int) -> None:
        await self.world.raw.hset(self.key(user), field, value)
        await self.world.raw.pexpireat(self.key(user), expires_ms)

    def value(self, old: Old) -> bytes:
        numbers = (old.counter, old.created_ms, old.issued_ms, old.expires_ms)
        address = bytes([192, 0, 2, 1])
        return (
            struct.pack(">BII", 1, 1, old.epoch)
            + b"".join(number.to_bytes(6, "big") for number in numbers)
            + bytes([len(address)])
            + address
            + b"a browser"
        )

    def token(self, user: User, old: Old, *, counter: int | None = None, issued_ms: int | None = None) -> str:
        key = self.world.ring.find_mac_key(1)
        assert key is not None
        fields = struct.pack(
            ">IQ16sIQQQQ",
            1,
            user.id,
            old.session_id,
            old.epoch,
            old.counter if counter is None else counter,
            old.created_ms,
            old.issued_ms if issued_ms is None else issued_ms,
            old.expires_ms,
        )
        return "v1." + urlsafe_b64encode(fields + hmac.digest(key.secret, b"v1." + fields, "sha256")).decode()


@pytest.fixture
def past(world: World) -> Past:
    return Past(world)


async def test_a_session_of_before_goes_on_with_its_token(world: World, past: Past) -> None:
    user = await world.register()
    old = await past.session(user, counter=5)
    pair = await world.refresh(past.token(user, old))
    token = world.token(pair)
    assert pair.refresh_token.startswith("v2.")
    assert (token.subject, token.session_id, token.counter) == (user.subject, old.session_id, 6)
    assert (token.created_ms, token.epoch) == (old.created_ms, 1)
    # The login is when the session began, with a password: there was nothing else.
    assert (token.authenticated_s, token.factors, token.kind) == (old.created_ms // 1000, PASSWORD_FACTOR, USER_KIND)
    assert await world.bearer(pair.access_token) == "ok"
    (session,) = await world.sessions.list_own(pair.access_token)
    assert (session.address, session.user_agent) == (CLIENT.address, CLIENT.user_agent)
    assert await world.raw.exists(past.key(user)) == 0
    assert await world.outcome(pair.refresh_token) == "ok"


async def test_a_lost_reply_is_forgiven_across_the_change(world: World, past: Past) -> None:
    """Rotated before it, or after it: the token before gets the same successor again."""
    user = await world.register()
    old = await past.session(user, counter=5)
    first = await world.refresh(past.token(user, old, counter=4))
    assert world.token(first).counter == 5
    assert (await world.refresh(past.token(user, old, counter=4))).refresh_token == first.refresh_token
    second = await world.refresh(past.token(user, old))
    assert (await world.refresh(past.token(user, old))).refresh_token == second.refresh_token
    assert world.token(second).counter == 6


async def test_a_token_that_was_exchanged_before_the_change_is_theft_after_it(world: World, past: Past) -> None:
    user = await world.register()
    old = await past.session(user, counter=5, age_ms=AGO_MS)
    assert await world.outcome(past.token(user, old, counter=4, issued_ms=old.issued_ms - 1)) == "refresh_token_reused"
    assert await world.rows(user.id) == [(old.session_id, None, "reused")]
    assert await world.outcome(past.token(user, old)) == "refresh_token_reused"


async def test_a_token_of_before_that_was_exchanged_since_is_theft(make_world: MakeWorld) -> None:
    world = await make_world(refresh_grace_s=0.05)
    past = Past(world)
    user = await world.register()
    old = await past.session(user)
    pair = await world.refresh(past.token(user, old))
    await world.until_grace_is_over(pair)
    assert await world.outcome(past.token(user, old)) == "refresh_token_reused"
    assert await world.bearer(pair.access_token) == "token_invalid"


async def test_a_login_counts_the_sessions_of_before(world: World, past: Past) -> None:
    user = await world.register()
    sessions = [await past.session(user, number) for number in range(1, 11)]
    pair = await world.login(user)
    assert await world.rows(user.id) == [(sessions[0].session_id, None, "evicted")]
    assert len(await world.live(user.id)) == 10
    outcomes = [await world.outcome(past.token(user, old)) for old in sessions]
    assert outcomes == ["session_evicted"] + ["ok"] * 9
    assert await world.bearer(pair.access_token) == "ok"


async def test_an_eviction_that_only_redis_knew_holds(world: World, past: Past) -> None:
    """The tombstone of before, whose row Postgres has not heard of."""
    user = await world.register()
    old = await past.session(user)
    tombstone = bytes([UNLOGGED]) + old.expires_ms.to_bytes(6, "big") + b"evicted"
    await past.put(user, old.session_id, tombstone, old.expires_ms)
    assert await world.outcome(past.token(user, old)) == "session_evicted"
    assert await world.values(user.id) == {old.session_id: tombstone}
    assert await world.raw.pexpiretime(world.hash_key(user.id)) == old.expires_ms


async def test_what_has_ended_before_stays_ended(world: World, past: Past) -> None:
    user = await world.register()
    await world.database.fetch("UPDATE users SET version = 2, epoch = 2 WHERE id = $1", user.id)
    ended, alive = await past.session(user, 1), await past.session(user, 2, epoch=2)
    await past.put(user, b"e", (2).to_bytes(6, "big") + b"logout", alive.expires_ms)
    assert await world.outcome(past.token(user, ended)) == "session_ended"
    assert await world.outcome(past.token(user, alive)) == "ok"
    assert (await world.raw.hget(world.hash_key(user.id), "e"))[:6] == (2).to_bytes(6, "big")
    assert await world.live(user.id) != {}


@pytest.mark.parametrize("scope", ["one", "all"])
async def test_an_ending_reaches_what_nobody_has_moved_yet(world: World, past: Past, scope: str) -> None:
    user = await world.register()
    first, second = await past.session(user, 1), await past.session(user, 2)
    if scope == "all":
        await world.end_all(user)
    else:
        await world.sessions.end_logged(user.subject, [first.session_id], "logout")
    assert set(await world.raw.hkeys(past.key(user))) == ({second.session_id} if scope == "one" else set())
    # Its tombstone lives for minutes only, and what was moved later would live again.
    await world.raw.delete(world.hash_key(user.id))
    expected = ["session_ended", "ok" if scope == "one" else "session_ended"]
    assert [await world.outcome(past.token(user, old)) for old in (first, second)] == expected
    await world.login(user)
    assert first.session_id not in await world.live(user.id)


async def test_after_a_wipe_a_token_of_before_brings_its_session_back(world: World, past: Past) -> None:
    user = await world.register()
    old = await past.session(user, counter=5)
    await world.wipe()
    token = world.token(await world.refresh(past.token(user, old)))
    assert (token.subject, token.session_id, token.counter) == (user.subject, old.session_id, 6)
    assert (token.authenticated_s, token.factors, token.kind) == (old.created_ms // 1000, PASSWORD_FACTOR, USER_KIND)


@pytest.mark.parametrize("wiped", [False, True])
async def test_an_id_given_twice_opens_nothing_to_a_token_of_before(world: World, past: Past, wiped: bool) -> None:
    ada = await world.register()
    old = await past.session(ada)
    await past.put(ada, b"e", (9).to_bytes(6, "big") + b"logout", old.expires_ms)
    # As a restored backup does it, with no row of the log.
    await world.database.fetch("ALTER TABLE users DISABLE TRIGGER user_deleted")
    await world.database.fetch("DELETE FROM users")
    await world.database.fetch(f"ALTER SEQUENCE users_id_seq RESTART WITH {ada.id}")
    await world.until_ms(ada.registered_ms + 2)
    bob = await world.register()
    assert (bob.id, bob.epoch) == (ada.id, ada.epoch)
    if wiped:
        await world.wipe()
    assert await world.outcome(past.token(ada, old)) == "user_disabled"
    # Her floor does not keep him out, and her session is none of his.
    pair = await world.login(bob)
    assert await world.outcome(past.token(ada, old)) == "user_disabled"
    assert len(await world.sessions.list_own(pair.access_token)) == 1
    assert await world.outcome(pair.refresh_token) == "ok"


async def test_a_token_of_before_whose_user_is_gone_or_disabled_says_so(world: World, past: Past) -> None:
    gone, disabled = await world.register(), await world.register()
    of_gone, of_disabled = await past.session(gone), await past.session(disabled)
    await world.database.fetch("DELETE FROM users WHERE id = $1", gone.id)
    await world.set_disabled(disabled, "user_disabled")
    assert await world.outcome(past.token(gone, of_gone)) == "user_disabled"
    assert await world.outcome(past.token(disabled, of_disabled)) == "user_disabled"


async def test_services_may_ask_about_and_revoke_a_token_of_before(world: World, past: Past) -> None:
    user = await world.register()
    first, second = await past.session(user, 1), await past.session(user, 2)
    desk = TokenDesk(world.mint, world.sessions)
    # One that Redis does not know under its user's name yet is inactive, as after a wipe, until a device came.
    assert (await desk.introspect(past.token(user, second)))["active"] is False
    await desk.revoke(past.token(user, first))
    assert await world.outcome(past.token(user, first)) == "session_ended"
    assert await world.outcome(past.token(user, second)) == "ok"
    assert await world.rows(user.id) == [(first.session_id, None, "revoked")]


async def test_devices_that_come_at_once_move_the_sessions_once(world: World, past: Past) -> None:
    user = await world.register()
    sessions = [await past.session(user, number, counter=3) for number in range(1, 11)]
    other = await world.replica()
    texts = [past.token(user, old) for old in sessions]
    calls = [partial(replica.outcome, text) for text in texts for replica in (world, other)]
    assert await together(*calls) == ["ok"] * len(calls)
    live = await world.store.list_live(user.subject, 0)
    assert [(session.id, session.counter) for session in live] == [(old.session_id, 4) for old in sessions]
    assert await world.rows(user.id) == []
    assert await world.raw.exists(past.key(user)) == 0


async def test_moving_twice_changes_nothing(world: World, past: Past) -> None:
    """A Redis that went back has both: what was moved and went on counts."""
    user = await world.register()
    old = await past.session(user)
    pair = await world.refresh(past.token(user, old))
    pair = await world.refresh(pair.refresh_token)
    await past.session(user)
    await past.session(user, 2)
    await world.login(user)
    live = await world.store.list_live(user.subject, 0)
    assert [session.counter for session in live if session.id == old.session_id] == [3]
    assert len(live) == 3
    assert await world.outcome(pair.refresh_token) == "ok"
