"""The counters of guesses, on one Redis and on a cluster: exact however many guess at once."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis.asyncio import Redis, RedisCluster
from support.deployment import answers, open_raw
from support.waiting import eventually

from authd.config import Secret, Settings
from authd.embedded import RedisServer
from authd.errors import LoginLocked, Unavailable
from authd.infra.redis.client import RedisClient, open_redis
from authd.login.redis import DIGEST_BYTES, Locked, Outcome, Reserved, Throttle, ThrottleSettings, Wait
from authd.passwords.formats import Effort, hash_password, verify_password
from authd.passwords.hasher import Admission, Hasher, HashSettings, Job

ADDRESS, ACCOUNT = "192.0.2.1", "somebody@example.org"
PASSWORD = "correct horse"
COST = 4
PATIENCE_S = 50.0
DIGEST_KEY = bytes(range(32))
FAILED, SUCCEEDED, RELEASED = Outcome.FAILED, Outcome.SUCCEEDED, Outcome.RELEASED


def throttle_of(client: RedisClient, settings: Settings, **changes: Any) -> Throttle:
    return Throttle(client, settings.section(ThrottleSettings), DIGEST_KEY, **changes)


@pytest.fixture(autouse=True)
def scripts_are_read_at_the_start(no_blocking: Any) -> None:
    for function in no_blocking.functions.values():
        function.can_block_in("authd/infra/redis/client.py", "load_script")


@pytest.fixture
def deployment() -> str:
    """Its own key prefix for each test, instead of flushing."""
    return f"t-{secrets.token_hex(8)}"


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[Redis | RedisCluster]:
    async with open_raw(redis_url) as client:
        yield client


@pytest.fixture
def make_settings(redis_url: str, deployment: str) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        values: dict[str, Any] = {
            "database_url": Secret("-"),
            "redis_url": Secret(redis_url),
            "secret": Secret("-"),
            "deployment": deployment,
            "redis_timeout_s": 5.0,
            "bcrypt_cost": COST,
            "hash_threads": 2,
            "hash_queue_max": 20_000,
            "hash_deadline_s": 200.0,
        }
        return Settings(**values | changes)

    return make


@pytest.fixture
async def client(make_settings: Callable[..., Settings]) -> AsyncIterator[RedisClient]:
    async with open_redis(make_settings()) as client:
        yield client


async def fail(throttle: Throttle, address: str = ADDRESS, account: str = ACCOUNT) -> tuple[str, ...]:
    attempt = await throttle.reserve(address, account)
    assert isinstance(attempt, Reserved), attempt
    return await throttle.settle(attempt, FAILED)


async def succeed(throttle: Throttle, address: str = ADDRESS, account: str = ACCOUNT) -> None:
    attempt = await throttle.reserve(address, account)
    assert isinstance(attempt, Reserved), attempt
    assert await throttle.settle(attempt, SUCCEEDED) == ()


async def state(raw: Redis | RedisCluster, deployment: str) -> dict[bytes, dict[bytes, bytes]]:
    """Every key of the test, with its fields."""
    keys = [key async for key in raw.scan_iter(match=f"authd:{deployment}:*", count=1000)]
    values: list[Any] = [await raw.hgetall(key) for key in keys]
    return dict(zip(keys, values, strict=True))


async def pair_state(raw: Redis | RedisCluster, deployment: str) -> dict[bytes, bytes]:
    (fields,) = [fields for key, fields in (await state(raw, deployment)).items() if b":pair:" in key]
    return fields


# One counter


async def test_the_limits_failure_locks_for_a_fixed_time(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=3, lockout_s=2))
    assert await throttle.locked_s(ADDRESS, ACCOUNT) is None
    assert await fail(throttle) == await fail(throttle) == ()
    assert await throttle.locked_s(ADDRESS, ACCOUNT) is None
    assert await fail(throttle) == ("pair",)

    assert await throttle.locked_s(ADDRESS, ACCOUNT) == 2
    locked = await pair_state(raw, deployment)
    for _ in range(5):
        assert isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Locked)
    assert await pair_state(raw, deployment) == locked

    await eventually(partial(is_open, throttle))
    # It opens at the end that was set, by Redis's clock, and the count starts anew.
    seconds, micros = await raw.time()
    assert int(locked[b"until"]) <= seconds * 1000 + micros / 1000
    assert await fail(throttle) == await fail(throttle) == ()


async def test_the_time_left_is_true_and_rounded_up(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=1, lockout_s=300))
    await fail(throttle)
    refused = await throttle.reserve(ADDRESS, ACCOUNT)
    peeked_s = await throttle.locked_s(ADDRESS, ACCOUNT)
    until_ms = int((await pair_state(raw, deployment))[b"until"])
    seconds, micros = await raw.time()
    left_s = (until_ms - seconds * 1000 - micros / 1000) / 1000
    assert isinstance(refused, Locked) and peeked_s is not None
    assert left_s <= peeked_s <= refused.retry_after_s <= 300


async def test_failures_expire_after_the_last_one(client: RedisClient, make_settings: Callable[..., Settings]) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=2, lockout_s=1))
    # Each failure comes when the one before has expired, so that no second one ever meets the first.
    for _ in range(3):
        assert await fail(throttle) == ()
        peek = throttle_of(client, make_settings(max_login_attempts=1, lockout_s=1))
        await eventually(partial(is_open, peek))


async def is_open(throttle: Throttle) -> bool:
    return await throttle.locked_s(ADDRESS, ACCOUNT) is None


async def test_reservations_and_failures_together_stay_below_the_limit(
    client: RedisClient, make_settings: Callable[..., Settings]
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=3))
    await fail(throttle)
    first, second = [await throttle.reserve(ADDRESS, ACCOUNT) for _ in range(2)]
    assert isinstance(first, Reserved) and isinstance(second, Reserved)
    # Not locked: these may yet be right.
    assert await throttle.reserve(ADDRESS, ACCOUNT) == Wait()
    assert await throttle.locked_s(ADDRESS, ACCOUNT) is None
    await throttle.settle(first, RELEASED)
    third = await throttle.reserve(ADDRESS, ACCOUNT)
    assert isinstance(third, Reserved)
    assert await throttle.settle(second, FAILED) == ()
    assert await throttle.reserve(ADDRESS, ACCOUNT) == Wait()
    assert await throttle.settle(third, FAILED) == ("pair",)
    assert isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Locked)


async def test_a_dead_replicas_reservations_expire_and_count_nothing(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    settings = make_settings(max_login_attempts=2)
    dying = throttle_of(client, settings, reservation_ttl_s=0.3)
    alive = throttle_of(client, settings)
    lost = [await dying.reserve(ADDRESS, ACCOUNT) for _ in range(2)]
    assert await alive.reserve(ADDRESS, ACCOUNT) == Wait()

    async def nothing_left() -> bool:
        return await state(raw, deployment) == {}

    await eventually(nothing_left)
    # It was not dead after all: what it settles now has no reservation to settle.
    for attempt in lost:
        assert isinstance(attempt, Reserved)
        assert await dying.settle(attempt, FAILED) == ()
    assert await state(raw, deployment) == {}
    await fail(alive)


async def test_an_expired_reservation_gives_way_while_others_live(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    settings = make_settings(max_login_attempts=2)
    await throttle_of(client, settings, reservation_ttl_s=0.1).reserve(ADDRESS, ACCOUNT)
    throttle = throttle_of(client, settings)
    assert isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Reserved)
    answers: list[object] = []

    async def reserved() -> bool:
        answers.append(await throttle.reserve(ADDRESS, ACCOUNT))
        return isinstance(answers[-1], Reserved)

    await eventually(reserved)
    assert all(answer == Wait() for answer in answers[:-1])
    # Its field is gone too.
    assert len([name for name in await pair_state(raw, deployment) if name.startswith(b"r:")]) == 2


# What is counted


async def test_a_success_clears_the_pair_alone(client: RedisClient, make_settings: Callable[..., Settings]) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=3, account_max_failures=5, address_max_failures=7))
    for _ in range(2):
        await fail(throttle)
        await fail(throttle)
        await succeed(throttle)
    # Four failures are counted under the account and the address still.
    assert await fail(throttle, address="198.51.100.7") == ("account",)
    # Locked everywhere, for an address that never failed too.
    assert isinstance(await throttle.reserve("203.0.113.5", ACCOUNT), Locked)
    assert isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Locked)
    # The address goes on with other accounts until its own limit.
    for number in range(2):
        assert await fail(throttle, account=f"other-{number}") == ()
    assert await fail(throttle, account="other-2") == ("address",)
    assert isinstance(await throttle.reserve(ADDRESS, "untouched"), Locked)
    assert isinstance(await throttle.reserve("203.0.113.5", "untouched"), Reserved)


async def test_a_refusal_by_one_counter_reserves_in_none(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=1))
    await fail(throttle)
    before = await state(raw, deployment)
    assert isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Locked)
    assert await state(raw, deployment) == before
    held = await throttle.reserve(ADDRESS, "other")
    before = await state(raw, deployment)
    assert await throttle.reserve(ADDRESS, "other") == Wait()
    assert await state(raw, deployment) == before
    assert isinstance(held, Reserved)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2:a::1", "2001:db8:1:2:b::2", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("2001:DB8:1:2:0:0:0:1", "2001:db8:1:2::1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::ffff:192.0.2.9", "192.0.2.9", True),
        ("::ffff:192.0.2.9", "::ffff:192.0.2.10", False),
        ("192.0.2.9", "192.0.2.10", False),
        ("no address", "no address", True),
        ("no address", "\ud800", False),
    ],
)
async def test_an_ipv6_client_is_its_64_network_and_a_mapped_address_its_ipv4_one(
    client: RedisClient, make_settings: Callable[..., Settings], one: str, other: str, same: bool
) -> None:
    throttle = throttle_of(client, make_settings(address_max_failures=1))
    await fail(throttle, address=one, account="first")
    assert (await throttle.locked_s(other, "second") is not None) is same


async def test_any_text_may_be_an_account_and_none_shows_in_redis(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=1))
    for account in ("", "\0", "\ud800", "x" * 10_000, "{0}", "typed-my-password-here"):
        await fail(throttle, account=account)
        assert await throttle.locked_s(ADDRESS, account) is not None
    for key, fields in (await state(raw, deployment)).items():
        assert b"password" not in key + b"".join(fields) + b"".join(fields.values())
        assert ADDRESS.encode() not in key
        assert len(key) < 120


async def test_every_key_expires_with_what_counts_in_it(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=3, lockout_s=300), reservation_ttl_s=60)
    await throttle.reserve(ADDRESS, ACCOUNT)
    for key in await state(raw, deployment):
        assert 55_000 < await raw.pttl(key) <= 60_000
    await fail(throttle)
    for key in await state(raw, deployment):
        assert 290_000 < await raw.pttl(key) <= 300_000
    await succeed(throttle)
    ttls = {key.split(b":")[4]: await raw.pttl(key) for key in await state(raw, deployment)}
    # In the pair only the reservation that was never settled is left.
    assert ttls.keys() == {b"pair", b"account", b"address"}
    assert 50_000 < ttls[b"pair"] <= 60_000
    assert min(ttls[b"account"], ttls[b"address"]) > 290_000


async def test_a_released_attempt_leaves_nothing(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings())
    attempt = await throttle.reserve(ADDRESS, ACCOUNT)
    assert isinstance(attempt, Reserved)
    await throttle.settle(attempt, RELEASED)
    assert await state(raw, deployment) == {}


# Digests with a key


async def test_a_copy_of_redis_tells_nothing_of_a_username_without_the_key(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    await fail(throttle_of(client, make_settings()))
    keys = set(await state(raw, deployment))
    # What an attacker who has the copy and the source can compute, for the very texts that were counted.
    counted = {"pair": f"{ADDRESS}\0{ACCOUNT}", "account": ACCOUNT, "address": ADDRESS}
    for kind, text in counted.items():
        for key in (b"", bytes(32), b"-"):
            guess = blake2b(text.encode(), digest_size=DIGEST_BYTES, person=kind.encode(), key=key).hexdigest()
            assert not [found for found in keys if guess.encode() in found]
    # With the key it is the same everywhere, and with another nobody's.
    await fail(throttle_of(client, make_settings()))
    assert set(await state(raw, deployment)) == keys
    await fail(Throttle(client, make_settings().section(ThrottleSettings), bytes(reversed(DIGEST_KEY))))
    digests = [key.rpartition(b":")[2] for key in await state(raw, deployment)]
    assert len(digests) == len(set(digests)) == 2 * len(keys)


# Redis's clock is set back


async def set_back(raw: Redis | RedisCluster, deployment: str, by_ms: int) -> None:
    """Leave what is stored as it is after Redis's clock was set back: every time is that much further ahead."""
    for key, fields in (await state(raw, deployment)).items():
        times = {name: int(value) + by_ms for name, value in fields.items() if name == b"until" or name[:2] == b"r:"}
        await raw.hset(key, mapping=times)
        await raw.pexpireat(key, await raw.pexpiretime(key) + by_ms)


