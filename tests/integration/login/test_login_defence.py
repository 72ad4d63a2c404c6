"""The defence of login, through the real PasswordCheck, Hasher and Throttle on a real Redis and Postgres."""

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import bcrypt
import pytest
from blockbuster import BlockBuster
from support.deployment import make_ring, unguarded
from support.waiting import eventually

from authd.assembly.postgres import PostgresStores
from authd.assembly.redis import RedisStores
from authd.assembly.services import Services
from authd.config import Secret, Settings
from authd.embedded import RedisServer
from authd.errors import InvalidCredentials, LoginLocked, Refusal, RegistrationLimited, Unavailable
from authd.infra.postgres.database import Database, open_database
from authd.infra.redis.client import RedisClient, open_redis
from authd.login.password import Verified
from authd.login.redis import Forgiven, Outcome, Reserved, Throttle, ThrottleSettings
from authd.passwords.formats import hash_password
from authd.tokens.device import DEVICE_TTL_S
from authd.tokens.ring import KeyRing
from authd.users.postgres import User

COST = 4
PASSWORD, WRONG = "correct horse", "wrong horse"
PASSWORD_HASH = hash_password(PASSWORD, COST)
HOME, ELSEWHERE = "192.0.2.1", "198.51.100.7"
PATIENCE_S = 280.0


class Clock:
    ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class Defence:
    """One replica's objects."""

    def __init__(self, settings: Settings, database: Database, redis: RedisClient, ring: KeyRing) -> None:
        self.settings = settings
        self.clock = Clock()
        stores = PostgresStores(settings, database), RedisStores(settings, redis)
        self.services = Services(settings, *stores, ring, clock=self.clock)
        self.users, self.disabling = self.services.postgres.users, self.services.postgres.disabling
        self.throttle = self.services.throttle
        self.hasher, self.devices = self.services.hasher, self.services.devices
        self.passwords, self.accounts = self.services.passwords, self.services.accounts

    async def new_user(self, password_hash: str = PASSWORD_HASH) -> User:
        name = f"{secrets.token_hex(8)}@example.org"
        assert await self.services.postgres.creation.create(name, name, "Some Body", password_hash) is not None
        user = await self.users.find_by_username_key(name)
        assert user is not None
        return user

    async def check(self, name: str, password: str = PASSWORD, address: str = HOME, token: str = "") -> Verified:
        return await self.passwords.verify(name, password, address, token)

    async def outcome(self, name: str, password: str = WRONG, address: str = ELSEWHERE, token: str = "") -> str:
        """The code of the refusal, or `ok`."""
        try:
            await self.check(name, password, address, token)
        except Refusal as refusal:
            return refusal.code
        return "ok"

    async def lock_account(self, user: User) -> None:
        """By failures from addresses that nobody else has."""
        for number in range(self.settings.account_max_failures):
            assert await self.outcome(user.username, address=f"203.0.113.{number}") == "invalid_credentials"
        assert await self.outcome(user.username, PASSWORD, HOME) == "login_locked"

    async def register(self, name: str = "", address: str = HOME) -> str:
        """The code of the refusal, or `ok`."""
        try:
            await self.accounts.register(name or f"{secrets.token_hex(8)}@example.org", PASSWORD, "", address)
        except Refusal as refusal:
            return refusal.code
        return "ok"


Make = Callable[..., Awaitable[Defence]]


