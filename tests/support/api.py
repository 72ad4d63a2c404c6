"""A client of one process that speaks the contract, and what it knows that no log may hold."""

import json
import secrets
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx

#: Shorter strings could stand in a log by chance.
SECRET_CHARS_MIN = 8
#: A service client's id and secret.
Credentials = tuple[str, str]


class Secrets:
    """Every password, token and key that a test made, for the reading of the log."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def add(self, *texts: str) -> None:
        for text in texts:
            # A token's last part alone is a secret too: the signature, or a refresh token without its version.
            self._texts |= {part for part in (text, text.rpartition(".")[2]) if len(part) >= SECRET_CHARS_MIN}

    def found_in(self, text: str) -> list[str]:
        return [secret for secret in self._texts if secret in text or json.dumps(secret)[1:-1] in text]


@dataclass(frozen=True)
class Account:
    """A user that a test registered, and the answer to that."""

    username: str
    password: str
    user_id: int
    registered: dict[str, Any]


class Api(httpx.AsyncClient):
    """A client of one process that speaks the contract. It comes from a loopback address of its own, where the system
    has more than one, so that no test's failed logins lock out another's; or from the address that is named.
    """

    def __init__(self, url: str, known: Secrets, address: str | None = None) -> None:
        host = ".".join(["127", *(str(1 + secrets.randbelow(254)) for _ in range(3))])
        address = address or (host if sys.platform == "linux" else None)
        # `verify` only saves the time to load the certificates: nothing here speaks TLS.
        transport = httpx.AsyncHTTPTransport(local_address=address, verify=False)
        super().__init__(base_url=url, transport=transport, timeout=30)
        self._known = known

    async def register(self, username: str, password: str, **more: Any) -> httpx.Response:
        self._known.add(password)
        return await self.post("/auth/register", json={"username": username, "password": password, **more})

    async def login(self, username: str, password: str, **more: str) -> httpx.Response:
        self._known.add(password)
        form = {"username": username, "password": password, **more}
        return self._noted(await self.post("/auth/login", data=form))

    async def refresh(self, refresh_token: str) -> httpx.Response:
        self._known.add(refresh_token)
        return self._noted(await self.post("/auth/refresh_token", json={"refresh_token": refresh_token}))

    async def logout(self, access_token: str) -> httpx.Response:
        return await self.post("/auth/logout", headers=self.bearer(access_token))

    async def me(self, access_token: str) -> httpx.Response:
        return await self.get("/auth/me", headers=self.bearer(access_token))

    async def introspect(self, credentials: Credentials, token: str, **more: str) -> httpx.Response:
        self._known.add(token)
        return await self.post("/auth/introspect", data={"token": token, **more}, auth=credentials)

    async def revoke(self, credentials: Credentials, token: str, **more: str) -> httpx.Response:
        self._known.add(token)
        return await self.post("/auth/revoke", data={"token": token, **more}, auth=credentials)

    def bearer(self, access_token: str) -> dict[str, str]:
        self._known.add(access_token)
        return {"Authorization": f"Bearer {access_token}"}

    async def new_account(self, **more: Any) -> Account:
        username, password = f"{uuid.uuid4().hex}@example.com", f"pass phrase {secrets.token_hex(8)}"
        answer = await self.register(username, password, **more)
        assert answer.status_code == 201, answer.text
        return Account(username, password, answer.json()["user_id"], answer.json())

    async def new_session(self, account: Account) -> dict[str, Any]:
        """A token pair."""
        answer = await self.login(account.username, account.password)
        assert answer.status_code == 200, answer.text
        pair: dict[str, Any] = answer.json()
        return pair

    def _noted(self, answer: httpx.Response) -> httpx.Response:
        if answer.status_code == 200:
            self._known.add(answer.json()["access_token"], answer.json()["refresh_token"])
        return answer


def assert_problem(answer: httpx.Response, status: int | Iterable[int], code: str | None = None) -> dict[str, Any]:
    """The problem of a refusal, whose form the contract fixes."""
    expected = {status} if isinstance(status, int) else set(status)
    assert answer.status_code in expected, (answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    # `error` is for the libraries of OAuth (RFC 6749, 5.2).
    assert problem.keys() - {"errors", "error"} == {"type", "title", "status", "detail", "code"}
    assert problem["status"] == answer.status_code
    assert all(isinstance(problem[name], str) and problem[name] for name in ("type", "title", "detail", "code"))
    if code is not None:
        assert problem["code"] == code
    for error in problem.get("errors", []):
        assert error.keys() == {"field", "detail"}
    return problem
