"""One of each request, and the answers that are expected while a store is unavailable."""

import itertools
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from support.api import Api, Credentials, assert_problem
from support.faults import TIMEOUTS
from support.process import ServiceProcess

#: Whoever waits for a frozen part answers after its timeout and not before; the others soon, also on a busy machine.
SLOW_S = float(TIMEOUTS["AUTHD_REDIS_TIMEOUT_S"])
#: No answer takes longer, whatever is frozen. Two stores, one after the other, and a busy machine.
BOUND_S = 10.0
Expected = Mapping[str, tuple[int, str]]
USER_STORE = (503, "user_store_unavailable")
SESSION_STORE = (503, "session_store_unavailable")
#: Every request of the matrix, and its answer while all parts are there.
WORKS: Expected = {
    "register": (201, ""),
    "login": (200, ""),
    "login, wrong password": (401, "invalid_credentials"),
    "refresh": (200, ""),
    "me, cached": (200, ""),
    "me, not cached": (200, ""),
    "sessions": (200, ""),
    "introspect an access token": (200, "active"),
    "introspect a refresh token": (200, "active"),
    "logout, current": (200, ""),
    "logout, all": (200, ""),
    "end a session": (200, ""),
    "revoke an access token": (200, ""),
    "revoke a refresh token": (200, ""),
}


@dataclass
class ServiceClient:
    """A registered service client, and a way to ask as it."""

    api: Api
    credentials: Credentials

    async def introspect(self, token: str) -> httpx.Response:
        return await self.api.introspect(self.credentials, token)

    async def revoke(self, token: str) -> httpx.Response:
        return await self.api.revoke(self.credentials, token)


async def new_service_client(process: ServiceProcess, api: Api) -> ServiceClient:
    client = ServiceClient(api, await process.new_client("a gateway"))
    # From now on this replica believes it for a while, also when Postgres is away.
    assert (await client.introspect("nothing")).json() == {"active": False}
    return client


@dataclass
class RequestMatrix:
    """Each request of the matrix once, with accounts and sessions of its own, made while all parts were there."""

    requests: dict[str, Callable[[], Awaitable[httpx.Response]]]
    #: The pair that each request that ends a session was about.
    ended: dict[str, dict[str, Any]]
    elapsed_s: list[float] = field(default_factory=list)

    async def play(self, expected: Expected) -> None:
        """Send all, one after the other, and compare every answer."""
        differences = []
        for name, wanted in expected.items():
            start = time.monotonic()
            answer = await self.requests[name]()
            self.elapsed_s.append(time.monotonic() - start)
            found = (answer.status_code, _code(answer))
            if found != wanted:
                differences.append(f"{name}: expected {wanted}, got {found}")
            if answer.status_code == 503:
                assert_problem(answer, 503)
                assert int(answer.headers["Retry-After"]) >= 1
        assert not differences, "\n".join(differences)
        assert max(self.elapsed_s) < BOUND_S

    def slow(self, than_s: float = SLOW_S) -> int:
        """How many answers may have waited for a part with this timeout."""
        return sum(1 for elapsed_s in self.elapsed_s if elapsed_s >= than_s)


async def new_request_matrix(api: Api, client: ServiceClient) -> RequestMatrix:
    account, other = await api.new_account(), await api.new_account()
    kept, rotating, current, listed, by_access, by_refresh = [await api.new_session(account) for _ in range(6)]
    everything = await api.new_session(other)
    assert (await api.me(kept["access_token"])).status_code == 200
    sessions = (await api.get("/auth/sessions", headers=api.bearer(listed["access_token"]))).json()["sessions"]
    [session_url] = [f"/auth/sessions/{session['id']}" for session in sessions if session["current"]]
    # Another user's profile, which nothing has cached yet.
    fresh = await api.new_session(await api.new_account())
    numbers = itertools.count()

    async def logout(pair: dict[str, Any], scope: str) -> httpx.Response:
        return await api.post(f"/auth/logout?scope={scope}", headers=api.bearer(pair["access_token"]))

    return RequestMatrix(
        {
            "register": lambda: api.register(f"{uuid.uuid4().hex}-{next(numbers)}@example.com", "a pass phrase"),
            "login": lambda: api.login(account.username, account.password),
            "login, wrong password": lambda: api.login(account.username, "not the pass phrase"),
            "refresh": lambda: api.refresh(rotating["refresh_token"]),
            "me, cached": lambda: api.me(kept["access_token"]),
            "me, not cached": lambda: api.me(fresh["access_token"]),
            "sessions": lambda: api.get("/auth/sessions", headers=api.bearer(kept["access_token"])),
            "introspect an access token": lambda: client.introspect(kept["access_token"]),
            "introspect a refresh token": lambda: client.introspect(kept["refresh_token"]),
            "logout, current": lambda: logout(current, "current"),
            "logout, all": lambda: logout(everything, "all"),
            "end a session": lambda: api.delete(session_url, headers=api.bearer(kept["access_token"])),
            "revoke an access token": lambda: client.revoke(by_access["access_token"]),
            "revoke a refresh token": lambda: client.revoke(by_refresh["refresh_token"]),
        },
        {
            "logout, current": current,
            "logout, all": everything,
            "end a session": listed,
            "revoke an access token": by_access,
            "revoke a refresh token": by_refresh,
        },
    )


def _code(answer: httpx.Response) -> str:
    """The problem's code; of an introspection, whether the token is active."""
    try:
        body = answer.json()
    except json.JSONDecodeError:
        return answer.text[:80]
    if "active" in body:
        return "active" if body["active"] else "inactive"
    return str(body.get("code", ""))