@pytest.mark.parametrize("first", ["look", "reserve"])
async def test_no_lock_holds_for_longer_than_its_setting_when_redis_is_set_back(
    client: RedisClient,
    make_settings: Callable[..., Settings],
    raw: Redis | RedisCluster,
    deployment: str,
    first: str,
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=1, lockout_s=2))
    await fail(throttle)
    await set_back(raw, deployment, 3_600_000)
    if first == "look":
        assert await throttle.locked_s(ADDRESS, ACCOUNT) == 2
    refused = await throttle.reserve(ADDRESS, ACCOUNT)
    assert isinstance(refused, Locked) and refused.retry_after_s <= 2
    # It ends at that time: looking at it does not put it off, and its key goes.
    locked = await pair_state(raw, deployment)
    await throttle.locked_s(ADDRESS, ACCOUNT)
    assert await pair_state(raw, deployment) == locked
    await eventually(partial(is_open, throttle))

    async def pair_is_gone() -> bool:
        return not [key for key in await state(raw, deployment) if b":pair:" in key]

    await eventually(pair_is_gone)


async def test_failures_count_for_no_longer_than_their_setting_when_redis_is_set_back(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=3, lockout_s=300))
    await fail(throttle)
    await set_back(raw, deployment, 3_600_000)
    await fail(throttle)
    assert await fail(throttle) == ("pair",)
    assert await throttle.locked_s(ADDRESS, ACCOUNT) in (299, 300)
    for key in await state(raw, deployment):
        assert await raw.pttl(key) <= 300_000


