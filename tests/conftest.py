"""Fixtures for every test: the backend, and the guards that keep unit tests off the network and the loop unblocked."""

import socket
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import uvloop
from blockbuster import blockbuster_ctx
from hypothesis import settings
from support.paths import TESTS
from support.ports import take_slice

# The same examples in every run, and none too slow: a build does not turn red by itself on a busy machine.
settings.register_profile("authd", deadline=None, derandomize=True)
settings.load_profile("authd")

pytest_plugins = [
    "support.limits",
    "support.stores",
    "support.process",
    "support.services",
    "support.deployment",
    "support.faults",
]

LOOP_GUARDED = {"unit", "integration"}
#: What a process does once and then has in memory: imports inside libraries, redis-py's look at its own version, and
#: the scripts and the list of common passwords.
ONCE = (
    ("<frozen importlib._bootstrap>", "_find_and_load"),
    ("importlib/metadata/__init__.py", "version"),
    ("authd/infra/redis/client.py", "load_script"),
    ("authd/passwords/weak.py", "__init__"),
)
INTERNET = {socket.AF_INET, socket.AF_INET6}


#: The order of the rungs where several processes share them: what takes longest first, so that none is left with it.
LONGEST_FIRST = ["fault", "e2e", "integration"]


def pytest_configure() -> None:
    take_slice()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS / "fault"):
            item.add_marker("proof")
    if hasattr(config, "workerinput"):
        rungs = {rung: place for place, rung in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: rungs.get(_folder(item), len(rungs)))


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a unit test that opens a socket. The event loop's own pair (AF_UNIX) still works."""
    if _folder(request.node) != "unit":
        return

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("a unit test opened a socket")

    open_socket = socket.socket.__init__

    def open_local(
        self: socket.socket, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None
    ) -> None:
        # Without a family the default is AF_INET, except for a descriptor, which knows its own.
        if family in INTERNET or (family == -1 and fileno is None):
            refuse()
        open_socket(self, family, type, proto, fileno)

    monkeypatch.setattr(socket.socket, "__init__", open_local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # uvloop opens its sockets in C.
    for name in ("create_connection", "create_server", "create_datagram_endpoint", "getaddrinfo"):
        monkeypatch.setattr(uvloop.Loop, name, refuse)


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Fail a test in which authd's code blocks the event loop. Libraries and tests may: they are not the service."""
    if _folder(request.node) not in LOOP_GUARDED:
        yield None
        return
    with blockbuster_ctx("authd") as guard:
        for function in guard.functions.values():
            for filename, name in ONCE:
                function.can_block_in(filename, name)
        yield guard


def _folder(node: pytest.Item) -> str:
    return node.path.relative_to(TESTS).parts[0] if node.path.is_relative_to(TESTS) else ""