@pytest.fixture
async def make(database_url: str, redis_server: RedisServer, no_blocking: BlockBuster) -> AsyncIterator[Make]:
    """Makes replicas of one deployment, with the settings that are named."""
    values: dict[str, Any] = {
        "database_url": Secret(database_url),
        "redis_url": Secret(redis_server.url),
        "secret": Secret("s" * 32),
        "deployment": f"t-{secrets.token_hex(8)}",
        "bcrypt_cost": COST,
        "hash_threads": 2,
        "redis_timeout_s": 10.0,
        "database_timeout_s": 10.0,
        "hash_deadline_s": 290.0,
        "request_timeout_s": 300.0,
    }
    ring = make_ring()

    @asynccontextmanager
    async def running(settings: Settings) -> AsyncIterator[Defence]:
        async with open_database(settings) as database, open_redis(settings) as redis:
            with unguarded(no_blocking):
                made = Defence(settings, database, redis, ring)
            async with anyio.create_task_group() as tree:
                await tree.start(made.services.feed.run)
                await tree.start(made.hasher.run)
                yield made
                tree.cancel_scope.cancel()

    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> Defence:
            return await stack.enter_async_context(running(Settings(**values | changes)))

        yield start


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The password of every hash from now on."""
    made: list[bytes] = []
    real = bcrypt.hashpw

    def counted(key: bytes, salt: bytes) -> bytes:
        if key:  # not the Hasher's measurement at its start
            made.append(key)
        return real(key, salt)

    monkeypatch.setattr(bcrypt, "hashpw", counted)
    return made


async def all_at_once(calls: list[Callable[[], Awaitable[str]]]) -> Counter[str]:
    counted: Counter[str] = Counter()

    async def count(call: Callable[[], Awaitable[str]]) -> None:
        counted[await call()] += 1

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as group:
            for call in calls:
                group.start_soon(count, call)
    return counted


# Storms


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("addresses", "limit"), [(1, 15), (1000, 100)])
async def test_ten_thousand_guesses_get_no_more_hashes_than_the_limit_and_the_owner_gets_in(
    make: Make, hashes: list[bytes], addresses: int, limit: int
) -> None:
    defence = await make(hash_queue_max=100_000, database_timeout_s=100.0, redis_timeout_s=100.0)
    user = await defence.new_user()
    token = (await defence.check(user.username)).device_token
    is_over, logins = anyio.Event(), 0
    hashes.clear()

    async def be_the_owner() -> None:
        nonlocal token, logins
        while not is_over.is_set() or not logins:
            token = (await defence.check(user.username, token=token)).device_token
            logins += 1

    async with anyio.create_task_group() as group:
        group.start_soon(be_the_owner)
        guess = partial(defence.outcome, user.username)
        outcomes = await all_at_once(
            [partial(guess, address=f"198.51.{n % addresses // 250}.{n % addresses % 250}") for n in range(10_000)]
        )
        is_over.set()
    assert outcomes == {"invalid_credentials": limit, "login_locked": 10_000 - limit}
    assert Counter(hashes) == {WRONG.encode(): limit, PASSWORD.encode(): logins}
    # The device that is not known pays for the flood where the account is locked, and there alone.
    from_home = await defence.outcome(user.username, PASSWORD, HOME)
    assert from_home == ("ok" if addresses == 1 else "login_locked")


async def test_sixty_correct_logins_at_once_all_succeed(make: Make) -> None:
    defence = await make()
    user = await defence.new_user()
    token = (await defence.check(user.username)).device_token
    for sent in ("", token):
        logins = [partial(defence.outcome, user.username, PASSWORD, HOME, sent) for _ in range(60)]
        assert await all_at_once(logins) == {"ok": 60}


async def test_one_accounts_flood_leaves_the_others_their_hashes(make: Make) -> None:
    defence = await make(hash_threads=1, hash_queue_max=40, max_login_attempts=1000, account_max_failures=10_000)
    victim = await defence.new_user()
    others = [await defence.new_user() for _ in range(20)]
    flood = [partial(defence.outcome, victim.username) for _ in range(400)]
    logins = [partial(defence.outcome, other.username, PASSWORD, HOME) for other in others]
    outcomes = await all_at_once([*flood, *logins])
    assert outcomes["ok"] == 20
    assert outcomes["login_busy"] > 0
    assert outcomes.keys() == {"ok", "login_busy", "invalid_credentials"}


async def test_a_flood_of_one_address_keeps_nobody_out(make: Make) -> None:
    defence = await make(hash_threads=1, hash_queue_max=20, address_max_failures=10_000)
    victim, own = await defence.new_user(), [await defence.new_user() for _ in range(5)]
    known = (await defence.check(victim.username)).device_token
    tokens = [(await defence.check(user.username, address=ELSEWHERE)).device_token for user in own]
    flood = [partial(defence.outcome, f"nobody{number}@example.org") for number in range(100)]
    flood += [partial(defence.register, address=ELSEWHERE) for _ in range(100)]
    for user, token in zip(own, tokens, strict=True):
        flood += [partial(defence.outcome, user.username, PASSWORD, ELSEWHERE, token) for _ in range(20)]
    victims: Counter[str] = Counter()

    async def be_the_victim(call: Callable[[], Awaitable[str]]) -> str:
        victims[await call()] += 1
        return "tried"

    logins = [partial(defence.outcome, victim.username, PASSWORD, HOME, token) for token in ("", known) * 5]
    tries = [partial(be_the_victim, call) for call in (*logins, partial(defence.register, address=HOME))]
    outcomes = await all_at_once([*flood, *tries])
    assert victims == {"ok": 11}
    assert outcomes["login_busy"] > 100


async def test_a_guesser_who_hangs_up_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    defence = await make(max_login_attempts=3)
    user = await defence.new_user()
    inside, gate, real = threading.Semaphore(0), threading.Event(), bcrypt.hashpw

    def held(key: bytes, salt: bytes) -> bytes:
        inside.release()
        assert gate.wait(PATIENCE_S)
        return real(key, salt)

    monkeypatch.setattr(bcrypt, "hashpw", held)

    async def is_inside() -> bool:
        return inside.acquire(blocking=False)

    guesses = [asyncio.ensure_future(defence.outcome(user.username)) for _ in range(2)]
    for _ in guesses:
        await eventually(is_inside)
    for guess in guesses:
        guess.cancel()  # natively, as Quart does
        with pytest.raises(asyncio.CancelledError):
            await guess
    gate.set()
    assert await defence.outcome(user.username) == "invalid_credentials"
    assert await defence.outcome(user.username) == "login_locked"


async def test_a_dead_replicas_reservations_come_back(make: Make) -> None:
    defence = await make(max_login_attempts=2)
    user = await defence.new_user()
    async with open_redis(defence.settings) as redis:
        dying = Throttle(
            redis, defence.settings.section(ThrottleSettings), defence.services.ring.digest_key(), reservation_ttl_s=0.5
        )
        for _ in range(2):
            assert isinstance(await dying.reserve(HOME, user.username), Reserved)
    # It waits for what the dead one reserved, and is not refused.
    assert await defence.outcome(user.username, PASSWORD, HOME) == "ok"


async def test_the_victims_logins_do_not_reset_the_attackers_count(make: Make) -> None:
    defence = await make(account_max_failures=6)
    user = await defence.new_user()
    for number in range(6):
        assert await defence.outcome(user.username, PASSWORD, HOME) == "ok"
        assert await defence.outcome(user.username, address=f"203.0.113.{number}") == "invalid_credentials"
    assert await defence.outcome(user.username, address="203.0.113.99") == "login_locked"


# Device tokens


async def test_a_device_that_logged_in_gets_into_a_locked_account_and_is_renewed(make: Make) -> None:
    defence = await make(account_max_failures=4)
    user = await defence.new_user()
    token = (await defence.check(user.username)).device_token
    await defence.lock_account(user)
    for _ in range(3):
        checked = await defence.check(user.username, token=token)
        first, renewed = defence.devices.read(token), defence.devices.read(checked.device_token)
        assert first is not None and renewed is not None
        assert (renewed.subject, renewed.id) == (user.subject, first.id)
        token = checked.device_token
    # From anywhere: it travels with its owner.
    assert await defence.outcome(user.username, PASSWORD, ELSEWHERE, token) == "ok"
    assert await defence.outcome(user.username, PASSWORD, HOME) == "login_locked"


async def test_a_renewed_token_lives_as_long_again(make: Make) -> None:
    defence = await make(account_max_failures=1)
    user = await defence.new_user()
    first = (await defence.check(user.username)).device_token
    defence.clock.ahead_s = DEVICE_TTL_S - 60
    second = (await defence.check(user.username, token=first)).device_token
    await defence.lock_account(user)
    defence.clock.ahead_s = DEVICE_TTL_S + 60
    assert await defence.outcome(user.username, PASSWORD, HOME, first) == "login_locked"
    assert await defence.outcome(user.username, PASSWORD, HOME, second) == "ok"


async def test_a_token_that_is_none_of_this_users_is_ignored(make: Make, hashes: list[bytes]) -> None:
    defence = await make(account_max_failures=4)
    user, other = await defence.new_user(), await defence.new_user()
    of_other = (await defence.check(other.username)).device_token
    token = (await defence.check(user.username)).device_token
    ignored = [of_other, "", "d2.junk", token[:-1], token + "A", token[:-1] + "\ud800", "d1." + token[3:], "é" * 115]
    for text in ignored:
        assert await defence.outcome(user.username, PASSWORD, HOME, text) == "ok"
        # Whoever gets in with a token that is ignored is a new device.
        made = defence.devices.read((await defence.check(user.username, token=text)).device_token)
        assert made is not None and made.subject == user.subject
        assert made.id not in {d.id for d in map(defence.devices.read, (token, of_other)) if d is not None}
    await defence.lock_account(user)
    hashes.clear()
    for number, text in enumerate(ignored):
        assert await defence.outcome(user.username, PASSWORD, HOME, text) == "login_locked"
        assert await defence.outcome(f"nobody-{number}@example.org", WRONG, HOME, text) == "invalid_credentials"
    assert hashes == [WRONG.encode()] * len(ignored)
    # It was counted under the address and not under the device: that is as good as new.
    assert await defence.outcome(other.username, PASSWORD, ELSEWHERE, of_other) == "ok"


async def test_another_password_ends_its_use_and_a_renewed_hash_does_not(make: Make) -> None:
    defence = await make(account_max_failures=4, bcrypt_cost=COST + 1)
    user = await defence.new_user()
    token = (await defence.check(user.username)).device_token
    renewed = await defence.users.find(*user.subject)
    assert renewed is not None and renewed.password_hash != user.password_hash
    await defence.lock_account(user)
    assert await defence.outcome(user.username, PASSWORD, HOME, token) == "ok"
    async with open_database(defence.settings) as database:
        await database.fetch("UPDATE users SET password_version = password_version + 1 WHERE id = $1", user.id)
    assert await defence.outcome(user.username, PASSWORD, HOME, token) == "login_locked"


async def test_disabling_a_user_ends_the_use_of_its_device_tokens(make: Make) -> None:
    """Who disables an account because its browser was stolen does not give the thief's token back by enabling it."""
    defence = await make(account_max_failures=4)
    user = await defence.new_user()
    token = (await defence.check(user.username)).device_token
    for disabled in (True, False):
        assert await defence.disabling.set_disabled(user.username, disabled=disabled) is not None
    fresh = (await defence.check(user.username)).device_token
    await defence.lock_account(user)
    assert await defence.outcome(user.username, PASSWORD, HOME, token) == "login_locked"
    assert await defence.outcome(user.username, PASSWORD, HOME, fresh) == "ok"