async def test_registrations_are_limited_for_no_longer_than_the_window_when_redis_is_set_back(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    throttle = throttle_of(client, make_settings(address_max_failures=1, lockout_s=300))
    assert await throttle.count_registration(ADDRESS) is None
    await set_back(raw, deployment, 3_600_000)
    assert await throttle.registrations_locked_s(ADDRESS) in (299, 300)
    await set_back(raw, deployment, 3_600_000)
    refused = await throttle.count_registration(ADDRESS)
    assert refused is not None and refused.retry_after_s <= 300


async def test_a_reservation_lives_no_longer_than_its_time_when_redis_is_set_back(
    client: RedisClient, make_settings: Callable[..., Settings], raw: Redis | RedisCluster, deployment: str
) -> None:
    settings = make_settings(max_login_attempts=1)
    throttle = throttle_of(client, settings, reservation_ttl_s=0.5)
    assert isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Reserved)
    await set_back(raw, deployment, 3_600_000)
    assert await throttle.reserve(ADDRESS, ACCOUNT) == Wait()

    async def is_free() -> bool:
        return isinstance(await throttle.reserve(ADDRESS, ACCOUNT), Reserved)

    await eventually(is_free)


# Scripts that run twice, or never


@pytest.mark.parametrize("outcome", Outcome)
async def test_a_script_that_ran_twice_changed_nothing_the_second_time(
    client: RedisClient,
    make_settings: Callable[..., Settings],
    raw: Redis | RedisCluster,
    deployment: str,
    outcome: Outcome,
) -> None:
    throttle = throttle_of(client, make_settings(max_login_attempts=9))
    again = throttle_of(client, make_settings(max_login_attempts=9), new_id=lambda: "the same")
    await fail(throttle)
    attempt = await again.reserve(ADDRESS, ACCOUNT)
    assert isinstance(attempt, Reserved)
    after_one = await state(raw, deployment)
    assert await again.reserve(ADDRESS, ACCOUNT) == attempt
    assert await state(raw, deployment) == after_one

    await again.settle(attempt, outcome)
    # What came since stays: a repeated success clears no failure that it did not see.
    await fail(throttle)
    settled = await state(raw, deployment)
    for repeated in (outcome, *Outcome):
        assert await again.settle(attempt, repeated) == ()
        assert await state(raw, deployment) == settled


