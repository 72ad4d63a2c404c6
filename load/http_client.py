"""A client that costs next to nothing: one HTTP/1.1 connection, with just enough parsing for authd's answers."""

import asyncio
import json
from typing import Any, Self
from urllib.parse import urlencode


class Connection:
    """Opened anew when the server says that it closes it, as it does after a thousand requests."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    def __init__(self, port: int) -> None:
        self._port = port

    @classmethod
    async def open(cls, port: int) -> Self:
        connection = cls(port)
        await connection._connect()
        return connection

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    def close(self) -> None:
        self._writer.close()

    async def request(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: authd\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        content = await self._reader.readexactly(length)
        if b"\r\nconnection: close\r\n" in answer:
            self.close()
            await self._connect()
        return int(answer.split(b" ", 2)[1]), content

    async def register(self, username: str, password: str) -> None:
        body = json.dumps({"username": username, "password": password}).encode()
        status, answer = await self.request("POST", "/auth/register", body)
        assert status == 201, (status, answer)

    async def login(self, username: str, password: str) -> tuple[int, bytes]:
        form = urlencode({"username": username, "password": password}).encode()
        return await self.request("POST", "/auth/login", form, "application/x-www-form-urlencoded")

    async def refresh(self, refresh_token: str) -> str:
        """The next refresh token."""
        body = json.dumps({"refresh_token": refresh_token}).encode()
        status, answer = await self.request("POST", "/auth/refresh_token", body)
        assert status == 200, (status, answer)
        pair: dict[str, Any] = json.loads(answer)
        return str(pair["refresh_token"])
