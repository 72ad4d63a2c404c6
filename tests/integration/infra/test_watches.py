"""Two rules that every test of this folder is watched for: the order of locks in Postgres, and the tags of Redis keys.

Here each flow that ends sessions is run once, and the watches themselves are proven to notice a violation.
"""

from collections.abc import Awaitable, Callable

import asyncpg
import pytest
from support.deployment import MakeWorld, ScriptCall, World
from support.key_tags import stray_keys
from support.scripts import use_every_script

LOCK_USER = "SELECT FROM users WHERE id = 1 FOR NO KEY UPDATE"
CHANGE_USER = "UPDATE users SET version = version + 1 WHERE id = 1"
LOCK_HEAD = "UPDATE revocation_heads SET last_number = last_number + 1 WHERE bucket = 1"


async def in_one_transaction(database_url: str, *statements: str) -> list[bool]:
    """Run the statements and return what the watch noted: whether users were locked before the head."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement)
        return [row["users_first"] for row in await connection.fetch("SELECT users_first FROM watch.transactions")]
    finally:
        await connection.close()


@pytest.mark.parametrize("user", [LOCK_USER, CHANGE_USER])
async def test_a_head_that_is_locked_before_a_user_fails_the_commit(database_url: str, user: str) -> None:
    with pytest.raises(asyncpg.RaiseError, match="lock order"):
        await in_one_transaction(database_url, LOCK_HEAD, user)
    assert await in_one_transaction(database_url, user, LOCK_HEAD) == [True]


async def test_a_head_alone_and_a_user_who_is_only_read_are_in_order(database_url: str) -> None:
    assert await in_one_transaction(database_url, LOCK_HEAD, "SELECT * FROM users") == [False]


Flow = Callable[[World], Awaitable[object]]


async def log_out(world: World) -> None:
    pair = await world.open(await world.register())
    await world.sessions.logout(pair.access_token, "current")


async def end_all(world: World) -> None:
    user = await world.register()
    await world.open(user)
    await world.end_all(user)


async def disable_and_enable(world: World) -> None:
    user = await world.register()
    await world.set_disabled(user, "user_disabled")
    await world.set_disabled(user, "user_enabled")


async def delete(world: World) -> None:
    user = await world.register()
    await world.database.fetch("DELETE FROM users WHERE id = $1", user.id)


async def evict(world: World) -> None:
    user = await world.register()
    for _ in range(world.settings.max_active_sessions + 1):
        pair = await world.open(user)
        await world.until_ms(world.token(pair).created_ms)
    await world.until_rows(user.id, 1)


async def reuse(world: World) -> None:
    user = await world.register()
    first = await world.open(user)
    newer = await world.refresh(first.refresh_token)
    await world.until_grace_is_over(newer)
    assert await world.outcome(first.refresh_token) == "refresh_token_reused"
    await world.until_rows(user.id, 1)


@pytest.mark.parametrize("flow", [log_out, end_all, disable_and_enable, delete, evict, reuse], ids=lambda f: f.__name__)
async def test_every_ending_locks_its_user_before_the_head(make_world: MakeWorld, flow: Flow) -> None:
    world = await make_world(refresh_grace_s=0.05)
    await flow(world)
    noted = await world.database.fetch("SELECT users_first FROM watch.transactions")
    assert noted and all(row["users_first"] for row in noted)


def test_a_key_outside_of_its_bucket_is_noticed() -> None:
    tagged, other = "authd:t-1:{7}:user:263", "authd:t-1:{8}:applied"
    assert stray_keys([tagged, "authd:t-1:{7}:applied"]) == []
    assert stray_keys([tagged, "authd:t-1:user:{263}"]) == ["authd:t-1:user:{263}"]
    assert stray_keys([tagged, other]) == [tagged, other]
    assert stray_keys(["authd:t-1:{256}:applied"]) == ["authd:t-1:{256}:applied"]


async def test_every_script_gets_keys_of_its_own_deployment(
    make_world: MakeWorld, script_calls: list[ScriptCall]
) -> None:
    world = await make_world(refresh_grace_s=0.05)
    await use_every_script(world)
    prefix = f"authd:{world.settings.deployment}:{{"
    assert script_calls
    assert [key for call in script_calls for key in call.keys if not key.startswith(prefix)] == []