async def test_an_abandoned_script_does_not_act_after_its_deadline(tmp_path: Path, deployment: str) -> None:
    async with RedisServer(tmp_path, durable=False) as server:
        settings = Settings(
            database_url=Secret("-"),
            redis_url=Secret(server.url),
            secret=Secret("-"),
            deployment=deployment,
            redis_timeout_s=1.5,
        )
        async with open_redis(settings) as client, Redis.from_url(server.url) as raw:
            throttle = throttle_of(client, settings)
            attempt = await throttle.reserve(ADDRESS, ACCOUNT)
            assert isinstance(attempt, Reserved)
            before = await state(raw, deployment)
            await server.pause()
            with anyio.fail_after(10):
                for call in (
                    partial(throttle.settle, attempt, FAILED),
                    partial(throttle.reserve, ADDRESS, ACCOUNT),
                    partial(throttle.locked_s, ADDRESS, ACCOUNT),
                ):
                    with pytest.raises(Unavailable) as caught:
                        await call()
                    assert caught.value.part == "session_store"
            await server.resume()
            assert await raw.ping()
            assert await state(raw, deployment) == before
            # It is settled now, in time: the client's clock of this Redis is right again. The breaker takes a moment to
            # believe it.
            await eventually(partial(answers, client.ping), 10)
            await throttle.settle(attempt, FAILED)
            assert {fields[b"n"] for fields in (await state(raw, deployment)).values()} == {b"1"}


