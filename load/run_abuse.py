"""How long the loop stands still for one request of a stranger: what all others wait meanwhile.

A second connection asks /livez without a pause. What its slowest answer takes while the request runs is how long that
held up everybody. Other work on the machine only adds to it, so the best of some rounds is what the request costs.
"""

import argparse
import asyncio
import os
import secrets
import time
from typing import Any, NamedTuple

import uvloop
from abusive_requests import PASSWORD, Abuse, abuses, ordinary
from deployment import deployment
from http_client import Connection

STANDSTILL_MS_MAX = 20.0
#: For the answer and the end of the connection.
ANSWER_S = 60.0
#: The settings of each run: the defaults, and the highest that can be chosen.
LIMITS = {"the default limits": (16_384, 16_384), "the highest limits": (1_048_576, 262_144)}
#: Nothing is measured of a request that is refused for those before it.
UNLIMITED = {"AUTHD_MAX_LOGIN_ATTEMPTS": "1000", "AUTHD_ACCOUNT_MAX_FAILURES": "10000"}


class Seen(NamedTuple):
    """`status`: of the last round. Both times in ms: the best of the rounds."""

    status: str
    standstill_ms: float
    took_ms: float


async def measure(rounds: int, only: str) -> int:
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before the run: others' work adds to it")
    failed = 0
    for name, (body_bytes, head_bytes) in LIMITS.items():
        print(f"\n{name}: {body_bytes} bytes of body, {head_bytes} of head", flush=True)
        print(f"{'stands still':>12}  {'answered in':>11}  status  request")
        async with deployment(
            AUTHD_BODY_MAX_BYTES=str(body_bytes),
            AUTHD_HEADER_MAX_BYTES=str(head_bytes),
            AUTHD_ADDRESS_MAX_FAILURES="100000",
            AUTHD_BCRYPT_COST="10",
            AUTHD_HASH_THREADS="1",
            AUTHD_TRUSTED_PROXIES="127.0.0.1",
            **UNLIMITED,
        ) as port:
            token = await access_token(port)
            for abuse in (ordinary(), *abuses(body_bytes, head_bytes, token)):
                if only in abuse.name:
                    failed += show(abuse, await best_of(rounds, port, abuse))
    print(f"\n{'FAIL' if failed else 'PASS'}: {failed} requests let others wait for more than {STANDSTILL_MS_MAX:g} ms")
    return 1 if failed else 0


def show(abuse: Abuse, seen: Seen) -> int:
    """Print the line; 1 for what is over the limit."""
    is_over = seen.standstill_ms > STANDSTILL_MS_MAX
    times = f"{seen.standstill_ms:9.1f} ms  {seen.took_ms:8.1f} ms"
    print(f"{times}  {seen.status:6}  {abuse.name}{'   FAIL' * is_over}", flush=True)
    return int(is_over)


async def access_token(port: int) -> str:
    connection = await Connection.open(port)
    name = f"{secrets.token_hex(8)}@example.com"
    await connection.register(name, PASSWORD)
    status, answer = await connection.login(name, PASSWORD)
    connection.close()
    assert status == 200, (status, answer)
    return str(answer.decode().partition('"access_token":"')[2].partition('"')[0])


async def best_of(rounds: int, port: int, abuse: Abuse) -> Seen:
    seen = [await measure_once(port, abuse) for _ in range(rounds)]
    return Seen(seen[-1].status, min(one.standstill_ms for one in seen), min(one.took_ms for one in seen))


async def measure_once(port: int, abuse: Abuse) -> Seen:
    probe = await Connection.open(port)
    slowest_s = 0.0
    is_over = False

    async def ask() -> None:
        nonlocal slowest_s
        while not is_over:
            start = time.perf_counter()
            status, _ = await probe.request("GET", "/livez")
            slowest_s = max(slowest_s, time.perf_counter() - start)
            assert status == 200, status

    asking = asyncio.create_task(ask())
    start = time.perf_counter()
    try:
        async with asyncio.timeout(ANSWER_S):
            status = await send(port, abuse.raw)
    except TimeoutError:
        raise SystemExit(f"FAIL: {abuse.name}: no answer within {ANSWER_S:g} s") from None
    took_s = time.perf_counter() - start
    is_over = True
    await asking
    probe.close()
    return Seen(status, 1000 * slowest_s, 1000 * took_s)


async def send(port: int, raw: bytes) -> str:
    """The status of the first answer, once the connection has ended; a dash for none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(read_to_end(reader))
    try:
        writer.write(raw)
        await writer.drain()
    except ConnectionError:
        pass  # refused before it was read
    answer = await reading
    writer.close()
    return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "-"


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    first: Any = b""
    try:
        while part := await reader.read(65_536):
            first = first or part
    except ConnectionError:
        pass
    return bytes(first)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="requests whose name has this text")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise SystemExit(runner.run(measure(options.rounds, options.only)))