async def test_a_stolen_token_gives_fifteen_guesses_and_the_owners_logins_give_no_more(
    make: Make, hashes: list[bytes]
) -> None:
    defence = await make(account_max_failures=4)
    user = await defence.new_user()
    token = (await defence.check(user.username)).device_token
    await defence.lock_account(user)
    hashes.clear()
    guess = partial(defence.outcome, user.username, WRONG, ELSEWHERE, token)
    for _ in range(14):
        assert await guess() == "invalid_credentials"
        assert await defence.outcome(user.username, PASSWORD, HOME, token) == "ok"
    # Of guesses at once, no more than the one that is left.
    assert await all_at_once([guess] * 50) == {"invalid_credentials": 1, "login_locked": 49}
    assert Counter(hashes)[WRONG.encode()] == 15
    # For its time the token is worth nothing, also to its owner; the ordinary limits apply.
    assert await defence.outcome(user.username, PASSWORD, HOME, token) == "login_locked"
    await defence.throttle.forgive(user.username)
    checked = await defence.check(user.username, token=token)
    new, stolen = defence.devices.read(checked.device_token), defence.devices.read(token)
    assert new is not None and stolen is not None and new.id != stolen.id


async def test_a_device_is_counted_under_itself_alone(make: Make) -> None:
    defence = await make(max_login_attempts=3, account_max_failures=3, address_max_failures=3, lockout_s=2)
    user, other = await defence.new_user(), await defence.new_user()
    token = (await defence.check(user.username)).device_token
    for _ in range(3):
        assert await defence.outcome(user.username, WRONG, HOME, token) == "invalid_credentials"
    # Nothing of that is the address's, the account's or the pair's.
    assert (await defence.throttle.look(HOME, user.username)).locked_s is None
    assert await defence.outcome(other.username, PASSWORD, HOME) == "ok"
    device = defence.devices.read(token)
    assert device is not None
    standing = await defence.throttle.look(HOME, user.username, device.id)
    assert standing.device_locked_s is not None and 0 < standing.device_locked_s <= 2
    # Ignored: now the ordinary counters count, and lock.
    for _ in range(3):
        assert await defence.outcome(user.username, WRONG, HOME, token) == "invalid_credentials"

    async def is_open() -> bool:
        return await defence.outcome(user.username, PASSWORD, HOME, token) == "ok"

    assert not await is_open()
    await eventually(is_open)


