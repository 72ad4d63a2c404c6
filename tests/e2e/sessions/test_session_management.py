"""What a user sees of its sessions and ends of them, and that an ending counts on every replica at once."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
from support.api import Account, Api, Credentials, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

FIELDS = {
    "id": str,
    "created_at": str,
    "last_used_at": str,
    "expires_at": str,
    "address": str,
    "user_agent": str,
    "current": bool,
}
SUCCESS = {"status": "success"}
CAP = 10


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    """Behind a proxy, so that a test can come from any address."""
    async with services.running(AUTHD_TRUSTED_PROXIES="127.0.0.0/8") as process:
        yield process


@pytest.fixture(scope="module")
async def second(services: Services, service: ServiceProcess) -> AsyncIterator[ServiceProcess]:
    async with services.replica(service) as process:
        yield process


@pytest.fixture(scope="module")
async def client(service: ServiceProcess) -> Credentials:
    return await service.new_client()


@pytest.fixture
async def elsewhere(second: ServiceProcess) -> AsyncIterator[Api]:
    """The other replica."""
    async with second.api() as api:
        yield api


@pytest.fixture
async def account(api: Api) -> Account:
    return await api.new_account()


async def login(api: Api, account: Account, **headers: str | bytes) -> dict[str, Any]:
    """A token pair for a device that sends these headers."""
    form = {"username": account.username, "password": account.password}
    answer = await api.post("/auth/login", data=form, headers={**headers})  # type: ignore[dict-item]
    assert answer.status_code == 200, answer.text
    pair: dict[str, Any] = answer.json()
    return pair


async def sessions_of(api: Api, pair: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await api.get("/auth/sessions", headers=api.bearer(pair["access_token"]))
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"sessions"}
    sessions: list[dict[str, Any]] = answer.json()["sessions"]
    assert [{name: type(value) for name, value in each.items()} for each in sessions] == [FIELDS] * len(sessions)
    return sessions


async def own_id(api: Api, pair: dict[str, Any]) -> str:
    [session] = [each for each in await sessions_of(api, pair) if each["current"]]
    return str(session["id"])


async def end(api: Api, pair: dict[str, Any], session_id: str) -> httpx.Response:
    return await api.delete(f"/auth/sessions/{session_id}", headers=api.bearer(pair["access_token"]))


async def logout(api: Api, pair: dict[str, Any], **request: Any) -> httpx.Response:
    headers = api.bearer(pair["access_token"]) | request.pop("headers", {})
    return await api.post("/auth/logout", headers=headers, **request)


async def living(api: Api, pairs: Sequence[dict[str, Any]]) -> list[bool]:
    statuses = [(await api.me(pair["access_token"])).status_code for pair in pairs]
    assert set(statuses) <= {200, 401}
    return [status == 200 for status in statuses]


async def assert_alive(api: Api, client: Credentials, *pairs: dict[str, Any]) -> None:
    for pair in pairs:
        assert (await api.me(pair["access_token"])).status_code == 200
        for token in (pair["access_token"], pair["refresh_token"]):
            assert (await api.introspect(client, token)).json()["active"] is True


async def assert_dead(api: Api, client: Credentials, *pairs: dict[str, Any]) -> None:
    for pair in pairs:
        assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
        for token in (pair["access_token"], pair["refresh_token"]):
            answer = await api.introspect(client, token)
            assert (answer.status_code, answer.json()) == (200, {"active": False})


# The list


async def test_a_user_sees_its_sessions_oldest_first_and_which_one_is_asking(api: Api, account: Account) -> None:
    devices = [("a phone", "198.51.100.7"), ("a laptop", "2001:db8::7"), ("a tablet", "198.51.100.8")]
    pairs = [
        await login(api, account, **{"User-Agent": agent, "X-Forwarded-For": address}) for agent, address in devices
    ]
    for index, pair in enumerate(pairs):
        sessions = await sessions_of(api, pair)
        assert [(each["user_agent"], each["address"]) for each in sessions] == devices
        assert [each["current"] for each in sessions] == [index == number for number in range(3)]
    assert len({each["id"] for each in sessions}) == 3
    for each in sessions:
        created, used, expires = (
            datetime.fromisoformat(each[f"{name}_at"]) for name in ("created", "last_used", "expires")
        )
        assert created.utcoffset() == timedelta()
        assert created == used
        assert abs(time.time() - created.timestamp()) < 60
        assert expires - used == timedelta(days=30)


async def test_a_refresh_changes_what_is_shown_but_not_the_order(api: Api, account: Account) -> None:
    first, second = [await login(api, account, **{"User-Agent": agent}) for agent in ("old", "other")]
    [before, _] = await sessions_of(api, first)
    answer = await api.post(
        "/auth/refresh_token",
        json={"refresh_token": first["refresh_token"]},
        headers={"User-Agent": "new", "X-Forwarded-For": "203.0.113.9"},
    )
    [after, other] = await sessions_of(api, answer.json())
    assert (after["id"], after["created_at"]) == (before["id"], before["created_at"])
    assert after["last_used_at"] > before["last_used_at"]
    assert (after["user_agent"], after["address"], after["current"]) == ("new", "203.0.113.9", True)
    assert (other["user_agent"], other["current"]) == ("other", False)
    assert (await api.me(second["access_token"])).status_code == 200


async def test_a_user_sees_nobody_elses_sessions(api: Api, account: Account) -> None:
    pair = await api.new_session(account)
    await api.new_session(await api.new_account())
    assert len(await sessions_of(api, pair)) == 1


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (b"", ""),
        (b"curl/8.5", "curl/8.5"),
        (b"x" * 64, "x" * 64),
        (b"x" * 65, "x" * 64),
        (b"y" * 8000, "y" * 64),
        ("Zoë's café 🦊".encode(), "Zoë's café 🦊"),
        (("x" * 63 + "é").encode(), "x" * 63),
        (("x" * 62 + "é!").encode(), "x" * 62 + "é"),
        ("🦊".encode() * 17, "🦊" * 16),
        (("xyz" + "🦊" * 16).encode(), "xyz" + "🦊" * 15),
        (b"tab\tand \x1b[31mcolour\x07\x7f", "taband [31mcolour"),
        ("right \u202eto left\u2028".encode(), "right to left"),
        (b"no utf-8: \xe9", "no utf-8: é"),
        (b"\"<script>'; DROP TABLE users; --", "\"<script>'; DROP TABLE users; --"),
    ],
)
async def test_a_user_agent_is_shown_as_given_in_at_most_64_bytes_of_printable_text(
    api: Api, account: Account, given: bytes, shown: str
) -> None:
    pair = await login(api, account, **{"User-Agent": given})
    [session] = await sessions_of(api, pair)
    assert session["user_agent"] == shown
    assert len(session["user_agent"].encode()) <= 64


async def test_the_address_is_the_last_hop_that_is_no_proxy_of_ours(api: Api, account: Account) -> None:
    hops = {
        "203.0.113.1, 198.51.100.1": "198.51.100.1",
        "198.51.100.2, 127.0.0.2": "198.51.100.2",
        "::ffff:198.51.100.3": "198.51.100.3",
        "203.0.113.1, nonsense": None,
    }
    for given, shown in hops.items():
        pair = await login(api, account, **{"X-Forwarded-For": given})
        [session] = [each for each in await sessions_of(api, pair) if each["current"]]
        if shown is None:
            assert ip_address(session["address"]).is_loopback
        else:
            assert session["address"] == shown


async def test_the_list_needs_a_token(api: Api) -> None:
    for method, path in (("GET", "/auth/sessions"), ("DELETE", "/auth/sessions/AAAAAAAAAAAAAAAAAAAAAA")):
        assert_problem(await api.request(method, path), 401, "token_missing")
        refused = await api.request(method, path, headers={"Authorization": "Bearer junk"})
        assert_problem(refused, 401, "token_invalid")


# Ending one


async def test_a_user_ends_one_of_its_sessions(api: Api, account: Account) -> None:
    mine, other = await api.new_session(account), await api.new_session(account)
    answer = await end(api, mine, await own_id(api, other))
    assert (answer.status_code, answer.json()) == (200, SUCCESS)
    assert_problem(await api.me(other["access_token"]), 401, "token_invalid")
    assert_problem(await api.refresh(other["refresh_token"]), 401, "session_ended")
    [session] = await sessions_of(api, mine)
    assert session["current"]
    assert (await api.refresh(mine["refresh_token"])).status_code == 200


async def test_a_user_may_end_the_session_that_asks(api: Api, account: Account) -> None:
    pair = await api.new_session(account)
    assert (await end(api, pair, await own_id(api, pair))).status_code == 200
    assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")


async def test_what_is_no_live_session_of_the_user_is_unknown(api: Api, account: Account) -> None:
    mine, ended = await api.new_session(account), await api.new_session(account)
    stranger = await api.new_session(await api.new_account())
    ended_id, strangers_id = await own_id(api, ended), await own_id(api, stranger)
    assert (await logout(api, ended, params={"scope": "current"})).status_code == 200
    own = await own_id(api, mine)
    unknown = base64.urlsafe_b64encode(secrets.token_bytes(16)).rstrip(b"=").decode()
    malformed = ["x", "%00", "%C3%A9", own[:-1], f"{own}A", f"{own}==", own.swapcase(), "A" * 2000, "e", "1"]
    for wanted in (ended_id, strangers_id, unknown, *malformed):
        assert_problem(await end(api, mine, wanted), 404, "session_unknown")
    for path in ("", "a/b", "..%2F"):
        assert_problem(await end(api, mine, path), 404, "not_found")
    assert await living(api, [mine, stranger]) == [True, True]


# Logout and its scopes


SCOPES = {
    None: [False, False, False],
    "all": [False] * 3,
    "current": [False, True, True],
    "others": [True, False, False],
}


@pytest.mark.parametrize("place", ["params", "json", "data"])
@pytest.mark.parametrize("scope", SCOPES)
async def test_a_logout_ends_what_its_scope_says(api: Api, account: Account, place: str, scope: str | None) -> None:
    pairs = [await api.new_session(account) for _ in range(3)]
    answer = await logout(api, pairs[0], **{place: {"scope": scope} if scope else {}})
    assert (answer.status_code, answer.json()) == (200, SUCCESS)
    assert await living(api, pairs) == SCOPES[scope]


@pytest.mark.parametrize("scope", ["Current", "everything", "all,others"])
async def test_a_wrong_scope_ends_nothing(api: Api, account: Account, scope: str) -> None:
    pair = await api.new_session(account)
    for place in ("params", "json", "data"):
        problem = assert_problem(await logout(api, pair, **{place: {"scope": scope}}), 422, "invalid_request")
        assert [error["field"] for error in problem["errors"]] == ["scope"]
    for value in (1, ["all"], {}):
        assert_problem(await logout(api, pair, json={"scope": value}), 422, "invalid_request")
    assert (await api.me(pair["access_token"])).status_code == 200


async def test_a_scope_in_a_body_of_unknown_length_is_read(api: Api, account: Account) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"scope": '
        yield b'"current"}'

    pairs = [await api.new_session(account) for _ in range(2)]
    answer = await logout(api, pairs[0], content=chunks(), headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == 200
    assert await living(api, pairs) == [False, True]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (None, b""),
        ("application/json", b""),
        ("application/json", b"{}"),
        ("application/json; charset=utf-8", b'{"other": "current"}'),
        ("application/x-www-form-urlencoded", b""),
        ("application/x-www-form-urlencoded;charset=UTF-8", b"a=b"),
        ("text/plain", b""),
        ("text/plain", b"logout"),
        ("multipart/form-data; boundary=x", b"--x--\r\n"),
        ("application/octet-stream", b"\0\xff"),
        ("nonsense", b"{"),
    ],
)
async def test_an_old_clients_logout_ends_every_session_whatever_body_comes_along(
    api: Api, account: Account, content_type: str | None, body: bytes
) -> None:
    pairs = [await api.new_session(account) for _ in range(2)]
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await logout(api, pairs[0], content=body, headers=headers)
    assert (answer.status_code, answer.json()) == (200, SUCCESS)
    assert await living(api, pairs) == [False, False]


# The cap


async def test_the_evicted_device_is_told_so_and_the_evicting_one_notices_nothing(api: Api, account: Account) -> None:
    pairs = [await api.new_session(account) for _ in range(CAP + 1)]
    for _ in range(2):
        assert_problem(await api.refresh(pairs[0]["refresh_token"]), 401, "session_evicted")
    sessions = await sessions_of(api, pairs[-1])
    assert [each["current"] for each in sessions] == [False] * (CAP - 1) + [True]
    # Used is not young: the oldest is the one that was opened first.
    assert (await api.refresh(pairs[1]["refresh_token"])).status_code == 200
    await api.new_session(account)
    assert await living(api, pairs) == [False, False] + [True] * (CAP - 1)


async def test_with_the_policy_refuse_a_login_too_many_is_no_failed_one(services: Services) -> None:
    settings = {
        "AUTHD_SESSION_POLICY": "refuse",
        "AUTHD_MAX_ACTIVE_SESSIONS": "2",
        "AUTHD_MAX_LOGIN_ATTEMPTS": "2",
        "AUTHD_ACCOUNT_MAX_FAILURES": "2",
    }
    async with services.running(**settings) as process, process.api() as api:
        account = await api.new_account()
        pairs = [await api.new_session(account) for _ in range(2)]
        for _ in range(6):
            assert_problem(await api.login(account.username, account.password), 403, "session_limit")
        assert_problem(await api.login(account.username, "a wrong password"), 401, "invalid_credentials")
        assert_problem(await api.login(account.username, account.password), 403, "session_limit")
        assert await living(api, pairs) == [True, True]
        assert (await logout(api, pairs[0], params={"scope": "current"})).status_code == 200
        pairs.append(await api.new_session(account))
        assert await living(api, pairs) == [False, True, True]


# The grace


async def test_within_the_grace_every_repeat_gets_the_same_successor(
    api: Api, elsewhere: Api, account: Account
) -> None:
    old = await api.new_session(account)
    new = (await api.refresh(old["refresh_token"])).json()
    repeats = [(await replica.refresh(old["refresh_token"])).json() for replica in (api, elsewhere, api)]
    assert [pair["refresh_token"] for pair in repeats] == [new["refresh_token"]] * 3
    assert len({pair["access_token"] for pair in repeats}) == 3
    assert await living(elsewhere, [old, new, *repeats]) == [True] * 5
    assert len(await sessions_of(api, new)) == 1
    newest = (await api.refresh(new["refresh_token"])).json()
    assert_problem(await api.refresh(old["refresh_token"]), 401, "refresh_token_superseded")
    assert (await api.refresh(new["refresh_token"])).json()["refresh_token"] == newest["refresh_token"]
    assert await living(api, [newest]) == [True]


# An ending counts everywhere at once


@pytest.mark.parametrize("scope", ["all", "current", "others"])
async def test_after_a_logout_no_replica_accepts_what_it_ended(
    api: Api, elsewhere: Api, client: Credentials, account: Account, scope: str
) -> None:
    pairs = [await api.new_session(account) for _ in range(3)]
    await assert_alive(elsewhere, client, *pairs)
    assert (await logout(api, pairs[0], params={"scope": scope})).status_code == 200
    for pair, lives in zip(pairs, SCOPES[scope], strict=True):
        await (assert_alive if lives else assert_dead)(elsewhere, client, pair)


async def test_after_a_deletion_no_replica_accepts_the_session(
    api: Api, elsewhere: Api, client: Credentials, account: Account
) -> None:
    pairs = [await api.new_session(account) for _ in range(2)]
    await assert_alive(elsewhere, client, *pairs)
    assert (await end(api, pairs[0], await own_id(api, pairs[1]))).status_code == 200
    await assert_dead(elsewhere, client, pairs[1])
    await assert_alive(elsewhere, client, pairs[0])


async def test_after_an_eviction_no_replica_accepts_the_oldest(
    api: Api, elsewhere: Api, client: Credentials, account: Account
) -> None:
    pairs = [await api.new_session(account) for _ in range(CAP)]
    await assert_alive(elsewhere, client, pairs[0], pairs[1])
    pairs.append(await api.new_session(account))
    await assert_dead(elsewhere, client, pairs[0])
    await assert_alive(elsewhere, client, pairs[1], pairs[-1])


async def test_after_a_revocation_by_a_service_no_replica_accepts_the_session(
    api: Api, elsewhere: Api, client: Credentials, account: Account
) -> None:
    pairs = [await api.new_session(account) for _ in range(3)]
    await assert_alive(elsewhere, client, *pairs)
    assert (await api.revoke(client, pairs[0]["refresh_token"])).status_code == 200
    assert (await api.revoke(client, pairs[1]["access_token"])).status_code == 200
    await assert_dead(elsewhere, client, *pairs[:2])
    await assert_alive(elsewhere, client, pairs[2])


async def test_after_a_user_was_disabled_no_replica_accepts_its_sessions(
    service: ServiceProcess, api: Api, elsewhere: Api, client: Credentials, account: Account
) -> None:
    pairs = [await api.new_session(account) for _ in range(2)]
    await assert_alive(elsewhere, client, *pairs)
    assert (await service.run("users", "disable", account.username)).returncode == 0
    await assert_dead(elsewhere, client, *pairs)
    assert_problem(await elsewhere.refresh(pairs[0]["refresh_token"]), 403, "user_disabled")


async def test_after_a_reuse_no_replica_accepts_the_session(services: Services) -> None:
    async with (
        services.running(AUTHD_REFRESH_GRACE_S="0") as process,
        services.replica(process) as replica,
        process.api() as api,
        replica.api() as elsewhere,
    ):
        client, account = await process.new_client(), await api.new_account()
        stolen, other = await api.new_session(account), await api.new_session(account)
        newest = (await api.refresh(stolen["refresh_token"])).json()
        await assert_alive(elsewhere, client, newest, other)
        assert_problem(await api.refresh(stolen["refresh_token"]), 401, "refresh_token_reused")
        await assert_dead(elsewhere, client, stolen, newest)
        assert_problem(await elsewhere.refresh(newest["refresh_token"]), 401, "refresh_token_reused")
        await assert_alive(elsewhere, client, other)


# Lifetimes

IDLE_S, ABSOLUTE_S = 2, 5


async def test_a_session_ends_when_it_is_idle_for_too_long_and_when_it_is_too_old(services: Services) -> None:
    settings = {"AUTHD_REFRESH_TTL_S": str(IDLE_S), "AUTHD_SESSION_TTL_S": str(ABSOLUTE_S)}
    async with services.running(**settings) as process, services.replica(process) as replica:
        client = await process.new_client()
        await asyncio.gather(
            idles(process, replica, client),
            is_used(process, replica, client),
        )


async def idles(process: ServiceProcess, replica: ServiceProcess, client: Credentials) -> None:
    async with process.api() as api, replica.api() as elsewhere:
        pair = await api.new_session(await api.new_account())
        [session] = await sessions_of(api, pair)
        await until_dead(elsewhere, pair)
        assert time.time() >= datetime.fromisoformat(session["expires_at"]).timestamp() - CLOCKS_DIFFER_S
        await assert_dead(api, client, pair)
        assert_problem(await api.refresh(pair["refresh_token"]), 401, "refresh_token_expired")


async def is_used(process: ServiceProcess, replica: ServiceProcess, client: Credentials) -> None:
    async with process.api() as api, replica.api() as elsewhere:
        pair = await api.new_session(await api.new_account())
        [session] = await sessions_of(api, pair)
        end = datetime.fromisoformat(session["created_at"]).timestamp() + ABSOLUTE_S
        used = []
        while time.time() < end - IDLE_S / 2:
            answer = await api.refresh(pair["refresh_token"])
            assert answer.status_code == 200, answer.text
            pair = answer.json()
            [session] = await sessions_of(api, pair)
            assert datetime.fromisoformat(session["expires_at"]).timestamp() <= end + CLOCKS_DIFFER_S
            used.append(time.time())
            await asyncio.sleep(IDLE_S / 4)
        assert used[-1] > end - ABSOLUTE_S + IDLE_S  # it outlived the idle life
        await until_dead(elsewhere, pair)
        assert time.time() >= end - CLOCKS_DIFFER_S
        await assert_dead(api, client, pair)
        assert_problem(await api.refresh(pair["refresh_token"]), 401, "refresh_token_expired")


#: Redis's clock and Python's, of one machine.
CLOCKS_DIFFER_S = 0.05


async def until_dead(api: Api, pair: dict[str, Any]) -> None:
    async def is_dead() -> bool:
        return (await api.me(pair["access_token"])).status_code == 401

    await eventually(is_dead)