# Storms, through the Hasher


@dataclass
class Replica:
    """A login as the use case makes it: reserve when a thread is free, hash, settle."""

    hasher: Hasher
    throttle: Throttle
    stored: str
    hashes: Counter[str] = field(default_factory=Counter)

    async def login(self, password: str, address: str = ADDRESS, account: str = ACCOUNT) -> str:
        reserved: list[Reserved] = []

        async def admit() -> Admission:
            answer = await self.throttle.reserve(address, account)
            if isinstance(answer, Locked):
                raise LoginLocked(answer.retry_after_s)
            if isinstance(answer, Wait):
                return Admission.WAIT
            reserved.append(answer)
            return Admission.HASH

        def work() -> bool:
            self.hashes[password] += 1
            return verify_password(password, self.stored, COST)

        async def settle(matched: bool | None) -> bool:
            outcome = RELEASED if matched is None else SUCCEEDED if matched else FAILED
            await self.throttle.settle(reserved[0], outcome)
            return bool(matched)

        try:
            job = Job(effort=Effort("bcrypt", COST), work=work, admit=admit, settle=settle)
            return "in" if await self.hasher.run_job(job) else "wrong"
        except LoginLocked as error:
            assert error.retry_after_s is not None and 0 < error.retry_after_s <= 300
            return "locked"


@asynccontextmanager
async def replicas(settings: Settings, count: int = 1) -> AsyncIterator[list[Replica]]:
    stored = hash_password(PASSWORD, COST)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(open_redis(settings)) for _ in range(count)]
        tree = await stack.enter_async_context(anyio.create_task_group())
        made = [
            Replica(Hasher(settings.section(HashSettings)), throttle_of(client, settings), stored) for client in clients
        ]
        for replica in made:
            await tree.start(replica.hasher.run)
        yield made
        tree.cancel_scope.cancel()


