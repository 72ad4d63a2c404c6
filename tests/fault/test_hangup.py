"""The client hangs up, or the network to a store is cut, at each step of each request: one of the two legal states is
left, what was guessed is counted, and nothing leaks.

A step is a chunk that travels between the process and a store, either way: it is held, the cut is made, and it goes on.
Background tasks talk too, so a step may be theirs; then the cut falls somewhere in the request all the same.
"""

import re
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import httpx
import pytest
from redis.asyncio import Redis
from support.api import Account, Api
from support.faults import FaultStores, assert_alive, assert_dead, retried
from support.process import ServiceProcess
from support.proxy import Direction, Proxy, proxied
from support.waiting import eventually

pytestmark = pytest.mark.timeout(120)

#: More steps than any request takes: about 40.
STEPS_MAX = 90
LOG_TAIL_CHARS = 50_000
LOGGED_S = 2.0
#: Small pools: a connection that leaked at each step would soon be missed.
POOLS = {"AUTHD_DATABASE_POOL_MAX": "3", "AUTHD_REDIS_POOL_MAX": "6"}
#: A request whose client has left holds its connection to Postgres until the held answer comes, or for so long.
TIMEOUTS = {"AUTHD_DATABASE_TIMEOUT_S": "0.3", "AUTHD_REDIS_TIMEOUT_S": "0.5"}

PASSWORD = "correct horse battery"
#: The first byte of a session's value: session_format.lua.
LIVE = 4

Cut = Literal["hang-up", "network"]
Send = Callable[[Api], Awaitable[httpx.Response]]


@dataclass
class Bench:
    """A process that reaches its stores through proxies."""

    process: ServiceProcess
    api: Api
    postgres: Proxy
    redis: Proxy
    raw: Redis
    #: Of its own deployment.
    query: Callable[..., Awaitable[list[dict[str, Any]]]]

    @property
    def proxies(self) -> Sequence[Proxy]:
        return (self.postgres, self.redis)


@pytest.fixture(scope="module")
async def bench(parts: FaultStores) -> AsyncIterator[Bench]:
    async with (
        proxied(parts.postgres.port) as postgres,
        proxied(parts.redis.port) as redis,
        parts.services.prepared(**POOLS, **TIMEOUTS) as process,
    ):
        direct = ServiceProcess(process.folder, dict(process.settings))
        for name, upstream, proxy in (
            ("AUTHD_DATABASE_URL", parts.postgres.port, postgres),
            ("AUTHD_REDIS_URL", parts.redis.port, redis),
        ):
            process.settings[name] = process.settings[name].replace(f":{upstream}", f":{proxy.port}")
        await process.start()
        async with process.api() as api, Redis.from_url(parts.redis.url) as raw:
            yield Bench(process, api, postgres, redis, raw, direct.query)


class Step:
    """Holds the chunk with this number, of both stores together; the first is 1."""

    def __init__(self, proxies: Sequence[Proxy], number: int, on_held: Callable[[], None]) -> None:
        self._proxies = proxies
        self._left = number
        self._on_held = on_held
        self.is_held = False
        for proxy in proxies:
            proxy.trap(self._is_due)

    def _is_due(self, _: Direction, __: bytes) -> bool:
        self._left -= 1
        if self._left == 0:
            self.is_held = True
            self._on_held()
        return self._left == 0

    def cut(self) -> None:
        for proxy in self._proxies:
            proxy.cut_once()

    def release(self) -> None:
        for proxy in self._proxies:
            proxy.release()


async def cut_at(bench: Bench, cut: Cut, number: int, send: Send) -> tuple[bool, httpx.Response | None]:
    """Send, and cut at a step: whether the request had so many, and the answer if one came."""
    request_id = secrets.token_hex(8)
    answers: list[httpx.Response] = []
    over, asking = anyio.Event(), anyio.CancelScope()
    reservations = (await throttle(bench, "pair"))["reservations"]

    async def ask() -> None:
        async with Api(bench.process.url, bench.process.secrets) as api:
            api.headers["X-Request-ID"] = request_id
            with asking:
                answers.append(await send(api))
        over.set()

    step = Step(bench.proxies, number, over.set)
    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await over.wait()
        if step.is_held and cut == "hang-up":
            asking.cancel()
        elif step.is_held:
            step.cut()
            step.release()
    if step.is_held:
        # Where a background task's step came first, the request may never have been sent.
        with suppress(TimeoutError):
            await eventually(lambda: is_logged(bench.process, request_id), LOGGED_S)
    step.release()
    await until_settled(bench, reservations if cut == "hang-up" else None)
    return step.is_held, answers[0] if answers else None


