"""Every row of the wire contract, as its clients read it."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import anyio
import httpx
import pytest
from support.api import Api, assert_problem
from support.process import ServiceProcess
from support.services import Services, until_published
from support.stores import read_topic
from support.waiting import eventually

from authd.embedded import KafkaBroker

PROFILE_FIELDS = {"user_id": int, "username": str, "full_name": str, "created_at": str}
PAIR_FIELDS = {"access_token": str, "refresh_token": str, "token_type": str, "expires_in": int}
PASSWORD = "correct horse battery"
WRONG = "wrong horse battery"


@pytest.fixture(scope="module")
async def service(services: Services, kafka_broker: KafkaBroker) -> AsyncIterator[ServiceProcess]:
    async with services.running(AUTHD_KAFKA_BOOTSTRAP_SERVERS=kafka_broker.bootstrap_servers) as process:
        yield process


def full_width(text: str) -> str:
    """What NFKC makes the text of: U+FF01 to U+FF5E are ASCII's printable characters, twice as wide."""
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


def assert_fields(answer: httpx.Response, fields: dict[str, type]) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert {name: type(value) for name, value in body.items()} == fields
    return body


# Registration


async def test_registration_answers_201_with_the_profile(api: Api) -> None:
    answer = await api.register("Ada.Lovelace@Example.com", PASSWORD, full_name="Ada Lovelace")
    assert answer.status_code == 201
    body = assert_fields(answer, PROFILE_FIELDS)
    assert (body["username"], body["full_name"]) == ("Ada.Lovelace@Example.com", "Ada Lovelace")
    created_at = datetime.fromisoformat(body["created_at"])
    assert created_at.utcoffset() is not None
    assert abs(datetime.now(created_at.tzinfo) - created_at) < timedelta(minutes=1)


@pytest.mark.parametrize("more", [{}, {"full_name": None}, {"full_name": ""}])
async def test_a_registration_without_a_full_name_has_an_empty_one(api: Api, more: dict[str, Any]) -> None:
    account = await api.new_account(**more)
    assert account.registered["full_name"] == ""


async def test_a_taken_username_answers_409_in_any_spelling(api: Api) -> None:
    username = "Grace.Hopper@Example.org"
    assert (await api.register(username, PASSWORD)).status_code == 201
    spellings = (username.lower(), f"  {username.upper()}\t", full_width("grace.hopper") + "@example.org")
    for spelling in (username, *spellings):
        assert_problem(await api.register(spelling, PASSWORD), 409, "username_taken")


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {"username", "password"}),
        ({"username": "x@example.com"}, {"password"}),
        ({"password": PASSWORD}, {"username"}),
        ({"username": "no e-mail", "password": "short"}, {"username", "password"}),
        ({"username": "x@example.com", "password": PASSWORD, "full_name": "x" * 201}, {"full_name"}),
        ({"username": 1, "password": None, "full_name": []}, {"username", "password", "full_name"}),
    ],
)
async def test_an_invalid_registration_answers_422_and_names_each_field(
    api: Api, body: dict[str, Any], fields: set[str]
) -> None:
    problem = assert_problem(await api.post("/auth/register", json=body), 422, "invalid_request")
    assert {error["field"] for error in problem["errors"]} == fields
    assert all(error["detail"] for error in problem["errors"])


SPELLINGS = [
    ("case", "Twin@Example.com", "tWIN@eXAMPLE.COM"),
    ("full width", "twin2@example.com", full_width("twin2") + "@example.com"),
    ("space", "twin3@example.com", " twin3@example.com \n"),
    ("idn", "twin4@bücher.example", "twin4@xn--bcher-kva.example"),
]


@pytest.mark.parametrize(("first", "second"), [pytest.param(*pair, id=name) for name, *pair in SPELLINGS])
async def test_registrations_of_one_address_at_once_make_one_user_and_one_event(
    service: ServiceProcess, kafka_broker: KafkaBroker, api: Api, first: str, second: str
) -> None:
    answers = await asyncio.gather(*(api.register(name, PASSWORD) for name in [first, second] * 4))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
    created = next(answer.json() for answer in answers if answer.status_code == 201)
    await until_published(service)
    values = [json.loads(record.value) for record in await read_topic(kafka_broker.bootstrap_servers, service.topic)]
    ids = {answer.json().get("user_id") for answer in answers if answer.status_code == 201}
    assert [value for value in values if value["user_id"] in ids] == [created]
    assert len([value for value in values if value["username"] in (first, second.strip())]) == 1
    for spelling in (first, second):
        assert (await api.login(spelling, PASSWORD)).status_code == 200


