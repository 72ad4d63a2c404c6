"""authd's Lua scripts: their texts, what their headers say, and a run through all of them."""

import re
import secrets
from importlib.resources import files
from pathlib import Path

import pytest
from support.deployment import CLIENT, World

from authd.config import BUCKETS
from authd.errors import InvalidCredentials
from authd.infra.redis.client import load_script
from authd.infra.subject import Subject
from authd.tokens.refresh import SESSION_ID_BYTES

AUTHD = Path(str(files("authd")))
PATHS = {path.stem: path for path in AUTHD.rglob("*.lua")}
SCRIPTS = {name: path.read_text() for name, path in PATHS.items()}
INCLUDE = re.compile(r"^-- include: (?:[\w/]+/)?(\w+)$", re.MULTILINE)
INCLUDED = {name for text in SCRIPTS.values() for name in INCLUDE.findall(text)}
#: In a header, two spaces stand before each number.
NUMBERED = re.compile(r" {2,}(\d+) ")


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