def is_logged(process: ServiceProcess, request_id: str) -> bool:
    """Whether the process is done with the request, also where its client has left."""
    tail = process.output[-LOG_TAIL_CHARS:]
    return any(request_id in line and '"event":"request"' in line for line in tail.splitlines())


async def until_settled(bench: Bench, reservations: int | None) -> None:
    """Nothing of a request is under way any more in Postgres, and a hang-up leaves no reservation in Redis. A cut may:
    it counts as a failure until it expires.
    """

    async def is_settled() -> bool:
        busy = await bench.query(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND state <> 'idle'"
        )
        return not busy and reservations in (None, (await throttle(bench, "pair"))["reservations"])

    await eventually(is_settled)


async def throttle(bench: Bench, kind: str) -> dict[str, int]:
    """What all counters of a kind hold together."""
    pattern = f"authd:{bench.process.settings['AUTHD_DEPLOYMENT']}:*:throttle:{kind}:*"
    counters = [await bench.raw.hgetall(key) async for key in bench.raw.scan_iter(pattern, 1000)]
    return {
        "failures": sum(int(counter.get(b"n", 0)) for counter in counters),
        "reservations": sum(1 for counter in counters for name in counter if name.startswith(b"r:")),
    }


async def hashes(bench: Bench) -> int:
    """Passwords hashed so far."""
    found = re.search(r"^authd_hash_seconds_count (\S+)$", (await bench.api.get("/metrics")).text, re.MULTILINE)
    assert found
    return int(float(found[1]))


async def live_sessions(bench: Bench, account: Account) -> int:
    """How many Redis has of the user, past authd."""
    values = await bench.raw.hgetall(await sessions_key(bench, account))
    return sum(1 for name, value in values.items() if name != b"e" and value[0] == LIVE)


async def forget_sessions(bench: Bench, account: Account) -> None:
    await bench.raw.delete(await sessions_key(bench, account))


async def sessions_key(bench: Bench, account: Account) -> str:
    return await bench.process.sessions_key(account.user_id)


async def new_account(bench: Bench) -> Account:
    """As `Api.new_account`, while the breaker may still be open after the cut before."""
    username = f"{uuid.uuid4().hex}@example.com"
    answer = await retried(lambda: bench.api.register(username, PASSWORD))
    assert answer.status_code == 201, answer.text
    return Account(username, PASSWORD, answer.json()["user_id"], answer.json())


async def new_session(bench: Bench, account: Account) -> dict[str, Any]:
    answer = await retried(lambda: bench.api.login(account.username, account.password))
    assert answer.status_code == 200, answer.text
    pair: dict[str, Any] = answer.json()
    return pair


async def each_step(play: Callable[[int], Awaitable[bool]]) -> None:
    """Play with step 1, 2, 3 … until the request had no such step."""
    for number in range(1, STEPS_MAX):
        if not await play(number):
            assert number > 2, "the request took no step at all"
            return
    pytest.fail(f"more than {STEPS_MAX} steps")


def assert_final(answer: httpx.Response | None, status: int) -> bool:
    """Whether it worked. An answer that came is either that, or a 503."""
    if answer is not None and answer.status_code != status:
        assert answer.status_code == 503, answer.text
    return answer is not None and answer.status_code == status


both_cuts = pytest.mark.parametrize("cut", ["hang-up", "network"])


@both_cuts
async def test_a_registration_that_is_cut_is_there_with_its_event_or_not_at_all(bench: Bench, cut: Cut) -> None:
    async def play(number: int) -> bool:
        username = f"{uuid.uuid4().hex}@example.com"
        had_step, answer = await cut_at(bench, cut, number, lambda api: api.register(username, PASSWORD))
        rows = await bench.query(
            "SELECT u.id, array_agg(o.type) AS events FROM users u LEFT JOIN outbox o ON o.user_id = u.id "
            "WHERE u.username = $1 GROUP BY u.id",
            username,
        )
        assert not rows or rows[0]["events"] == ["user.registered"]
        assert rows or not assert_final(answer, 201)
        again = await retried(lambda: bench.api.register(username, PASSWORD))
        assert again.status_code == (409 if rows else 201)
        assert (await retried(lambda: bench.api.login(username, PASSWORD))).status_code == 200
        return had_step

    await each_step(play)


