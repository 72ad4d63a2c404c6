"""Starting, stopping and the commands of the real process."""

import asyncio
import json
import re
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import httpx
import psutil
import pytest
from redis.asyncio import Redis
from support.api import Account, Api, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

from authd.embedded import RedisServer, find_java_and_maven
from authd.embedded.processes import free_port

PASSWORD = "correct horse battery"
#: 0.25 s and 4 s for a hash on the machines this was written on: long enough to be caught in the act.
SLOW_COST, SLOWEST_COST = "12", "16"


async def metric(api: Api, name: str) -> float:
    """The sum of the metric's samples."""
    lines = (await api.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{|\s)", line))


async def until_a_login_waits(process: ServiceProcess) -> None:
    """With one thread, one that waits tells that another is being hashed."""
    async with process.api() as api:

        async def one_waits() -> bool:
            return await metric(api, "authd_hash_waiting") >= 1

        await eventually(one_waits)


# Stopping


async def test_sigterm_lets_logins_in_flight_finish_and_exits_with_0(services: Services) -> None:
    settings = {"AUTHD_BCRYPT_COST": SLOW_COST, "AUTHD_HASH_THREADS": "1"}
    async with services.running(**settings) as process, process.api() as api:
        account = await api.new_account()
        answers: list[httpx.Response] = []

        async def login() -> None:
            answers.append(await api.login(account.username, account.password))

        async with anyio.create_task_group() as group:
            group.start_soon(login)
            group.start_soon(login)
            await until_a_login_waits(process)
            assert not answers
            process.signal(signal.SIGTERM)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert await process.wait() == 0
        assert process.lines("stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_and_half_sent_connections_hold_up_no_stop(services: Services, number: signal.Signals) -> None:
    async with services.running() as process, process.api() as api:
        assert (await api.get("/livez")).status_code == 200  # and is kept alive
        async with (
            await anyio.connect_tcp(*process.address),
            await anyio.connect_tcp(*process.address) as half,
        ):
            await half.send(b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nusername=")
            process.signal(number)
            assert await process.wait(8) == 0
        with pytest.raises(httpx.ConnectError):
            await api.get("/livez")


async def test_a_second_signal_ends_at_once(services: Services) -> None:
    settings = {"AUTHD_BCRYPT_COST": SLOWEST_COST, "AUTHD_HASH_THREADS": "1", "AUTHD_HASH_DEADLINE_S": "14"}
    cut: set[str] = set()
    async with services.running(**settings) as process, process.api() as api:

        async def login(name: str) -> None:
            try:
                await api.login(name, PASSWORD)
            except httpx.TransportError:
                cut.add(name)

        async with anyio.create_task_group() as group:
            # The first may be answered by the time of the second signal, and on a busy machine the second, too.
            for number in range(4):
                group.start_soon(login, f"{number}@example.com")
            await until_a_login_waits(process)
            process.signal()
            await eventually(lambda: process.lines("stopping"))
            process.signal()
            assert await process.wait(5) == 1
        assert len(cut) >= 1
        assert process.lines("stopped_at_once")


# Settings and stores that are not there

BAD_SETTINGS: list[tuple[dict[str, str], list[str]]] = [
    (
        {"AUTHD_BCRYPT_COSTS": "12", "AUTHD_SECRET": "", "AUTHD_BCRYPT_COST": "99", "AUTHD_JWT_ALGORITHM": "none"},
        [
            "AUTHD_BCRYPT_COSTS is not a setting",
            "AUTHD_JWT_ALGORITHM is not usable",
            "AUTHD_SECRET is required",
            "AUTHD_BCRYPT_COST is not usable",
        ],
    ),
    (
        {"AUTHD_JWT_ALGORITHM": "HS256", "AUTHD_SECRET": "a short secret", "AUTHD_JWT_SECRET": "another one"},
        ["AUTHD_SECRET must have at least 32 bytes", "AUTHD_JWT_SECRET must have at least 32 bytes"],
    ),
    (
        {"AUTHD_JWT_ALGORITHM": "HS256", "AUTHD_SECRET": "m" * 40, "AUTHD_JWT_SECRET": "m" * 40},
        ["AUTHD_JWT_SECRET must differ from AUTHD_SECRET"],
    ),
    (
        {"AUTHD_DATABASE_URL": "postgresql://u:another one#@h/db", "AUTHD_REDIS_URL": "redis://:another one/@h"},
        ["AUTHD_DATABASE_URL is not a usable URL", "AUTHD_REDIS_URL is not a usable URL"],
    ),
    ({"AUTHD_TRUSTED_PROXIES": "0.0.0.0/0"}, ["AUTHD_TRUSTED_PROXIES holds a network wider than /8"]),
    ({"AUTHD_LOG_DIR": "/dev/null/logs"}, ["AUTHD_LOG_DIR cannot be written"]),
]


@pytest.mark.parametrize(("changed", "sentences"), BAD_SETTINGS, ids=lambda value: "-".join(value)[:40])
async def test_unusable_settings_end_the_start_with_2_and_a_sentence_that_names_each(
    services: Services, changed: dict[str, str], sentences: list[str]
) -> None:
    async with services.prepared() as process:
        done = await process.run("serve", **changed)
        assert (done.returncode, done.stdout) == (2, "")
        lines = done.stderr.splitlines()
        assert len(lines) == len(sentences)
        for sentence in sentences:
            assert [line for line in lines if line.startswith(f"authd: {sentence}") and line.endswith(".")]
        assert not [secret for secret in ("m" * 40, "a short secret", "another one") if secret in done.stderr]


@pytest.mark.parametrize(
    ("name", "text", "status", "sentence"),
    [
        ("AUTHD_KAFKA_BOOTSTRAP_SERVERS", "localhost:Secr3t", 2, "AUTHD_KAFKA_BOOTSTRAP_SERVERS must be host:port"),
        ("AUTHD_REDIS_URL", "redis://127.0.0.1:1/0?socket_timeout=Secr3t", 2, "AUTHD_REDIS_URL has a parameter"),
        ("AUTHD_DATABASE_URL", "postgresql://127.0.0.1:1/authd?sslmode=Secr3t", 1, "`sslmode` parameter must be"),
    ],
    ids=["kafka", "redis", "postgres"],
)
async def test_what_only_a_driver_finds_unusable_ends_the_start_with_a_sentence_too(
    services: Services, name: str, text: str, status: int, sentence: str
) -> None:
    async with services.prepared() as process:
        done = await process.run("serve", **{name: text})
        assert done.returncode == status
        assert f"authd: {sentence}" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Secr3t" not in done.stderr + done.stdout


async def test_an_address_in_use_ends_the_start_with_2(services: Services) -> None:
    async with services.running() as process:
        done = await process.run("serve")
        assert done.returncode == 2
        assert f"AUTHD_BIND={process.settings['AUTHD_BIND']} cannot be listened on" in done.stderr


async def test_a_dotenv_file_is_read_and_the_environment_wins(services: Services) -> None:
    async with services.prepared() as process:
        secret = process.settings.pop("AUTHD_SECRET")
        port = free_port()
        (process.folder / ".env").write_text(f"AUTHD_SECRET={secret}\nAUTHD_BIND=127.0.0.1:1\nOTHER=x\n")
        process.settings["AUTHD_BIND"] = f"127.0.0.1:{port}"
        await process.start()
        (process.folder / ".env").write_text("AUTHD_SECRETS=x\n")
        assert "AUTHD_SECRETS is not a setting" in (await process.run("check")).stderr
        process.settings["AUTHD_SECRET"] = secret


async def test_a_postgres_that_stays_away_ends_the_start_with_1_and_a_sentence(services: Services) -> None:
    away = f"postgresql://authd:canary-of-the-url@127.0.0.1:{free_port()}/authd"
    async with services.prepared() as process:
        done = await process.run("serve", AUTHD_DATABASE_URL=away, AUTHD_START_TIMEOUT_S="1")
        assert done.returncode == 1
        assert "authd: User data cannot be reached" in done.stderr
        assert '"event":"postgres_away"' in done.stderr
        assert "canary-of-the-url" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr + done.stdout


async def test_another_master_secret_than_the_keys_were_sealed_under_ends_the_start_with_1(services: Services) -> None:
    async with services.running() as process:
        assert await process.stop() == 0
        done = await process.run("serve", AUTHD_SECRET="n" * 40)
        assert done.returncode == 1
        assert "AUTHD_SECRET" in done.stderr
        assert "Traceback" not in done.stderr
        process.settings |= {"AUTHD_SECRET": "n" * 40, "AUTHD_SECRET_PREVIOUS": process.settings["AUTHD_SECRET"]}
        await process.start()


async def test_a_redis_that_is_away_makes_the_service_unready_and_not_dead(services: Services) -> None:
    async with services.prepared() as process, process.api() as api:
        process.settings["AUTHD_REDIS_URL"] = f"redis://127.0.0.1:{free_port()}"
        await process.launch()

        async def is_unready() -> bool:
            assert process.is_running, process.output
            try:
                return (await api.get("/readyz")).status_code == 503
            except httpx.ConnectError:
                return False

        await eventually(is_unready)
        report = (await api.get("/readyz")).json()
        assert (report["status"], report["parts"]["session_store"]) == ("unready", False)
        assert (await api.get("/livez")).status_code == 200
        answer = await api.login("x@example.com", PASSWORD)
        assert_problem(answer, 503, "session_store_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        done = await process.run("check")
        assert done.returncode == 1
        assert "Redis: away" in done.stdout


# Commands


async def test_migrate_makes_the_schema_once(services: Services) -> None:
    async with services.prepared(empty=True) as process:
        first = await process.run("migrate")
        assert (first.returncode, first.stderr) == (0, "")
        assert re.fullmatch(r"(applied \d{4}_\w+\.sql\n)+", first.stdout)
        assert await process.query("SELECT 1 FROM users") == []
        second = await process.run("migrate")
        assert (second.returncode, second.stdout) == (0, "The schema is up to date.\n")


async def test_a_schema_of_a_newer_authd_is_not_touched(services: Services) -> None:
    async with services.prepared() as process:
        await process.query("INSERT INTO authd_migrations (name) VALUES ('9999_future.sql')")
        for command in ("serve", "migrate"):
            done = await process.run(command)
            assert done.returncode == 1
            assert "9999_future.sql" in done.stderr
            assert "Traceback" not in done.stderr


async def test_check_names_every_part(services: Services) -> None:
    async with services.prepared() as process:
        done = await process.run("check")
        assert (done.returncode, done.stderr) == (0, "")
        assert {"Postgres: answers", "Redis: answers"} <= set(done.stdout.splitlines())
        assert "Kafka: none configured" in done.stdout


@pytest.mark.parametrize("policy", ["allkeys-lru", "noeviction"])
async def test_a_redis_that_evicts_is_warned_of_at_the_start_and_by_check(
    services: Services, stores_folder: Path, policy: str
) -> None:
    async with RedisServer(stores_folder / f"redis-{policy}", durable=False) as redis:
        async with Redis.from_url(redis.url) as client:
            await client.config_set("maxmemory-policy", policy)
        async with services.running(AUTHD_REDIS_URL=redis.url) as process:
            done = await process.run("check")
            # The last line of the start, written after all others.
            await eventually(lambda: process.lines("ready"))
            warned = [line["policy"] for line in process.lines("redis_evicts")]
        assert warned == ([policy] if policy == "allkeys-lru" else [])
        assert (f"Redis: evicts ({policy})" in done.stdout) == (policy == "allkeys-lru")


async def test_users_show_tells_the_state_of_a_user_in_any_spelling(services: Services) -> None:
    async with services.running() as process, process.api() as api:
        account = await api.new_account()
        for state in ("active", "disabled"):
            shown = await process.run("users", "show", f" {account.username.upper()} ")
            assert (shown.returncode, shown.stderr) == (0, "")
            assert shown.stdout.startswith(f"{account.user_id} {account.username} {state}, registered ")
            if state == "active":
                assert (await process.run("users", "disable", account.username)).returncode == 0


async def test_commands_about_nobody_exit_with_1_and_unknown_commands_with_2(services: Services) -> None:
    async with services.prepared() as process:
        commands = [("users", action, "nobody@example.com") for action in ("show", "disable", "enable")]
        for done in await asyncio.gather(*(process.run(*command) for command in commands)):
            assert done.returncode == 1
            assert done.stderr.startswith("authd: No such user")
        for done in await asyncio.gather(process.run("users", "delete", "x"), process.run()):
            assert done.returncode == 2
            assert done.stderr.startswith("usage: authd")


# Several processes


async def test_two_processes_that_start_at_once_on_an_empty_database_agree_on_the_keys(services: Services) -> None:
    async with services.prepared(empty=True) as one, services.replica(one) as other:
        await asyncio.gather(one.start(), other.start())
        async with one.api() as first, other.api() as second:
            keys = [(await api.get("/.well-known/jwks.json")).json() for api in (first, second)]
            assert keys[0] == keys[1]
            assert len(keys[0]["keys"]) == 1
            account = await first.new_account()
            for here, there in ((first, second), (second, first)):
                pair = await here.new_session(account)
                assert (await there.me(pair["access_token"])).status_code == 200
                assert (await there.refresh(pair["refresh_token"])).status_code == 200
            pair = await first.new_session(account)
            assert (await second.logout(pair["access_token"])).status_code == 200
            assert_problem(await first.me(pair["access_token"]), 401, "token_invalid")


async def test_two_workers_serve_as_one_and_end_together(services: Services) -> None:
    async with services.running(AUTHD_WORKERS="2") as process:
        workers = process.children()
        assert len(workers) == 2
        # Ready as a whole is only one of them.
        await eventually(lambda: len(process.lines("ready")) == 2)
        async with process.api() as api:
            account = await api.new_account()
            pair = await api.new_session(account)
        asked = 40
        for _ in range(asked):  # a connection each
            async with process.api() as api:
                assert (await api.me(pair["access_token"])).status_code == 200
        async with process.api() as api:
            text = (await api.get("/metrics")).text
            [line] = [line for line in text.splitlines() if re.match(r"authd_http_requests_total\{.*/auth/me", line)]
            assert float(line.rpartition(" ")[2]) == asked
        assert (process.folder / "media" / "logs" / "auth_service.worker-1.log").exists()
        assert await process.stop() == 0
        assert not any(psutil.pid_exists(worker.pid) for worker in workers)


async def test_a_worker_with_nothing_to_do_does_not_hurry_the_other_when_both_are_stopped(services: Services) -> None:
    async with services.running(AUTHD_WORKERS="2", AUTHD_BCRYPT_COST=SLOW_COST) as process:
        await eventually(lambda: len(process.lines("ready")) == 2)
        answers: list[int] = []

        async def login(number: int) -> None:
            async with process.api() as api:
                answers.append((await api.login(f"{number}@example.com", PASSWORD)).status_code)

        async with anyio.create_task_group() as group:
            for number in range(5):  # an odd number over two threads: one worker ends first
                group.start_soon(login, number)
            await until_a_login_waits(process)
            process.signal()
        assert answers == [401] * 5
        assert await process.wait() == 0
        assert not process.lines("stopped_at_once")


async def test_a_worker_that_dies_takes_the_others_along_and_the_exit_says_so(services: Services) -> None:
    async with services.running(AUTHD_WORKERS="2") as process:
        await eventually(lambda: len(process.lines("ready")) == 2)
        workers = process.children()
        workers[1].kill()
        assert await process.wait(10) not in (0, None)
        assert not any(psutil.pid_exists(worker.pid) for worker in workers)
        with pytest.raises(OSError, match="onnect"):
            await anyio.connect_tcp(*process.address)


async def test_workers_end_with_a_parent_that_was_killed(services: Services) -> None:
    async with services.running(AUTHD_WORKERS="2") as process:
        await eventually(lambda: len(process.lines("ready")) == 2)
        workers = process.children()
        process.signal(signal.SIGKILL)
        await process.wait(10)
        await eventually(lambda: not any(worker.is_running() for worker in workers))
        with pytest.raises(OSError, match="onnect"):
            await anyio.connect_tcp(*process.address)


# What operators look at


async def test_every_answer_can_be_found_in_the_log_file_by_its_request_id(service: ServiceProcess, api: Api) -> None:
    account = await api.new_account()
    answers = {
        ("POST", "/auth/login", 200): await api.login(account.username, account.password),
        ("POST", "/auth/login", 401): await api.login(account.username, PASSWORD),
        ("GET", "unmatched", 404): await api.get(f"/{account.username}"),
        ("GET", "/auth/me", 401): await api.get("/auth/me", headers={"X-Request-ID": "chosen-by.the_Client"}),
        ("POST", "/auth/refresh_token", 422): await api.post("/auth/refresh_token", headers={"X-Request-ID": "a b"}),
    }
    ids = [answer.headers["X-Request-ID"] for answer in answers.values()]
    assert len(set(ids)) == len(answers)
    assert ids[3] == "chosen-by.the_Client"
    assert ids[4] != "a b"

    async def by_id() -> dict[str, dict[str, object]]:
        lines = [json.loads(line) for line in service.log_file.read_text().splitlines()]
        found = {line["request_id"]: line for line in lines if line["event"] == "request"}
        return found if set(ids) <= found.keys() else {}

    found = await eventually(by_id)
    for request_id, (method, route, status) in zip(ids, answers, strict=True):
        line = found[request_id]
        assert (line["method"], line["route"], line["status"]) == (method, route, status)
        assert isinstance(line["ms"], float)
        assert line["level"] == "info"
        assert account.username not in json.dumps(line)


async def test_the_probes_and_metrics_have_the_shape_that_monitoring_reads(api: Api) -> None:
    live = await api.get("/livez")
    assert (live.status_code, live.json()) == (200, {"status": "ok"})
    ready = await api.get("/readyz")
    parts = {"user_store": True, "session_store": True, "events": False}
    report = ready.json()
    assert report.pop("events_oldest_s") >= 0
    assert (ready.status_code, report) == (200, {"status": "degraded", "parts": parts})
    await api.new_session(await api.new_account())
    metrics = await api.get("/metrics")
    assert metrics.status_code == 200
    assert metrics.headers["Content-Type"].startswith("text/plain; version=")
    line = 'authd_http_requests_total{method="POST",route="/auth/login",status="200"}'
    assert any(each.startswith(line) for each in metrics.text.splitlines())
    for name in ("authd_hash_seconds_count", "authd_outbox_events", "authd_kafka_connected"):
        assert re.search(rf"^{name} \d", metrics.text, re.MULTILINE), name


async def test_every_answer_forbids_sniffing_framing_and_running_it(api: Api) -> None:
    for path in ("/livez", "/auth/me", "/nowhere", "/metrics"):
        headers = (await api.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "server" not in headers


# authd dev


@pytest.fixture
async def dev() -> AsyncIterator[ServiceProcess]:
    settings = {"AUTHD_BIND": f"127.0.0.1:{free_port()}", "AUTHD_BCRYPT_COST": "4"}
    with tempfile.TemporaryDirectory(prefix="authd-e2e-") as folder:
        process = ServiceProcess(Path(folder), settings, command=("dev",))
        try:
            yield process
            await process.check_log()
        finally:
            await process.kill()


@pytest.mark.timeout(180)
async def test_dev_starts_from_an_empty_folder_and_a_second_run_keeps_the_data(dev: ServiceProcess) -> None:
    async def serve_and_stop(account: Account | None, pair: dict[str, str] | None) -> tuple[Account, dict[str, str]]:
        await dev.start(within_s=80)
        async with dev.api() as api:
            if account is None:
                account = await api.new_account()
            else:
                assert_problem(await api.register(account.username, PASSWORD), 409, "username_taken")
            if pair is not None:
                assert (await api.me(pair["access_token"])).status_code == 200
            pair = await api.new_session(account)
            if not find_java_and_maven().missing:

                async def has_kafka() -> bool:
                    return bool((await api.get("/readyz")).json()["status"] == "ready")

                await eventually(has_kafka)
        assert f"curl http://{dev.settings['AUTHD_BIND']}/auth/me" in dev.output
        stores = dev.children()
        assert await dev.stop() == 0
        assert not [store for store in stores if psutil.pid_exists(store.pid)]
        return account, pair

    account, pair = await serve_and_stop(None, None)
    dev.secrets.add((dev.folder / ".authd-dev" / "secret").read_text())
    assert (dev.folder / ".authd-dev" / "secret").stat().st_mode & 0o777 == 0o600
    await serve_and_stop(account, pair)
