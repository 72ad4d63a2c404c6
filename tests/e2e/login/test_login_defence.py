"""The defence of login as a client meets it: over HTTP, and by the operator's commands."""

import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import bcrypt
import pytest
from support.api import Account, Api, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

WRONG = "a wrong password"
PAIR_MAX, ACCOUNT_MAX = 5, 8


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    limits = {"AUTHD_ACCOUNT_MAX_FAILURES": str(ACCOUNT_MAX), "AUTHD_MAX_LOGIN_ATTEMPTS": str(PAIR_MAX)}
    async with services.running(**limits) as process:
        yield process


async def device_token_of(api: Api, service: ServiceProcess, account: Account) -> str:
    answer = await api.login(account.username, account.password)
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["device_token"]
    service.secrets.add(token)
    return token


async def lock_account(service: ServiceProcess, account: Account) -> None:
    for _ in range(ACCOUNT_MAX):
        async with service.api() as stranger:  # from an address of its own
            assert_problem(await stranger.login(account.username, WRONG), 401, "invalid_credentials")


async def hashes_made(api: Api) -> float:
    found = re.search(r"^authd_hash_seconds_count (\S+)$", (await api.get("/metrics")).text, re.M)
    assert found is not None
    return float(found[1])


async def guess_at_once(api: Api, account: Account, count: int, **more: Any) -> Counter[str]:
    """The codes of the answers to so many wrong logins; what is refused says until when."""
    codes: Counter[str] = Counter()

    async def guess() -> None:
        form = {"username": account.username, "password": WRONG}
        answer = await api.post("/auth/login", data=form, timeout=60, **more)
        problem = assert_problem(answer, (401, 429, 503))
        if answer.status_code != 401:
            assert 0 < int(answer.headers["Retry-After"]) <= 300
        codes[problem["code"]] += 1

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(guess)
    return codes


# Device tokens


async def test_a_login_answers_a_device_token_and_a_refresh_does_not(api: Api, service: ServiceProcess) -> None:
    account = await api.new_account()
    answer = (await api.login(account.username, account.password)).json()
    service.secrets.add(answer["device_token"])
    assert answer.keys() == {"access_token", "refresh_token", "token_type", "expires_in", "device_token"}
    assert "device_token" not in (await api.refresh(answer["refresh_token"])).json()


async def test_the_owners_device_gets_into_a_locked_account_also_after_logout(
    api: Api, service: ServiceProcess
) -> None:
    account = await api.new_account()
    token = await device_token_of(api, service, account)
    pair = (await api.login(account.username, account.password)).json()
    assert (await api.logout(pair["access_token"])).status_code == 200
    await lock_account(service, account)
    form = {"username": account.username, "password": account.password}
    by_field = await api.post("/auth/login", data=form | {"device_token": token})
    by_header = await api.post("/auth/login", data=form, headers={"X-Device-Token": token})
    for answer in (by_field, by_header):
        assert answer.status_code == 200, answer.text
        service.secrets.add(*(answer.json()[name] for name in ("access_token", "refresh_token", "device_token")))
    for junk in ("", "junk", token[:-1], token + token, "\u00e9" * 107):
        refused = await api.login(account.username, account.password, device_token=junk)
        assert_problem(refused, 429, "login_locked")
    assert_problem(await api.login(account.username, account.password), 429, "login_locked")


async def test_a_stolen_device_token_gives_no_more_guesses_than_its_limit(api: Api, service: ServiceProcess) -> None:
    account = await api.new_account()
    token = await device_token_of(api, service, account)
    await lock_account(service, account)
    before = await hashes_made(api)
    codes = await guess_at_once(api, account, 60, headers={"X-Device-Token": token})
    assert codes == {"invalid_credentials": PAIR_MAX, "login_locked": 60 - PAIR_MAX}
    assert await hashes_made(api) == before + PAIR_MAX


# Storms


async def test_a_flood_of_guesses_gets_no_more_hashes_than_the_limit(api: Api) -> None:
    account = await api.new_account()
    before = await hashes_made(api)
    codes = await guess_at_once(api, account, 300)
    assert codes["invalid_credentials"] == PAIR_MAX
    assert codes.keys() <= {"invalid_credentials", "login_locked", "login_busy"}
    assert await hashes_made(api) == before + PAIR_MAX


async def test_sixty_correct_logins_at_once_all_answer_200(api: Api) -> None:
    account = await api.new_account()
    statuses: Counter[int] = Counter()

    async def log_in() -> None:
        statuses[(await api.login(account.username, account.password)).status_code] += 1

    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(log_in)
    assert statuses == {200: 60}


async def test_unknown_wrong_and_disabled_give_the_same_bytes_after_one_hash_each(
    api: Api, service: ServiceProcess
) -> None:
    account, disabled = await api.new_account(), await api.new_account()
    assert (await service.run("users", "disable", disabled.username)).returncode == 0
    seen = set()
    for username, password in (
        (account.username, WRONG),
        (disabled.username, WRONG),
        (disabled.username, disabled.password),
        ("unknown@example.com", WRONG),
    ):
        before = await hashes_made(api)
        answer = await api.login(username, password)
        assert await hashes_made(api) == before + 1
        headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
        seen.add((answer.status_code, answer.content, tuple(sorted(headers.items()))))
    assert len(seen) == 1


