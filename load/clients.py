"""A closed loop: clients that each send their next request when they have the answer. `load/bench` starts it.

It speaks just enough HTTP/1.1 over kept-alive connections to cost next to nothing beside what it measures. In: jobs,
each a line of JSON. Out: a line for each with what was measured and the newest tokens, for a refresh token is good for
one request.
"""

import asyncio
import json
import re
import sys
import time
from typing import Any

import uvloop

LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
REFRESH = b"POST /auth/refresh_token HTTP/1.1\r\nHost: a\r\n%b"
JSON = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
ME = b"GET /auth/me HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\n\r\n"
NEXT_TOKEN = b'"refresh_token":"'


class Loop:
    """What all clients share."""

    def __init__(self, seconds: float) -> None:
        self.started = time.perf_counter()
        self.ends = self.started + seconds
        self.latencies_s: list[float] = []
        self.refused: bytes | None = None


class Client(asyncio.Protocol):
    def __init__(self, loop: Loop, token: str, *, refreshes: bool) -> None:
        self.token = token.encode()
        self.done = asyncio.get_running_loop().create_future()
        self._loop = loop
        self._refreshes = refreshes
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        length = LENGTH.search(self._buffer, 0, head) if head >= 0 else None
        if length is None or len(self._buffer) < head + 4 + int(length[1]):
            return
        answer, self._buffer = self._buffer, b""
        now = time.perf_counter()
        if not answer.startswith(b"HTTP/1.1 200"):
            self._loop.refused = answer
        self._loop.latencies_s.append(now - self._sent)
        if self._refreshes and self._loop.refused is None:
            start = answer.index(NEXT_TOKEN) + len(NEXT_TOKEN)
            self.token = answer[start : answer.index(b'"', start)]
        if now < self._loop.ends and self._loop.refused is None:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        if self._refreshes:
            body = b'{"refresh_token":"%b"}' % self.token
            self._transport.write(REFRESH % (JSON % (len(body), body)))
        else:
            self._transport.write(ME % self.token)


async def run(job: dict[str, Any]) -> dict[str, Any]:
    cpu, loop = time.process_time(), Loop(job["seconds"])
    clients = [Client(loop, token, refreshes=job["refreshes"]) for token in job["tokens"]]
    for client in clients:
        await asyncio.get_running_loop().create_connection(lambda client=client: client, "127.0.0.1", job["port"])
    for client in clients:
        await client.done
    if loop.refused is not None:
        raise SystemExit(f"refused: {loop.refused.decode(errors='replace')}")
    seconds = time.perf_counter() - loop.started
    latencies = sorted(loop.latencies_s)
    return {
        "answers": len(latencies),
        "seconds": seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[len(latencies) * 99 // 100] * 1000,
        "clients_s": time.process_time() - cpu,
        "tokens": [client.token.decode() for client in clients],
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(uvloop.run(run(json.loads(line)))), flush=True)
