"""Floods of logins that break no rule and lock nothing: everybody else still gets in, at every try.

The connections of a flood are more than the queue has places, and each asks again as soon as it is answered.
"""

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import cycle
from urllib.parse import urlencode

import anyio
import httpx
import pytest
from support.api import Account, Api
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.proof, pytest.mark.timeout(180)]

CONNECTIONS = 300
OWN_ACCOUNTS = 5
TRIES = 8
ATTACKER, NEIGHBOUR, VICTIM = "127.1.2.3", "127.1.2.4", "127.9.9.9"
EIGHT = [f"127.{number}.2.3" for number in range(1, 9)]

#: The path and the body of a request.
Request = tuple[str, bytes]


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    settings = {
        "AUTHD_BCRYPT_COST": "9",
        "AUTHD_HASH_THREADS": "1",
        "AUTHD_HASH_QUEUE_MAX": "100",
        # No lock ends the flood, as an attacker with as many addresses would have it.
        "AUTHD_ADDRESS_MAX_FAILURES": "100000",
    }
    async with services.running(**settings) as process:
        yield process


class Client(Api):
    """From an address of the test's choice."""

    def __init__(self, service: ServiceProcess, address: str) -> None:
        super().__init__(service.url, service.secrets, address)


def login(username: str, password: str, device_token: str = "") -> Request:
    form = {"username": username, "password": password} | ({"device_token": device_token} if device_token else {})
    return "/auth/login", urlencode(form).encode()


def invented() -> Request:
    return login(f"{secrets.token_hex(8)}@example.com", "any password")


def registration() -> Request:
    body = {"username": f"{secrets.token_hex(8)}@example.com", "password": "a pass phrase 42"}
    return "/auth/register", json.dumps(body).encode()


async def own_logins(service: ServiceProcess, address: str) -> Callable[[], Request]:
    """Right logins of known devices, of an attacker's own accounts in turn."""
    requests = []
    async with Client(service, address) as api:
        for _ in range(OWN_ACCOUNTS):
            account = await api.new_account()
            requests.append(login(account.username, account.password, await device_token_of(api, account)))
    return cycle(requests).__next__


async def device_token_of(api: Api, account: Account) -> str:
    answer = await api.login(account.username, account.password)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["device_token"])


async def ask_for_ever(service: ServiceProcess, address: str, make: Callable[[], Request], seen: Counter[int]) -> None:
    host, port = service.address
    while True:
        reader, writer = await asyncio.open_connection(host, port, local_addr=(address, 0))
        try:
            head = b""
            while b"\r\nconnection: close\r\n" not in head:
                path, body = make()
                kind = "application/json" if path == "/auth/register" else "application/x-www-form-urlencoded"
                line = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(line.encode() + body)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
                seen[int(head.split(b" ", 2)[1])] += 1
        finally:
            writer.close()


@asynccontextmanager
async def flood(service: ServiceProcess, *parts: tuple[str, Callable[[], Request]]) -> AsyncIterator[Counter[int]]:
    """So many connections, shared by the parts of the flood, from when the first are refused."""
    seen: Counter[int] = Counter()
    async with anyio.create_task_group() as group:
        for _, (address, make) in zip(range(CONNECTIONS), cycle(parts), strict=False):
            group.start_soon(ask_for_ever, service, address, make, seen)
        await eventually(lambda: seen[503] >= CONNECTIONS // 2, 60)
        yield seen
        group.cancel_scope.cancel()


def outcome(answer: httpx.Response) -> str:
    """`ok`, or the code of the refusal."""
    return "ok" if answer.status_code in (200, 201) else str(answer.json()["code"])


async def prepare(
    service: ServiceProcess, address: str, *, registers: bool = True
) -> Callable[[], Awaitable[list[str]]]:
    """A call that logs in as often as TRIES, with a device token and without, and registers; made before the flood."""
    async with Client(service, address) as api:
        account = await api.new_account()
        token = await device_token_of(api, account)

    async def log_in(**more: str) -> list[str]:
        async with Client(service, address) as api:
            return [outcome(await api.login(account.username, account.password, **more)) for _ in range(TRIES)]

    async def register() -> list[str]:
        async with Client(service, address) as api:
            username = f"{secrets.token_hex(8)}@example.com"
            return [outcome(await api.register(username, account.password))]

    async def try_all() -> list[str]:
        calls = [log_in(device_token=token), log_in(), *([register()] if registers else [])]
        return [one for outcomes in await asyncio.gather(*calls) for one in outcomes]

    return try_all


async def assert_the_victim_gets_in(
    service: ServiceProcess,
    parts: list[tuple[str, Callable[[], Request]]],
    address: str = VICTIM,
    *,
    registers: bool = True,
) -> None:
    try_all = await prepare(service, address, registers=registers)
    async with flood(service, *parts) as seen:
        before = seen.copy()
        assert set(await try_all()) == {"ok"}
        during = seen - before
    # The flood went on, was served as it may be, and was refused beyond.
    assert during[503] > 0 and set(during) <= {200, 201, 401, 503}, during


async def test_right_logins_of_own_accounts_keep_nobody_out(service: ServiceProcess) -> None:
    await assert_the_victim_gets_in(service, [(ATTACKER, await own_logins(service, ATTACKER))])


async def test_invented_usernames_keep_nobody_out(service: ServiceProcess) -> None:
    await assert_the_victim_gets_in(service, [(ATTACKER, invented)])


async def test_logins_from_eight_networks_and_registrations_keep_nobody_out(service: ServiceProcess) -> None:
    own = [(address, await own_logins(service, address)) for address in EIGHT]
    others = [(address, make) for address in EIGHT for make in (invented, registration)]
    await assert_the_victim_gets_in(service, [*own, *others])


async def test_a_flood_keeps_out_no_other_address_of_its_network_and_no_other_account_of_its_address(
    service: ServiceProcess,
) -> None:
    parts = [(ATTACKER, await own_logins(service, ATTACKER)), (ATTACKER, registration)]
    await assert_the_victim_gets_in(service, parts, NEIGHBOUR)
    # All registrations of an address are one line: the flood's are before the victim's.
    await assert_the_victim_gets_in(service, parts, ATTACKER, registers=False)