# Addresses


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
async def test_forged_addresses_have_no_effect_without_a_trusted_proxy(api: Api, header: str) -> None:
    account = await api.new_account()
    statuses = []
    for number in range(PAIR_MAX + 1):
        forged = f"for=203.0.113.{number}" if header == "Forwarded" else f"203.0.113.{number}"
        form = {"username": account.username, "password": WRONG}
        statuses.append((await api.post("/auth/login", data=form, headers={header: forged})).status_code)
    assert statuses == [401] * PAIR_MAX + [429]


async def test_behind_a_trusted_proxy_each_client_is_counted_alone(services: Services) -> None:
    settings = {"AUTHD_MAX_LOGIN_ATTEMPTS": "2", "AUTHD_TRUSTED_PROXIES": "127.0.0.0/8,10.0.0.0/8"}
    async with services.running(**settings) as process, process.api() as api:
        account = await api.new_account()

        async def guess(header: str, value: str) -> int:
            form = {"username": account.username, "password": WRONG}
            return (await api.post("/auth/login", data=form, headers={header: value})).status_code

        # What the client wrote itself, on the left, changes nothing.
        left = [await guess("X-Forwarded-For", f"1.1.1.{number}, 203.0.113.9, 10.0.0.1") for number in range(3)]
        assert left == [401, 401, 429]
        assert await guess("X-Forwarded-For", "203.0.113.9:4711, [::ffff:10.0.0.1]:80") == 429
        assert await guess("X-Forwarded-For", "203.0.113.10:4711") == 401
        assert await guess("X-Forwarded-For", "[2001:db8::7]:443") == 401
        [line] = await eventually(lambda: process.lines("trusted_proxies"))
        assert line["networks"] == ["127.0.0.0/8", "10.0.0.0/8"]


# The operator


async def test_users_unlock_opens_the_account_and_the_pair(api: Api, service: ServiceProcess) -> None:
    account = await api.new_account()
    await lock_account(service, account)
    done = await service.run("users", "unlock", account.username.upper())
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"Account: forgot {ACCOUNT_MAX} failures.")
    assert (await api.login(account.username, account.password)).status_code == 200
    await guess_at_once(api, account, PAIR_MAX)
    assert_problem(await api.login(account.username, account.password), 429, "login_locked")

    def pairs_locked() -> list[dict[str, Any]]:
        found = (line for line in service.lines("login_locked") if line["user_id"] == account.user_id)
        return [line for line in found if line["counter"] == "pair"]

    [lock] = await eventually(pairs_locked)
    address = lock["address"]
    done = await service.run("users", "unlock", account.username, "--address", address)
    assert done.returncode == 0 and f"Pair with {address}: forgot {PAIR_MAX} failures." in done.stdout
    assert (await api.login(account.username, account.password)).status_code == 200
    assert (await service.run("users", "unlock", account.username, "--address", "nonsense")).returncode == 2


async def test_check_measures_the_hashing_and_says_who_is_trusted(service: ServiceProcess) -> None:
    done = await service.run("check", AUTHD_BCRYPT_COST="10")
    hashing = r"^Hashing: cost 10 takes \d+ ms on one thread; proposed: AUTHD_BCRYPT_COST=1\d \(\d+ ms\)$"
    assert re.search(hashing, done.stdout, re.M)
    assert "Trusted proxies: none: the client's address is the socket's" in done.stdout
    done = await service.run("check", AUTHD_TRUSTED_PROXIES="10.0.0.0/8")
    assert "Trusted proxies: 10.0.0.0/8: of their X-Forwarded-For, the rightmost hop" in done.stdout


# Registration


@pytest.mark.parametrize(
    ("password", "rule"),
    [
        ("Password123", "The password is one of the commonest in known breaches."),
        ("the weakling 99", "The password must not contain the name of your e-mail address."),
        ("short", "The password must have at least 8 characters."),
    ],
)
async def test_a_refused_password_says_which_rule(api: Api, password: str, rule: str) -> None:
    body = {"username": "weakling@example.com", "password": password}
    problem = assert_problem(await api.post("/auth/register", json=body), 422, "invalid_request")
    assert problem["errors"] == [{"field": "password", "detail": rule}]


async def test_a_password_that_is_refused_today_still_logs_in(api: Api, service: ServiceProcess) -> None:
    account = await api.new_account()
    stored = bcrypt.hashpw(b"password123", bcrypt.gensalt(4)).decode()
    await service.query("UPDATE users SET password_hash = $2 WHERE id = $1", account.user_id, stored)
    answer = await api.post("/auth/login", data={"username": account.username, "password": "password123"})
    assert answer.status_code == 200


async def test_registrations_of_one_address_are_limited_and_say_until_when(services: Services) -> None:
    async with (
        services.running(AUTHD_ADDRESS_MAX_FAILURES="3") as process,
        process.api() as api,
        process.api() as other,
    ):
        account = await api.new_account()
        # A taken name counts as much: it was hashed.
        for _ in range(2):
            assert_problem(await api.register(account.username, account.password), 409, "username_taken")
        answer = await api.register("one.more@example.com", account.password)
        assert_problem(answer, 429, "registration_limited")
        assert 0 < int(answer.headers["Retry-After"]) <= 300
        assert (await api.login(account.username, account.password)).status_code == 200
        await other.new_account()
