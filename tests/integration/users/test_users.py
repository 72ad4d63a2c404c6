import json
from functools import partial

import asyncpg
import pytest
from support.deployment import PASSWORD_HASH, World, together

from authd.config import BUCKETS
from authd.infra.subject import Subject

pytestmark = pytest.mark.parametrize("redis_url", ["single"], indirect=True)


async def test_of_concurrent_registrations_of_one_name_one_wins_with_one_event(world: World) -> None:
    spellings = ["Ann@example.org", "ann@EXAMPLE.org", *["ann@example.org"] * 8]
    made = await together(
        *[partial(world.services.postgres.creation.create, name, "ann@example.org", "", "hash") for name in spellings]
    )
    (user,) = [result for result in made if result is not None]
    (row,) = await world.database.fetch("SELECT * FROM users")
    assert (row["id"], row["username"]) == (user.id, user.username)
    (event,) = await world.database.fetch("SELECT * FROM outbox")
    assert (event["lane"], event["user_id"], event["type"]) == (user.id % BUCKETS, user.id, "user.registered")
    assert json.loads(event["value"]) == {
        "user_id": user.id,
        "username": user.username,
        "full_name": "",
        "created_at": user.created_at.isoformat(),
    }


async def test_a_registration_that_fails_leaves_neither_user_nor_event(world: World) -> None:
    await world.database.fetch("ALTER TABLE outbox ADD CHECK (user_id < 0)")
    with pytest.raises(asyncpg.CheckViolationError):
        await world.register()
    assert await world.database.fetch("SELECT FROM users UNION ALL SELECT FROM outbox") == []


async def test_a_taken_name_costs_no_event_of_its_own(world: World) -> None:
    assert await world.services.postgres.creation.create("a@example.org", "a@example.org", "", "hash") is not None
    assert await world.services.postgres.creation.create("a@example.org", "a@example.org", "Other", "hash") is None
    assert [row["count"] for row in await world.database.fetch("SELECT count(*) FROM outbox")] == [1]


async def test_ending_all_sessions_raises_version_and_epoch_and_logs_both_in_one_transaction(world: World) -> None:
    user = await world.register()
    assert (user.version, user.epoch, user.revocation) == (1, 1, 0)
    row = await world.endings.end_all(user.subject, "logout")
    again = await world.users.find(*user.subject)
    assert row is not None and again is not None
    assert (again.version, again.epoch, again.revocation) == (2, 2, row.number)
    assert await world.rows(user.id) == [(None, 2, "logout")]
    await world.database.fetch("ALTER TABLE revocations ADD CHECK (number < 2)")
    with pytest.raises(asyncpg.CheckViolationError):
        await world.endings.end_all(user.subject, "logout")
    assert await world.users.find(*user.subject) == again


async def test_concurrent_endings_of_one_user_are_numbered_in_the_order_of_their_epochs(world: World) -> None:
    user = await world.register()
    await together(*[partial(world.endings.end_all, user.subject, "logout")] * 20)
    assert await world.rows(user.id) == [(None, epoch, "logout") for epoch in range(2, 22)]


async def test_a_user_is_disabled_and_enabled_once(world: World) -> None:
    user = await world.register()
    assert await world.disabling.set_disabled(user.username, disabled=False) is None
    results = await together(*[partial(world.disabling.set_disabled, user.username, disabled=True)] * 5)
    assert sum(row is not None for row in results) == 1
    found = await world.users.find_by_username_key(user.username)
    assert found is not None and found.disabled and (found.version, found.epoch) == (2, 2)
    assert await world.disabling.set_disabled(user.username, disabled=False) is not None
    found = await world.users.find(*user.subject)
    assert found is not None and not found.disabled
    assert [reason for _, _, reason in await world.rows(user.id)] == ["user_disabled", "user_enabled"]


async def test_nothing_is_logged_for_a_user_who_is_not_there(world: World) -> None:
    assert await world.endings.end_all(Subject(404, 1), "logout") is None
    assert await world.disabling.set_disabled("nobody@example.org", disabled=True) is None
    assert await world.users.find(404, None) is None
    assert await world.users.find_of_session(Subject(404, 1), bytes(16)) == (None, None)
    assert await world.revocations.heads() == {}


async def test_a_hash_is_renewed_only_if_it_is_still_the_one_that_was_verified(world: World) -> None:
    user = await world.register()
    await world.users.set_password_hash(user.id, "another", "new")
    found = await world.users.find(*user.subject)
    assert found is not None and found.password_hash == PASSWORD_HASH
    await world.users.set_password_hash(user.id, PASSWORD_HASH, "new")
    found = await world.users.find(*user.subject)
    # The same password: no session ends for it.
    assert found is not None and (found.password_hash, found.epoch) == ("new", user.epoch)


async def test_the_first_reason_of_a_sessions_ending_is_the_one_told(world: World) -> None:
    user = await world.register()
    for reason in ("evicted", "logout"):
        await world.endings.end_sessions(user.subject, [bytes(16)], reason)
    found, ended = await world.users.find_of_session(user.subject, bytes(16))
    assert (found is not None and found.revocation, ended) == (2, "evicted")
    assert (await world.users.find_of_session(user.subject, bytes(15) + b"\1"))[1] is None


async def test_ids_are_not_reused_after_a_deletion(world: World) -> None:
    user = await world.register()
    await world.database.fetch("DELETE FROM users")
    assert (await world.register()).id > user.id