# The same work


async def test_every_refused_login_hashes_once_at_the_same_cost(make: Make, hashes: list[bytes]) -> None:
    defence = await make()
    user, disabled = await defence.new_user(), await defence.new_user()
    await defence.disabling.set_disabled(disabled.username, disabled=True)
    token = (await defence.check(user.username)).device_token
    refusals = []
    for name, password in [
        ("unknown@example.org", WRONG),
        ("no mail", WRONG),
        (user.username, WRONG),
        (disabled.username, WRONG),
        (disabled.username, PASSWORD),
    ]:
        for sent in ("", token, "junk"):
            hashes.clear()
            with pytest.raises(InvalidCredentials) as caught:
                await defence.check(name, password, ELSEWHERE, sent)
            refusals.append((caught.value.code, caught.value.detail, caught.value.retry_after_s))
            assert hashes == [password.encode()]
    assert len(set(refusals)) == 1


async def test_a_locked_login_hashes_nothing(make: Make, hashes: list[bytes]) -> None:
    defence = await make(account_max_failures=2)
    user = await defence.new_user()
    await defence.lock_account(user)
    hashes.clear()
    with pytest.raises(LoginLocked) as caught:
        await defence.check(user.username)
    assert hashes == []
    assert caught.value.retry_after_s is not None and 0 < caught.value.retry_after_s <= 300


