"""Stopping: no accepted request is cut, no event is lost, and a rolling restart behind a balancer is not noticed."""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import anyio
import httpx
import psutil
import pytest
from support.api import Api, Secrets
from support.faults import TIMEOUTS, FaultStores, away
from support.kafka import events_in, topics
from support.process import ServiceProcess
from support.waiting import eventually

from authd.embedded import KafkaBroker
from authd.embedded.processes import free_port, guarded

pytestmark = pytest.mark.timeout(120)

PASSWORD = "correct horse battery"
#: 12 ms a hash: sixty of them can be caught in the act.
COST = "8"
CLIENTS = 8
#: The balancer asks ten times in this.
UNREADY_S = 1.0

HAPROXY = """\
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    timeout check 2s
    option httpchk GET /readyz
    http-check expect status 200
    # Only a request that was not sent is sent elsewhere: a registration must not run twice.
    option redispatch 1
    retries 3
    retry-on conn-failure
    default-server inter 100ms fall 2 rise 1
frontend clients
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance roundrobin
    server one {one} check
    server two {two} check
"""


def require_haproxy() -> str:
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        sentence = "the rolling restart needs haproxy"
        if os.environ.get("CI"):
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence)
    return found


@asynccontextmanager
async def balanced(folder: Path, one: ServiceProcess, two: ServiceProcess) -> AsyncIterator[str]:
    """The URL of a balancer in front of two replicas."""
    program, port = require_haproxy(), free_port()
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, one=one.settings["AUTHD_BIND"], two=two.settings["AUTHD_BIND"]))
    with (folder / "haproxy.txt").open("wb") as output:
        balancer = await anyio.open_process(
            guarded([program, "-db", "-f", config]), stdin=None, stdout=output, stderr=STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        async with Api(url, Secrets()) as api:

            async def serves() -> bool:
                assert balancer.returncode is None, (folder / "haproxy.txt").read_text()
                try:
                    return (await api.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(serves)
        yield url
    finally:
        balancer.kill()
        with anyio.CancelScope(shield=True):
            await balancer.wait()


async def use(url: str, known: Secrets, answers: Counter[str], users: list[int], stopped: anyio.Event) -> None:
    """A device's life, again and again. Every answer that is not what it must be is counted by what it was."""

    async def expect(name: str, status: int, call: Awaitable[httpx.Response]) -> dict[str, Any]:
        answer = await call
        if answer.status_code != status:
            answers[f"{name}: {answer.status_code} {answer.text}"] += 1
            raise Unexpected
        answers["right"] += 1
        body: dict[str, Any] = answer.json()
        return body

    async with Api(url, known) as api:
        while not stopped.is_set():
            username = f"{uuid.uuid4().hex}@example.com"
            with suppress(Unexpected):
                users.append((await expect("register", 201, api.register(username, PASSWORD)))["user_id"])
                pair = await expect("login", 200, api.login(username, PASSWORD))
                pair = await expect("refresh", 200, api.refresh(pair["refresh_token"]))
                await expect("me", 200, api.me(pair["access_token"]))
                await expect("logout", 200, api.logout(pair["access_token"]))


class Unexpected(Exception):
    """An answer that was counted."""


async def test_a_rolling_restart_behind_a_balancer_under_load_fails_no_request(
    parts: FaultStores, tmp_path: Path
) -> None:
    require_haproxy()
    settings = {"AUTHD_UNREADY_S": str(UNREADY_S), "AUTHD_TRUSTED_PROXIES": "127.0.0.1/32"}
    async with (
        parts.services.running(**settings) as one,
        parts.services.replica(one) as two,
        balanced(tmp_path, one, two) as url,
    ):
        answers: Counter[str] = Counter()
        users: list[int] = []
        stopped = anyio.Event()
        async with anyio.create_task_group() as group:
            for _ in range(CLIENTS):
                group.start_soon(use, url, one.secrets, answers, users, stopped)
            for replica in (one, two, one):
                assert await replica.stop() == 0
                before = len(replica.lines("request"))
                await replica.start()
                # The balancer has found it again: only now may the other one go.
                await eventually(lambda replica=replica, before=before: len(replica.lines("request")) > before + 20, 40)
            stopped.set()
        assert list(answers) == ["right"], answers
        assert {row["id"] for row in await one.query("SELECT id FROM users")} == set(users)


async def test_what_was_accepted_before_sigterm_is_answered_and_told(parts: FaultStores, broker: KafkaBroker) -> None:
    settings = topics(f"t{uuid.uuid4().hex[:12]}") | {
        "AUTHD_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "AUTHD_BCRYPT_COST": COST,
        "AUTHD_HASH_THREADS": "1",
        # A busy machine is no reason for a refusal here.
        "AUTHD_HASH_DEADLINE_S": "14",
        "AUTHD_REDIS_TIMEOUT_S": "10",
        "AUTHD_DATABASE_TIMEOUT_S": "10",
    }
    async with parts.services.running(**settings) as process, process.api() as api:
        account = await api.new_account()
        answers: Counter[tuple[int, str]] = Counter()

        def count(answer: httpx.Response) -> None:
            answers[answer.status_code, answer.json().get("code", "")] += 1

        async def register(number: int) -> None:
            count(await api.register(f"{number}-{uuid.uuid4().hex}@example.com", PASSWORD))

        async def login() -> None:
            count(await api.login(account.username, account.password))

        async with anyio.create_task_group() as group:
            for number in range(30):
                group.start_soon(register, number)
                group.start_soon(login)

            async def all_wait() -> bool:
                text = (await api.get("/metrics")).text
                waiting = next(
                    line for line in text.splitlines() if line.startswith('authd_hash_waiting{queue="others"}')
                )
                return float(waiting.split()[1]) + sum(answers.values()) >= 58  # one is being hashed

            await eventually(all_wait)
            assert sum(answers.values()) < 60
            process.signal()
        assert answers == {(201, ""): 30, (200, ""): 30}
        assert await process.wait() == 0
        # What Postgres and what Redis gave birth to: the last relay and the last send came after the last request.
        assert await process.query("SELECT FROM outbox") == []
        told = Counter(kind for kind, _ in await events_in(broker, settings["AUTHD_KAFKA_EVENTS_TOPIC"]))
        assert told == {"user.registered": 31, "session.opened": 30, "session.evicted": 20}


@pytest.mark.parametrize("part", ["postgres", "redis"])
async def test_a_frozen_part_holds_up_no_stop(parts: FaultStores, part: str) -> None:
    async with parts.services.running(**TIMEOUTS, AUTHD_DRAIN_S="5") as process, process.api() as api:
        account = await api.new_account()
        statuses: list[int] = []

        async def login() -> None:
            statuses.append((await api.login(account.username, account.password)).status_code)

        async with away(getattr(parts, part), "frozen"), anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(login)
            await eventually(lambda: in_flight(process) >= 5)
            process.signal()
            assert await process.wait(20) == 0
        assert statuses == [503] * 5


async def test_the_deadline_of_the_drain_answers_what_is_left_with_503(parts: FaultStores) -> None:
    settings = {"AUTHD_DRAIN_S": "1", "AUTHD_DATABASE_TIMEOUT_S": "12"}
    async with parts.services.running(**settings) as process, process.api() as api:
        account = await api.new_account()
        answers: list[httpx.Response] = []

        async def login() -> None:
            answers.append(await api.login(account.username, account.password))

        async with away(parts.postgres, "frozen"):
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(login)
                await eventually(lambda: in_flight(process) >= 5)
                process.signal()
            assert [answer.status_code for answer in answers] == [503] * 5
            assert {answer.json()["code"] for answer in answers} == {"deadline_exceeded"}
            assert all(answer.headers["Retry-After"] for answer in answers)
            assert await process.wait(20) == 0


def in_flight(process: ServiceProcess) -> int:
    """Connections that clients hold to the process."""
    port = process.address[1]
    found = psutil.Process(process.pid).net_connections("tcp")
    return sum(1 for link in found if link.laddr.port == port and link.status == psutil.CONN_ESTABLISHED)
