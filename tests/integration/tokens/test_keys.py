"""The key ring over a real Postgres: who makes keys, when they count, and when they go. No test waits for a key to age:
the table's times are moved instead.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import anyio
import pytest
from prometheus_client import REGISTRY
from support.deployment import JWT_SECRET, together
from support.waiting import eventually

from authd.config import Secret, Settings
from authd.embedded import PostgresServer
from authd.infra.postgres.database import Database, open_database
from authd.infra.subject import Subject
from authd.tokens.access import InvalidToken, MintSettings, TokenMint, decode_base64url
from authd.tokens.device import DEVICE_TTL_S
from authd.tokens.keeper import EXPIRY_MARGIN, KeyKeeper, KeySettings, SealedByAnotherSecret
from authd.tokens.postgres import Keys
from authd.tokens.ring import KeyRing

SESSION = bytes(range(16))
PUBLISH_S, MAX_AGE_S, ACCESS_TTL_S = 900, 90 * 86_400, 1800
MARGIN_S = EXPIRY_MARGIN.total_seconds()
PURPOSES = ["ES256", "data", "mac"]
ROTATING = ["ES256", "mac"]

MakeKeeper = Callable[..., Coroutine[Any, Any, KeyKeeper]]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """To look at the table, and to move its times."""
    async with open_database(settings_for(database_url)) as database:
        yield database


@pytest.fixture
async def make_keeper(database_url: str) -> AsyncIterator[MakeKeeper]:
    """Makes the keeper of another replica, with connections of its own."""
    async with AsyncExitStack() as stack:

        async def make(ahead_s: float = 0.0, **changes: Any) -> KeyKeeper:
            settings = settings_for(database_url, **changes)
            keys = Keys(await stack.enter_async_context(open_database(settings)))
            return KeyKeeper(settings.section(KeySettings), keys, clock=lambda: time.time() + ahead_s)

        yield make


@pytest.fixture
async def keeper(make_keeper: MakeKeeper) -> KeyKeeper:
    return await make_keeper()


def settings_for(database_url: str, **changes: Any) -> Settings:
    stores = {"database_url": Secret(database_url), "redis_url": Secret("redis://unused"), "secret": Secret("s" * 32)}
    return Settings(**stores | {"database_timeout_s": 10.0} | changes)


async def rows(database: Database) -> list[dict[str, Any]]:
    return [dict(row) for row in await database.fetch("SELECT * FROM keys ORDER BY id")]


async def purposes(database: Database) -> list[str]:
    return sorted(row["purpose"] for row in await rows(database))


async def let_pass(database: Database, seconds: float) -> None:
    """Make every key that much older."""
    await database.fetch("UPDATE keys SET created_at = created_at - $1::interval", timedelta(seconds=seconds))
    # The first keys count since ever.
    await database.fetch(
        "UPDATE keys SET active_at = active_at - $1::interval WHERE active_at > to_timestamp(0)",
        timedelta(seconds=seconds),
    )


def published(ring: KeyRing) -> list[str]:
    return [key["kid"] for key in ring.jwks()["keys"]]


def signer(ring: KeyRing, after_s: float = 0) -> str:
    """The id of the key that signs in so many seconds."""
    return ring.signing_key("ES256", time.time() + after_s).kid


# The first keys


async def test_replicas_that_start_together_on_an_empty_database_agree_on_one_key_of_each_kind(
    make_keeper: MakeKeeper, database: Database
) -> None:
    keepers = [await make_keeper() for _ in range(8)]
    rings = await together(*(keeper.load for keeper in keepers))
    assert await purposes(database) == PURPOSES
    assert len({(*published(ring), ring.mac_key(time.time()).id) for ring in rings}) == 1
    mints = [TokenMint(settings_for("-").section(MintSettings), ring) for ring in rings]
    for mint in mints:
        token = mint.make_access(Subject(7, 1), SESSION, 1, "jti")
        assert [other.read_access(token).user_id for other in mints] == [7] * len(mints)


async def test_the_first_keys_count_at_once_also_for_a_clock_that_is_behind(keeper: KeyKeeper) -> None:
    ring = await keeper.load()
    assert signer(ring, after_s=-10 * 365 * 86_400) == signer(ring)
    assert ring.mac_key(1.0) == ring.mac_key(time.time())


async def test_a_restart_makes_no_key(make_keeper: MakeKeeper, database: Database) -> None:
    first = await (await make_keeper()).load()
    before = await rows(database)
    second = await (await make_keeper()).load()
    assert await rows(database) == before
    assert published(first) == published(second)


async def test_with_a_shared_secret_no_signing_key_is_made(make_keeper: MakeKeeper, database: Database) -> None:
    ring = await (await make_keeper(jwt_algorithm="HS256", jwt_secret=JWT_SECRET)).load()
    assert await purposes(database) == ["data", "mac"]
    assert published(ring) == []
    assert ring.signing_key("HS256", time.time()).kid == "shared"


async def test_after_a_change_of_the_algorithm_older_tokens_are_still_good(make_keeper: MakeKeeper) -> None:
    old = TokenMint(settings_for("-").section(MintSettings), await (await make_keeper()).load())
    token = old.make_access(Subject(7, 1), SESSION, 1, "jti")
    changed = await (await make_keeper(jwt_algorithm="Ed25519")).load()
    mint = TokenMint(settings_for("-", jwt_algorithm="Ed25519").section(MintSettings), changed)
    assert len(published(changed)) == 2
    assert mint.read_access(token).user_id == 7
    assert mint.read_access(mint.make_access(Subject(8, 1), SESSION, 1, "jti")).user_id == 8


# Rotation by age


async def test_young_keys_are_left_alone(keeper: KeyKeeper, database: Database) -> None:
    await keeper.load()
    await let_pass(database, MAX_AGE_S - 60)
    await keeper.load()
    assert await purposes(database) == PURPOSES


async def test_two_keepers_that_find_keys_too_old_add_one_of_each_kind(
    make_keeper: MakeKeeper, database: Database
) -> None:
    keepers = [await make_keeper() for _ in range(2)]
    rings = [await keeper.load() for keeper in keepers]
    for count in (2, 3, 4):
        await let_pass(database, PUBLISH_S + MAX_AGE_S + 60)
        refreshes = [lambda k=keeper, r=ring: k.refresh(r) for keeper, ring in zip(keepers, rings, strict=True)]
        assert await together(*refreshes * 4) == [None] * 8
        added = [row for row in await rows(database) if row["created_at"].timestamp() > time.time() - 60]
        assert sorted(row["purpose"] for row in added) == ROTATING, count
        assert published(rings[0]) == published(rings[1])


async def test_a_key_that_is_published_and_does_not_count_yet_is_not_due_again(
    keeper: KeyKeeper, database: Database
) -> None:
    await keeper.load()
    await let_pass(database, MAX_AGE_S + 60)
    for _ in range(3):
        await keeper.load()
    assert await purposes(database) == sorted(PURPOSES + ROTATING)


async def test_running_replicas_rotate_and_follow_by_themselves(make_keeper: MakeKeeper, database: Database) -> None:
    keepers = [await make_keeper(key_publish_s=0.5) for _ in range(2)]
    rings = [await keeper.load() for keeper in keepers]
    [first] = published(rings[0])
    async with anyio.create_task_group() as tree:
        for keeper, ring in zip(keepers, rings, strict=True):
            await tree.start(keeper.follow, ring)
        await let_pass(database, MAX_AGE_S + 60)

        async def both_sign_with_the_next() -> bool:
            return all(signer(ring) != first for ring in rings)

        await eventually(both_sign_with_the_next)
        tree.cancel_scope.cancel()
    assert signer(rings[0]) == signer(rings[1])
    assert await purposes(database) == sorted(PURPOSES + ROTATING)


# Next, current, previous


async def test_a_key_is_published_before_it_signs(keeper: KeyKeeper, make_keeper: MakeKeeper) -> None:
    ring = await keeper.load()
    [first] = published(ring)
    mac = ring.mac_key(time.time()).id
    signing = [kid for kid in await (await make_keeper()).rotate() if kid != first]
    await keeper.refresh(ring)
    [next_] = [kid for kid in published(ring) if kid != first]
    assert next_ in signing
    assert (signer(ring), signer(ring, PUBLISH_S - 10), signer(ring, PUBLISH_S + 10)) == (first, first, next_)
    assert ring.mac_key(time.time()).id == mac != ring.mac_key(time.time() + PUBLISH_S + 10).id
    # Each replica proves what either key made, before and after.
    now = time.time()
    tokens = [
        TokenMint(settings_for("-").section(MintSettings), ring, clock=lambda s=s: now + s).make_access(
            Subject(7, 1), SESSION, 1, "j"
        )
        for s in (0, PUBLISH_S + 10)
    ]
    # By a replica whose clock is between theirs.
    mint = TokenMint(settings_for("-").section(MintSettings), ring, clock=lambda: now + PUBLISH_S)
    assert [mint.read_access(token).user_id for token in tokens] == [7, 7]


async def test_rotations_in_a_row_count_one_after_the_other(keeper: KeyKeeper, database: Database) -> None:
    ring = await keeper.load()
    kids = published(ring)
    for _ in range(3):
        await keeper.rotate()
        await let_pass(database, PUBLISH_S / 4)
        await keeper.refresh(ring)
        kids += [kid for kid in published(ring) if kid not in kids]
    assert published(ring) == kids
    assert len(kids) == 4
    assert [signer(ring, quarters * PUBLISH_S / 4 + 10) for quarters in range(4)] == kids


@pytest.mark.parametrize(("purpose", "life_s"), [("ES256", ACCESS_TTL_S), ("mac", DEVICE_TTL_S)])
async def test_a_previous_key_stays_until_its_last_token_has_expired(
    keeper: KeyKeeper, database: Database, purpose: str, life_s: int
) -> None:
    ring = await keeper.load()
    [first] = [row["kid"] for row in await rows(database) if row["purpose"] == purpose]

    async def kids() -> list[str]:
        await keeper.refresh(ring)
        return [row["kid"] for row in await rows(database) if row["purpose"] == purpose]

    await keeper.rotate()
    await let_pass(database, PUBLISH_S + life_s + MARGIN_S - 60)
    assert first in await kids()
    await let_pass(database, 120)
    assert first not in await kids()
    assert (first in published(ring)) is False


async def test_a_deleted_keys_tokens_are_refused(keeper: KeyKeeper, database: Database) -> None:
    ring = await keeper.load()
    mint = TokenMint(settings_for("-").section(MintSettings), ring)
    token = mint.make_access(Subject(7, 1), SESSION, 1, "jti")
    await keeper.rotate()
    await let_pass(database, PUBLISH_S + ACCESS_TTL_S + MARGIN_S + 60)
    await keeper.refresh(ring)
    with pytest.raises(InvalidToken):
        mint.read_access(token)


async def test_the_newest_key_is_never_deleted_however_old(keeper: KeyKeeper, database: Database) -> None:
    ring = await keeper.load()
    await let_pass(database, 10 * MAX_AGE_S)
    await keeper.refresh(ring)
    # The only key goes on signing until its successor counts.
    assert await purposes(database) == sorted(PURPOSES + ROTATING)
    [first, _] = published(ring)
    assert signer(ring) == first


# Clocks that are wrong


@pytest.mark.parametrize("ahead_s", [3600, 200 * 86_400, -3600, -200 * 86_400])
async def test_a_replica_whose_clock_is_wrong_takes_no_key_from_the_others(
    make_keeper: MakeKeeper, database: Database, ahead_s: float
) -> None:
    healthy = await make_keeper()
    ring = await healthy.load()
    mint = TokenMint(settings_for("-").section(MintSettings), ring)
    token = mint.make_access(Subject(7, 1), SESSION, 1, "jti")
    await healthy.rotate()
    before = await rows(database)
    wrong = await make_keeper(ahead_s=ahead_s)
    wrong_ring = await wrong.load()
    await healthy.refresh(ring)
    assert await rows(database) == before
    assert mint.read_access(token).user_id == 7
    assert mint.read_access(mint.make_access(Subject(8, 1), SESSION, 1, "jti")).user_id == 8
    # And it signs with the same keys as the others, before and after the next ones count.
    for after_s in (0, PUBLISH_S - 10, PUBLISH_S + 10):
        assert signer(wrong_ring, after_s + ahead_s) == signer(ring, after_s)
        now = time.time() + after_s
        assert wrong_ring.mac_key(now + ahead_s).id == ring.mac_key(now).id


@pytest.mark.parametrize("ahead_s", [3600, -3600])
async def test_a_key_that_is_over_is_deleted_by_a_replica_whose_clock_agrees_with_postgres_and_by_no_other(
    make_keeper: MakeKeeper, database: Database, ahead_s: float
) -> None:
    healthy = await make_keeper()
    await healthy.load()
    await healthy.rotate()
    before = {row["id"] for row in await rows(database)}
    await let_pass(database, PUBLISH_S + DEVICE_TTL_S + MARGIN_S + 60)
    # Of the two clocks one is wrong, and it may be Postgres's: a deleted key does not come back.
    await (await make_keeper(ahead_s=ahead_s)).load()
    assert before <= {row["id"] for row in await rows(database)}
    await healthy.load()
    assert len(before & {row["id"] for row in await rows(database)}) == len(PURPOSES)


async def test_what_is_over_is_decided_when_it_is_deleted_and_not_when_it_was_read(
    keeper: KeyKeeper, database: Database
) -> None:
    await keeper.load()
    await keeper.rotate()
    before = await rows(database)
    await keeper._keys.delete_over(keeper._lives)
    assert await rows(database) == before


# The key of what is kept


async def test_the_data_key_is_made_once_never_rotates_never_goes_and_is_never_published(
    make_keeper: MakeKeeper, database: Database
) -> None:
    rings = await together(*[(await make_keeper()).load for _ in range(8)])
    assert len({ring.digest_key() for ring in rings}) == 1
    keeper = await make_keeper()
    [made] = [row for row in await rows(database) if row["purpose"] == "data"]
    for _ in range(3):
        await keeper.rotate()
        await let_pass(database, PUBLISH_S + 10 * MAX_AGE_S)
        await keeper.load()
    [kept] = [row for row in await rows(database) if row["purpose"] == "data"]
    assert (kept["id"], kept["sealed"]) == (made["id"], made["sealed"])
    ring = await keeper.load()
    assert ring.digest_key() == rings[0].digest_key()
    assert made["kid"] not in published(ring)


async def test_the_oldest_data_key_makes_the_digests(keeper: KeyKeeper, database: Database) -> None:
    before = (await keeper.load()).digest_key()
    await keeper._keys.add(keeper._make("data"), timedelta())
    assert (await keeper.load()).digest_key() == before


async def test_another_deployment_has_another_data_key_and_none_is_the_stored_text(
    keeper: KeyKeeper, database: Database
) -> None:
    first = (await keeper.load()).digest_key()
    await database.fetch("DELETE FROM keys")
    assert len({first, (await keeper.load()).digest_key()}) == 2
    for row in await rows(database):
        _, _, _, ciphertext, _ = row["sealed"].split(".")
        assert first not in (decode_base64url(ciphertext) or b"")


async def test_a_key_of_an_unknown_purpose_is_a_newer_replicas(keeper: KeyKeeper, database: Database) -> None:
    ring = await keeper.load()
    await database.fetch("INSERT INTO keys (purpose, kid, sealed, active_at) VALUES ('later', 'k', 's', now())")
    await keeper.refresh(ring)
    assert len(published(ring)) == 1


# Sealed


async def test_a_stored_key_tells_nothing_without_the_secret(keeper: KeyKeeper, database: Database) -> None:
    ring = await keeper.load()
    [private] = [key.key.as_dict(private=True)["d"] for key in [ring.signing_key("ES256", time.time())]]
    mac = ring.mac_key(time.time()).secret
    stored = await rows(database)
    for row in stored:
        assert set(row) == {"id", "purpose", "kid", "sealed", "active_at", "created_at"}
        _, _, _, ciphertext, _ = row["sealed"].split(".")
        for text in (json.dumps(row, default=str).encode(), decode_base64url(ciphertext) or b""):
            assert private.encode() not in text
            assert mac not in text
            assert (decode_base64url(private) or b"-") not in text


async def test_the_previous_secret_opens_what_it_sealed_and_new_keys_are_sealed_under_the_new_one(
    make_keeper: MakeKeeper, database: Database
) -> None:
    old, new = Secret(secrets.token_hex(32)), Secret(secrets.token_hex(32))
    before = await (await make_keeper(secret=old)).load()
    moving = await make_keeper(secret=new, secret_previous=old)
    assert published(await moving.load()) == published(before)
    await moving.rotate()
    # A start with both has sealed all keys anew: the old secret is needed no more.
    after = await (await make_keeper(secret=new)).load()
    assert published(after)[:1] == published(before)
    assert after.digest_key() == before.digest_key()
    with pytest.raises(SealedByAnotherSecret):
        await (await make_keeper(secret=old)).load()


async def test_a_wrong_secret_is_said_in_a_sentence_and_makes_no_key(
    make_keeper: MakeKeeper, database: Database
) -> None:
    await (await make_keeper()).load()
    before = await rows(database)
    wrong = await make_keeper(secret=Secret("w" * 32))
    with pytest.raises(SealedByAnotherSecret, match=r"sealed under another AUTHD_SECRET\. .*AUTHD_SECRET_PREVIOUS"):
        await wrong.load()
    assert await rows(database) == before


async def test_a_running_replica_that_cannot_open_a_key_goes_on_with_those_it_has(
    make_keeper: MakeKeeper, database: Database
) -> None:
    """A rollout that changes the secret: the replicas with the old one meet a key of the new one."""
    old, new = Secret("o" * 32), Secret("n" * 32)
    behind = await make_keeper(secret=old, key_publish_s=0.25)
    ring = await behind.load()
    kids = published(ring)
    async with anyio.create_task_group() as tree:
        await tree.start(behind.follow, ring)
        await (await make_keeper(secret=new, secret_previous=old)).rotate()
        await anyio.sleep(0.3)
        assert published(ring) == kids
        await database.fetch("DELETE FROM keys WHERE active_at > now()")
        await (await make_keeper(secret=old)).rotate()

        async def reads_again() -> bool:
            return len(published(ring)) == 2

        await eventually(reads_again)
        tree.cancel_scope.cancel()


async def test_a_read_that_postgres_did_not_answer_is_counted_and_the_next_one_is_tried(
    make_keeper: MakeKeeper, postgres_server: PostgresServer
) -> None:
    keeper = await make_keeper(key_publish_s=0.25, database_timeout_s=1.5)
    ring = await keeper.load()
    kids, before = published(ring), times_away()

    async def is_counted_twice() -> bool:
        return times_away() >= before + 2

    async with anyio.create_task_group() as tree:
        await tree.start(keeper.follow, ring)
        await postgres_server.pause()
        try:
            await eventually(is_counted_twice)
        finally:
            await postgres_server.resume()
        assert published(ring) == kids
        tree.cancel_scope.cancel()


def times_away() -> float:
    return REGISTRY.get_sample_value("authd_unavailable_total", {"part": "user_store"}) or 0.0


async def test_rows_cannot_be_swapped_for_one_another(keeper: KeyKeeper, database: Database) -> None:
    await keeper.load()
    await keeper.rotate()
    first, second = [row for row in await rows(database) if row["purpose"] == "ES256"]
    await database.fetch("UPDATE keys SET sealed = $2 WHERE id = $1", first["id"], second["sealed"])
    with pytest.raises(SealedByAnotherSecret):
        await keeper.load()