async def test_registration_of_a_taken_name_hashes_once_as_of_a_new_one(make: Make, hashes: list[bytes]) -> None:
    defence = await make()
    for expected in ("ok", "username_taken", "username_taken"):
        hashes.clear()
        assert await defence.register("taken@example.org") == expected
        assert hashes == [PASSWORD.encode()]


# Registrations


async def test_registrations_of_one_address_are_limited_exactly(make: Make, hashes: list[bytes]) -> None:
    defence = await make(address_max_failures=5)
    names = [f"{number}@example.org" for number in range(30)]
    outcomes = await all_at_once([partial(defence.register, name, "2001:db8::7") for name in names])
    assert outcomes == {"ok": 5, "registration_limited": 25}
    assert len(hashes) == 5
    # A /64 is one subscriber; another one is not affected, and neither is who logs in.
    assert await defence.register(address="2001:db8::8") == "registration_limited"
    assert await defence.register(address="2001:db8:0:1::7") == "ok"
    assert await defence.outcome("0@example.org", PASSWORD, "2001:db8::7") in ("ok", "invalid_credentials")
    with pytest.raises(RegistrationLimited) as caught:
        await defence.accounts.register("late@example.org", PASSWORD, "", "2001:db8::7")
    assert caught.value.retry_after_s is not None and 0 < caught.value.retry_after_s <= 300