# Login


async def test_login_answers_a_token_pair_that_is_not_to_be_stored(api: Api) -> None:
    account = await api.new_account()
    answer = await api.login(account.username, account.password)
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    body = assert_fields(answer, PAIR_FIELDS | {"device_token": str})
    assert (body["token_type"], body["expires_in"]) == ("bearer", 1800)


async def test_login_takes_and_does_not_need_the_other_fields_of_the_password_grant(api: Api) -> None:
    account = await api.new_account()
    more = {"grant_type": "password", "scope": "a b", "client_id": "app", "client_secret": "app secret"}
    for name, value in more.items():
        assert (await api.login(account.username, account.password, **{name: value})).status_code == 200
    assert (await api.login(account.username, account.password, **more)).status_code == 200
    empty = dict.fromkeys(more, "")
    assert (await api.login(account.username, account.password, **empty)).status_code == 200


async def test_login_gives_one_answer_for_a_wrong_password_and_for_any_unknown_username(api: Api) -> None:
    account = await api.new_account()
    answers = [
        await api.login(account.username, WRONG),
        await api.login("nobody@example.com", PASSWORD),
        await api.login("no e-mail at all", PASSWORD),
        await api.login("x" * 1000, PASSWORD),
        await api.login("'; DROP TABLE users; --", PASSWORD),
        await api.login("名前@@例え", PASSWORD),
    ]
    for answer in answers:
        assert_problem(answer, 401, "invalid_credentials")
    assert len({answer.content for answer in answers}) == 1
    varying = {"date", "x-request-id"}
    assert len({json.dumps([pair for pair in a.headers.multi_items() if pair[0] not in varying]) for a in answers}) == 1


@pytest.mark.parametrize(
    ("form", "missing"),
    [
        ({}, {"username", "password"}),
        ({"username": "x@example.com"}, {"password"}),
        ({"password": PASSWORD}, {"username"}),
        ({"username": "", "password": PASSWORD}, {"username"}),
    ],
)
async def test_a_login_without_a_field_answers_422_and_names_it(
    api: Api, form: dict[str, str], missing: set[str]
) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await api.post("/auth/login", content=str(httpx.QueryParams(form)), headers=headers)
    problem = assert_problem(answer, 422, "invalid_request")
    assert {error["field"] for error in problem["errors"]} == missing


async def fail_logins(api: Api, username: str, times: int) -> None:
    for _ in range(times):
        assert_problem(await api.login(username, WRONG), 401, "invalid_credentials")


async def test_fifteen_failures_lock_and_the_right_password_is_then_refused_too(api: Api) -> None:
    account = await api.new_account()
    await fail_logins(api, account.username, 15)
    for password in (WRONG, account.password):
        answer = await api.login(account.username, password)
        assert_problem(answer, 429, "login_locked")
        assert 290 <= int(answer.headers["Retry-After"]) <= 300


async def test_an_unknown_username_is_locked_like_a_known_one(api: Api) -> None:
    await fail_logins(api, "nobody-at-all@example.com", 15)
    assert_problem(await api.login("nobody-at-all@example.com", PASSWORD), 429, "login_locked")


async def test_fourteen_failures_do_not_lock_and_a_success_clears_them(api: Api) -> None:
    account = await api.new_account()
    for _ in range(2):
        await fail_logins(api, account.username, 14)
        await api.new_session(account)


async def test_successful_logins_are_not_counted(api: Api) -> None:
    account = await api.new_account()
    answers = await asyncio.gather(*(api.login(account.username, account.password) for _ in range(30)))
    assert {answer.status_code for answer in answers} == {200}