async def storm(logins: Sequence[Callable[[], Awaitable[str]]]) -> Counter[str]:
    answers: Counter[str] = Counter()

    async def ask(login: Callable[[], Awaitable[str]]) -> None:
        answers[await login()] += 1

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as crowd:
            for login in logins:
                crowd.start_soon(ask, login)
    return answers


@pytest.mark.proof
async def test_ten_thousand_parallel_wrong_guesses_get_fifteen_hashes(make_settings: Callable[..., Settings]) -> None:
    async with replicas(make_settings()) as (replica,):
        answers = await storm([partial(replica.login, "wrong horse")] * 10_000)
        assert answers == {"wrong": 15, "locked": 9_985}
        assert replica.hashes == {"wrong horse": 15}


async def test_two_replicas_share_one_exact_limit_for_each_pair(make_settings: Callable[..., Settings]) -> None:
    # More threads than attempts allowed, so that both replicas meet `Wait`.
    async with replicas(make_settings(hash_threads=20), count=2) as both:
        addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
        guesses = [partial(r.login, "wrong horse", address) for _ in range(100) for r in both for address in addresses]
        answers = await storm(guesses)
        assert answers == {"wrong": 45, "locked": 555}
        assert sum(replica.hashes.total() for replica in both) == 45


@pytest.mark.parametrize("threads", [2, 20])
async def test_sixty_correct_parallel_logins_all_succeed(make_settings: Callable[..., Settings], threads: int) -> None:
    async with replicas(make_settings(hash_threads=threads), count=2) as both:
        answers = await storm([partial(replica.login, PASSWORD) for replica in both for _ in range(30)])
        assert answers == {"in": 60}


async def test_one_failure_short_of_the_limit_correct_logins_pass_one_by_one(
    make_settings: Callable[..., Settings],
) -> None:
    async with replicas(make_settings(hash_threads=8)) as (replica,):
        await storm([partial(replica.login, "wrong horse")] * 14)
        answers = await storm([partial(replica.login, PASSWORD)] * 20)
        assert answers == {"in": 20}
        # The first of them cleared the pair.
        assert await storm([partial(replica.login, "wrong horse")] * 14) == {"wrong": 14}


async def test_a_mixed_crowd_never_hashes_more_wrong_guesses_than_successes_allow(
    make_settings: Callable[..., Settings],
) -> None:
    async with replicas(make_settings(account_max_failures=30), count=2) as both:
        wrong = [partial(replica.login, "wrong horse") for replica in both for _ in range(100)]
        right = [partial(replica.login, PASSWORD) for replica in both for _ in range(2)]
        mixed = [login for group in zip(*[iter(wrong)] * 50, strict=True) for login in (*group, right.pop())]
        answers = await storm(mixed)
        # Successes clear the pair; the account counts on and locks at its own limit.
        assert answers["wrong"] == sum(replica.hashes["wrong horse"] for replica in both) <= 30
        assert answers["wrong"] >= 15
        assert answers.total() == 204
        assert isinstance(await both[0].throttle.reserve(ADDRESS, ACCOUNT), Locked)


async def test_guessers_who_hang_up_are_counted(make_settings: Callable[..., Settings]) -> None:
    async with replicas(make_settings()) as (replica,):
        # Slow enough to leave while it runs.
        replica.stored = hash_password(PASSWORD, 8)

        async def is_hashing(number: int) -> bool:
            return replica.hashes["wrong horse"] == number

        async def is_locked() -> bool:
            return await replica.throttle.locked_s(ADDRESS, ACCOUNT) is not None

        for number in range(1, 16):
            guess = asyncio.ensure_future(replica.login("wrong horse"))
            await eventually(partial(is_hashing, number))
            guess.cancel()
            with pytest.raises(asyncio.CancelledError):
                await guess
        await eventually(is_locked)
        assert await replica.login(PASSWORD) == "locked"