@both_cuts
async def test_a_login_that_is_cut_opened_one_session_or_none(bench: Bench, cut: Cut) -> None:
    async def play(number: int) -> bool:
        account = await new_account(bench)
        had_step, answer = await cut_at(bench, cut, number, lambda api: api.login(account.username, account.password))
        live = await live_sessions(bench, account)
        assert live in ({1} if assert_final(answer, 200) else {0, 1})
        again = await retried(lambda: bench.api.login(account.username, account.password))
        assert again.status_code == 200
        assert await live_sessions(bench, account) == live + 1
        await assert_alive(bench.api, again.json())
        return had_step

    await each_step(play)
    assert (await throttle(bench, "pair"))["failures"] == 0


@both_cuts
async def test_a_guess_that_is_cut_is_counted_if_it_was_hashed(bench: Bench, cut: Cut) -> None:
    async def play(number: int) -> bool:
        account = await new_account(bench)
        before, hashed = await throttle(bench, "account"), await hashes(bench)
        had_step, answer = await cut_at(bench, cut, number, lambda api: api.login(account.username, "a guess"))
        guesses = await hashes(bench) - hashed
        if assert_final(answer, 401):
            assert guesses == 1
        counted = {name: number - before[name] for name, number in (await throttle(bench, "account")).items()}
        # A network that is cut while a guess is settled leaves its reservation, which counts as long as it lives.
        assert counted["failures"] == guesses or (cut == "network" and sum(counted.values()) >= guesses)
        return had_step

    await each_step(play)


@both_cuts
@pytest.mark.parametrize("is_lost", [False, True], ids=["known", "lost"])
async def test_a_refresh_that_is_cut_can_be_repeated(bench: Bench, cut: Cut, is_lost: bool) -> None:
    async def play(number: int) -> bool:
        account = await new_account(bench)
        pair = await new_session(bench, account)
        if is_lost:
            await forget_sessions(bench, account)
        had_step, answer = await cut_at(bench, cut, number, lambda api: api.refresh(pair["refresh_token"]))
        again = await retried(lambda: bench.api.refresh(pair["refresh_token"]))
        assert again.status_code == 200, again.text
        if answer is not None and assert_final(answer, 200):
            assert again.json()["refresh_token"] == answer.json()["refresh_token"]
        await assert_alive(bench.api, again.json())
        assert await live_sessions(bench, account) == 1
        return had_step

    await each_step(play)


@pytest.mark.parametrize(("cut", "scope"), [("hang-up", "current"), ("network", "all")])
async def test_a_logout_that_is_cut_holds_everywhere_if_postgres_has_it(bench: Bench, cut: Cut, scope: str) -> None:
    async def play(number: int) -> bool:
        account = await new_account(bench)
        pair = await new_session(bench, account)

        async def logout(api: Api) -> httpx.Response:
            return await api.post(f"/auth/logout?scope={scope}", headers=api.bearer(pair["access_token"]))

        had_step, answer = await cut_at(bench, cut, number, logout)
        rows = await bench.query("SELECT reason FROM revocations WHERE user_id = $1", account.user_id)
        assert rows or not assert_final(answer, 200)
        if rows and (answer is None or answer.status_code != 200):
            # Nobody was promised anything, and nobody knew that it was committed: the log is read every second.
            await eventually(lambda: is_refused(bench, pair))
        if rows:
            await assert_dead(bench.api, pair)
        else:
            await assert_alive(bench.api, pair)
        return had_step

    await each_step(play)


async def is_refused(bench: Bench, pair: dict[str, Any]) -> bool:
    return (await bench.api.me(pair["access_token"])).status_code == 401


async def test_nothing_has_leaked(bench: Bench) -> None:
    """The last test of this file: after some hundred cuts, pools of three and six connections are whole."""
    account = await new_account(bench)
    answers: list[httpx.Response] = []

    async def login() -> None:
        answers.append(await bench.api.login(account.username, account.password))

    async with anyio.create_task_group() as group:
        for _ in range(40):
            group.start_soon(login)
    assert {answer.status_code for answer in answers} == {200}
    waiting = re.search(
        r"^authd_hash_waiting\{queue=\"others\"\} (\S+)$", (await bench.api.get("/metrics")).text, re.MULTILINE
    )
    assert waiting and float(waiting[1]) == 0
    # No request is left that the drain would wait for.
    bench.process.signal()
    assert await bench.process.wait(8) == 0