async def test_at_most_fifteen_of_many_wrong_logins_at_once_are_tried(api: Api) -> None:
    account = await api.new_account()
    answers = await asyncio.gather(*(api.login(account.username, WRONG) for _ in range(40)))
    assert sorted(answer.status_code for answer in answers) == [401] * 15 + [429] * 25


async def test_attempts_while_locked_do_not_extend_the_lock(services: Services) -> None:
    async with services.running(AUTHD_LOCKOUT_S="3") as process, process.api() as api:
        account = await api.new_account()
        await fail_logins(api, account.username, 15)
        locked_at = anyio.current_time()

        async def is_open() -> bool:
            answer = await api.login(account.username, account.password)
            if answer.status_code != 200:
                assert_problem(answer, 429, "login_locked")
            return answer.status_code == 200

        await eventually(is_open, 10)
        assert 2.5 < anyio.current_time() - locked_at < 4.5


# Refresh


async def test_refresh_answers_a_new_pair_and_ends_the_old_refresh_token(api: Api) -> None:
    old = await api.new_session(await api.new_account())
    answer = await api.refresh(old["refresh_token"])
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    new = assert_fields(answer, PAIR_FIELDS)
    assert (new["token_type"], new["expires_in"]) == ("bearer", 1800)
    assert new["refresh_token"] != old["refresh_token"]
    assert (await api.me(new["access_token"])).status_code == 200


