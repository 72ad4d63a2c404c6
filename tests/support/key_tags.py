"""Watches the keys that scripts get: all of one call carry the tag of one bucket."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from redis.commands.core import AsyncScript

from authd.config import BUCKETS
from authd.infra.redis.client import load_script

AUTHD = Path(str(files("authd")))
KEY = re.compile(r"authd:[\w.-]+:\{(\d+)\}:.+", re.DOTALL)


@pytest.fixture(scope="session")
def own_scripts() -> set[str]:
    """The texts of authd's scripts: a test may run others."""
    return {load_script(f"authd.{path.parent.name}", path.stem) for path in AUTHD.glob("*/*.lua")}


def stray_keys(keys: list[str]) -> list[str]:
    """Return the keys of one call that carry no bucket's tag, or all of them where they carry different ones."""
    tags = {key: match[1] if (match := KEY.fullmatch(key)) and int(match[1]) < BUCKETS else None for key in keys}
    untagged = [key for key, tag in tags.items() if tag is None]
    return untagged or (keys if len(set(tags.values())) != 1 else [])


@pytest.fixture(autouse=True)
def tagged_keys(monkeypatch: pytest.MonkeyPatch, own_scripts: set[str]) -> Iterator[None]:
    """Fail a test in which a script got a key outside of its bucket: on a cluster it would be in another slot."""
    stray: list[tuple[str, list[str]]] = []
    run = AsyncScript.__call__

    async def checked(self: AsyncScript, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        text = self.script if isinstance(self.script, str) else bytes(self.script).decode()
        if text in own_scripts and (found := stray_keys(list(keys))):
            stray.append((text.partition("\n")[0], found))
        return await run(self, keys, args, client)

    monkeypatch.setattr(AsyncScript, "__call__", checked)
    yield
    assert stray == [], "keys without one bucket's tag"
