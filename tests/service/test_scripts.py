"""The Lua scripts and the named queries: none unused, none unknown, and each called as its header says."""

import ast
import re
import secrets
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import anyio
import pytest
from redis.commands.core import AsyncScript
from service.world import CLIENT, MakeWorld, ScriptCall, World

from authd.config import BUCKETS
from authd.errors import InvalidCredentials
from authd.infra.postgres.queries import load_queries
from authd.infra.redis.client import load_script
from authd.infra.subject import Subject
from authd.tokens.refresh import SESSION_ID_BYTES

AUTHD = Path(str(files("authd")))
PATHS = {path.stem: path for path in AUTHD.rglob("*.lua")}
SCRIPTS = {name: path.read_text() for name, path in PATHS.items()}
QUERIES = {path for path in AUTHD.rglob("*.sql") if path.parent.name != "migrations" and path.name != "schema.sql"}
INCLUDE = re.compile(r"^-- include: (?:[\w/]+/)?(\w+)$", re.MULTILINE)
INCLUDED = {name for text in SCRIPTS.values() for name in INCLUDE.findall(text)}
#: In a header, two spaces stand before each number.
NUMBERED = re.compile(r" {2,}(\d+) ")


def constants(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def query_names(tree: ast.AST) -> Iterator[str]:
    """What stands in the brackets of `_QUERIES[...]`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "_QUERIES":
            choices = [node.slice.body, node.slice.orelse] if isinstance(node.slice, ast.IfExp) else [node.slice]
            yield from (choice.value for choice in choices if isinstance(choice, ast.Constant))


def header(name: str) -> dict[str, int]:
    """How many KEYS and ARGV the script's header names."""
    lines = [line for line in SCRIPTS[name].splitlines() if line.startswith("--")]
    found = {"KEYS": 0, "ARGV": 0}
    section = ""
    for line in lines:
        if match := re.match(r"-- (KEYS|ARGV)\b", line):
            section = match[1]
            line = line.replace(section, " " * 4)
        elif not re.match(r"-- {3,}\d", line):
            section = ""
        if section:
            found[section] = max([found[section], *map(int, NUMBERED.findall(line))])
    return found


def package_of(path: Path) -> str:
    return ".".join(["authd", *path.parent.relative_to(AUTHD).parts])


def script_text(name: str) -> str:
    return load_script(package_of(PATHS[name]), name)


def body(name: str) -> str:
    return re.sub(r"--.*", "", script_text(name))


def test_every_query_is_used_and_every_used_one_is_there() -> None:
    used = {path: set(query_names(ast.parse(path.with_suffix(".py").read_text()))) for path in QUERIES}
    assert used == {path: set(load_queries(package_of(path), path.stem)) for path in QUERIES}


def test_every_script_is_loaded_or_included() -> None:
    named = set().union(*(constants(ast.parse(path.read_text())) for path in AUTHD.rglob("redis*/*.py")))
    named |= set().union(*(constants(ast.parse(path.read_text())) for path in AUTHD.rglob("redis.py")))
    assert named & SCRIPTS.keys() | INCLUDED == SCRIPTS.keys()


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - INCLUDED))
def test_a_scripts_header_names_the_keys_and_arguments_that_it_reads(name: str) -> None:
    for kind, count in header(name).items():
        used = {int(number) for number in re.findall(rf"{kind}\[(\d+)\]", body(name))}
        assert used == set(range(1, count + 1)), kind
    text = SCRIPTS[name]
    assert text.startswith("-- ") and "\n-- Returns " in text
    # Keys come from KEYS alone: on a cluster another one would be in another slot.
    for call in re.findall(r"redis\.call\('\w+', ([^,)]+)", body(name)):
        assert re.fullmatch(r"KEYS\[\d\]|key", call), call


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


async def use_every_script(world: World) -> None:
    """Through what the service does, as far as that leads."""
    await world.redis.time_s()
    user = await world.register()
    pairs = []
    for _ in range(12):  # two are evicted
        pairs.append(await world.open(user))
        await world.until_ms(world.token(pairs[-1]).created_ms)
    await world.bearer(pairs[-1].access_token)  # caches the user
    await world.bearer(pairs[-1].access_token)
    newer = await world.refresh(pairs[-1].refresh_token)
    await world.until_grace_is_over(newer)
    assert await world.outcome(pairs[-1].refresh_token) == "refresh_token_reused"
    await world.sessions.list_own(pairs[-2].access_token)
    # A rebuilt session older than a full set, and one that Postgres refuses.
    await world.raw.hdel(world.hash_key(user.id), world.token(pairs[2]).session_id)
    for _ in range(2):
        await world.open(user)
    assert await world.outcome(pairs[2].refresh_token) == "session_evicted"
    await world.store.bury(world.token(pairs[3]), "logout")
    forgotten = world.mint.make_refresh(world.token(pairs[0]))
    await world.raw.hdel(world.hash_key(user.id), world.token(pairs[0]).session_id)
    assert await world.outcome(forgotten) == "session_evicted"
    await world.end_all(user)
    await world.store.skip((user.id + 1) % BUCKETS, 0, 3)
    await world.store.apply(
        Subject(user.id + 2, 1), 0, 1, session_id=secrets.token_bytes(SESSION_ID_BYTES), epoch=None, reason="logout"
    )
    await world.login(user)
    with pytest.raises(InvalidCredentials):
        await world.login(user, "wrong")
    attempt = await world.throttle.reserve(CLIENT.address, "somebody@example.org")
    assert attempt
    await world.throttle.count_registration(CLIENT.address)
    await world.throttle.forgive("somebody@example.org", CLIENT.address)