async def test_a_refresh_repeated_at_once_gets_the_same_successor(api: Api) -> None:
    pair = await api.new_session(await api.new_account())
    answers = await asyncio.gather(*(api.refresh(pair["refresh_token"]) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1


async def test_a_refresh_token_reused_after_the_grace_ends_its_session(services: Services) -> None:
    async with services.running(AUTHD_REFRESH_GRACE_S="0") as process, process.api() as api:
        first = await api.new_session(await api.new_account())
        second = (await api.refresh(first["refresh_token"])).json()
        third = (await api.refresh(second["refresh_token"])).json()
        assert_problem(await api.refresh(first["refresh_token"]), 401, "refresh_token_reused")
        assert_problem(await api.refresh(third["refresh_token"]), 401)
        assert_problem(await api.me(third["access_token"]), 401, "token_invalid")


async def test_an_expired_refresh_token_answers_401(services: Services) -> None:
    async with services.running(AUTHD_REFRESH_TTL_S="1") as process, process.api() as api:
        pair = await api.new_session(await api.new_account())

        async def is_refused() -> bool:
            answer = await api.refresh(pair["refresh_token"])
            if answer.status_code == 200:  # within the second: go on with its successor, which lives no longer
                return False
            assert_problem(answer, 401, "refresh_token_expired")
            return True

        await eventually(is_refused, 5)


async def test_a_refresh_of_a_user_that_is_gone_answers_403(service: ServiceProcess, api: Api) -> None:
    account = await api.new_account()
    pair = await api.new_session(account)
    await service.query("DELETE FROM users WHERE id = $1", account.user_id)
    await service.wipe_redis()
    assert_problem(await api.refresh(pair["refresh_token"]), 403, "user_disabled")


async def test_an_unknown_refresh_token_answers_401(api: Api) -> None:
    assert_problem(await api.refresh("v2.nothing"), 401, "refresh_token_invalid")


# Logout


async def test_logout_ends_every_session_of_the_user_and_of_no_other(api: Api) -> None:
    account, other = await api.new_account(), await api.new_account()
    pairs = [await api.new_session(account) for _ in range(3)]
    others = await api.new_session(other)
    answer = await api.logout(pairs[0]["access_token"])
    assert (answer.status_code, answer.json()) == (200, {"status": "success"})
    for pair in pairs:
        assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
        assert_problem(await api.refresh(pair["refresh_token"]), 401, "session_ended")
        assert_problem(await api.logout(pair["access_token"]), 401, "token_invalid")
    assert (await api.me(others["access_token"])).status_code == 200
    assert (await api.me((await api.new_session(account))["access_token"])).status_code == 200


async def test_no_session_outlives_a_logout_that_races_refreshes_and_logins(api: Api) -> None:
    account = await api.new_account()
    first = await api.new_session(account)
    refreshing = [api.refresh((await api.new_session(account))["refresh_token"]) for _ in range(4)]
    logout, *answers = await asyncio.gather(api.logout(first["access_token"]), *refreshing)
    assert logout.status_code == 200
    for pair in (answer.json() for answer in answers if answer.status_code == 200):
        assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
        assert_problem(await api.refresh(pair["refresh_token"]), 401, "session_ended")


@pytest.mark.parametrize(("method", "path"), [("GET", "/auth/me"), ("POST", "/auth/logout")])
async def test_a_bearer_endpoint_asks_for_its_token_by_rfc_6750(api: Api, method: str, path: str) -> None:
    missing = await api.request(method, path)
    assert_problem(missing, 401, "token_missing")
    assert missing.headers["WWW-Authenticate"].startswith("Bearer")
    assert "error" not in missing.headers["WWW-Authenticate"]
    invalid = await api.request(method, path, headers={"Authorization": "Bearer nonsense"})
    assert_problem(invalid, 401, "token_invalid")
    assert invalid.headers["WWW-Authenticate"].startswith("Bearer")
    assert 'error="invalid_token"' in invalid.headers["WWW-Authenticate"]


# Me


async def test_me_answers_what_the_registration_did(api: Api) -> None:
    account = await api.new_account(full_name="Zoë 🦊")
    pair = await api.new_session(account)
    for _ in range(2):  # from Postgres, and from the cache
        answer = await api.me(pair["access_token"])
        assert answer.status_code == 200
        assert assert_fields(answer, PROFILE_FIELDS) == account.registered


# Sessions


async def test_an_eleventh_login_ends_the_oldest_session_and_no_other(api: Api) -> None:
    account = await api.new_account()
    pairs = [await api.new_session(account) for _ in range(11)]
    statuses = [(await api.me(pair["access_token"])).status_code for pair in pairs]
    assert statuses == [401] + [200] * 10
    assert_problem(await api.refresh(pairs[0]["refresh_token"]), 401, "session_evicted")
    assert (await api.refresh(pairs[1]["refresh_token"])).status_code == 200


async def test_many_logins_at_once_leave_ten_sessions(api: Api) -> None:
    account = await api.new_account()
    pairs = await asyncio.gather(*(api.new_session(account) for _ in range(20)))
    statuses = [(await api.me(pair["access_token"])).status_code for pair in pairs]
    assert statuses.count(200) == 10


async def test_a_disabled_user_has_no_way_in_until_it_is_enabled(service: ServiceProcess, api: Api) -> None:
    account = await api.new_account()
    pair = await api.new_session(account)
    disabled = await service.run("users", "disable", account.username.upper())
    assert (disabled.returncode, disabled.stderr) == (0, "")
    assert_problem(await api.refresh(pair["refresh_token"]), 403, "user_disabled")
    assert_problem(await api.login(account.username, account.password), 401, "invalid_credentials")
    assert_problem(await api.me(pair["access_token"]), 401, "token_invalid")
    assert_problem(await api.logout(pair["access_token"]), 401, "token_invalid")
    enabled = await service.run("users", "enable", account.username)
    assert (enabled.returncode, enabled.stderr) == (0, "")
    new = await api.new_session(account)
    assert (await api.me(new["access_token"])).status_code == 200
    assert_problem(await api.refresh(pair["refresh_token"]), 401, "session_ended")


# Every answer


async def test_no_problem_names_an_internal_part_or_echoes_a_secret(api: Api) -> None:
    account = await api.new_account()
    answers = [
        await api.register("no e-mail", "2short"),
        await api.register(account.username, PASSWORD),
        await api.login(account.username, WRONG),
        await api.refresh("v2.secret-refresh-token"),
        await api.me("secret-access-token"),
        await api.post("/auth/register", content=b'{"password": "secret'),
    ]
    for answer in answers:
        text = answer.text.lower()
        assert not [secret for secret in ("2short", PASSWORD, WRONG, "secret-") if secret in text]
        internals = ("postgres", "redis", "kafka", "quart", "hypercorn", "msgspec", "asyncpg", "bcrypt", "traceback")
        assert not [part for part in internals if part in text or part in str(answer.headers).lower()]