async def test_the_window_of_registrations_begins_with_the_first_and_ends(make: Make) -> None:
    defence = await make(address_max_failures=2, lockout_s=1)
    outcomes = Counter[str]()

    async def has_opened_again() -> bool:
        outcomes[await defence.register()] += 1
        return outcomes["ok"] >= 5

    await eventually(has_opened_again)
    assert outcomes["registration_limited"] > 0


async def test_registration_works_while_redis_is_away(make: Make) -> None:
    defence = await make(redis_url=Secret("redis://127.0.0.1:1"), address_max_failures=1)
    assert [await defence.register() for _ in range(6)] == ["ok"] * 6


async def test_registrations_of_one_address_cannot_fill_the_queue(make: Make) -> None:
    defence = await make(hash_threads=1, hash_queue_max=40)
    user = await defence.new_user()
    flood = [partial(defence.register, address=ELSEWHERE) for _ in range(100)]
    outcomes = await all_at_once([*flood, partial(defence.outcome, user.username, WRONG, HOME)])
    assert outcomes["login_busy"] > 0 and outcomes["invalid_credentials"] == 1


# Unlocking


async def test_unlocking_forgets_the_account_and_the_pair_that_is_named(make: Make) -> None:
    defence = await make(max_login_attempts=3, account_max_failures=6)
    user = await defence.new_user()
    for address in (HOME, ELSEWHERE):
        for _ in range(3):
            assert await defence.outcome(user.username, WRONG, address) == "invalid_credentials"
    assert await defence.outcome(user.username, PASSWORD, "203.0.113.1") == "login_locked"
    forgiven = await defence.throttle.forgive(user.username)
    assert (forgiven.account, forgiven.pair) == (6, None)
    assert await defence.outcome(user.username, PASSWORD, "203.0.113.1") == "ok"
    assert await defence.outcome(user.username, PASSWORD, HOME) == "login_locked"
    forgiven = await defence.throttle.forgive(user.username, HOME)
    assert (forgiven.account, forgiven.pair) == (0, 3)
    assert await defence.outcome(user.username, PASSWORD, HOME) == "ok"
    assert await defence.outcome(user.username, PASSWORD, ELSEWHERE) == "login_locked"


async def test_unlocking_gives_the_attempts_under_way_no_free_guess(make: Make) -> None:
    defence = await make(max_login_attempts=2)
    attempt = await defence.throttle.reserve(HOME, "somebody")
    assert isinstance(attempt, Reserved)
    await defence.throttle.forgive("somebody", HOME)
    await defence.throttle.settle(attempt, Outcome.FAILED)
    assert await defence.throttle.forgive("somebody", HOME) == Forgiven(account=1, pair=1)


async def test_without_redis_a_login_is_refused_and_not_hashed(make: Make, hashes: list[bytes]) -> None:
    defence = await make(redis_url=Secret("redis://127.0.0.1:1"))
    user = await defence.new_user()
    hashes.clear()
    with pytest.raises(Unavailable) as caught:
        await defence.check(user.username)
    assert caught.value.part == "session_store" and hashes == []
