"""The Lua scripts, run: each is called as its header says, and a second run of the same call changes nothing."""

import anyio
import pytest
from redis.commands.core import AsyncScript
from support.deployment import MakeWorld, ScriptCall
from support.scripts import INCLUDED, SCRIPTS, header, script_text, use_every_script


async def test_every_call_passes_what_the_scripts_header_names(
    make_world: MakeWorld, script_calls: list[ScriptCall]
) -> None:
    world = await make_world(refresh_grace_s=0.05)
    await use_every_script(world)
    texts = {script_text(name): name for name in SCRIPTS}
    called = set()
    for call in script_calls:
        script = call.script.script
        name = texts[script if isinstance(script, str) else script.decode()]
        called.add(name)
        assert {"KEYS": len(call.keys), "ARGV": len(call.arguments)} == header(name), name
        assert len({world.raw.keyslot(key) for key in call.keys} if world.is_cluster else {0}) == 1
    assert called == SCRIPTS.keys() - INCLUDED


async def test_a_script_that_ran_twice_changed_nothing_the_second_time(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world(refresh_grace_s=0.05)
    run = AsyncScript.__call__
    statuses: set[bytes] = set()
    alone = anyio.Lock()

    async def twice(self: AsyncScript, keys: list[str], args: list[object], client: object = None) -> object:
        async with alone:
            reply = await run(self, keys, args)
            after_one = await world.dump()
            again = await run(self, keys, args)
            after_two = await world.dump()
        if "registrations" in keys[0]:  # counts twice, and says so
            return reply
        if "profile" not in keys[0]:
            assert after_two == after_one, (reply, again)
        assert {key: value for key, (value, _) in after_two.items()} == {
            key: value for key, (value, _) in after_one.items()
        }
        if isinstance(reply, list):
            statuses.add(reply[0])
        return reply

    monkeypatch.setattr(AsyncScript, "__call__", twice)
    await use_every_script(world)
    assert statuses >= {b"opened", b"evicted", b"rotated", b"reused", b"applied", b"buried", b"live", b"listed"}
