"""What the edge refuses, over real sockets: bytes in doubt, pages of other sites, and who asks for metrics outside."""

import json
import re
import socket
from ipaddress import ip_address
from typing import Any

import anyio
import httpx
import pytest
from support.api import Api, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

from authd.embedded.processes import free_port

WITHIN_S = 10.0
ORIGIN = "https://app.example.com"
REFRESH = b"POST /auth/refresh_token HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


async def talk(process: ServiceProcess, sent: bytes) -> list[int]:
    """The statuses of what is answered before the service closes the connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", await exchange(process, sent))]


async def exchange(process: ServiceProcess, sent: bytes, *, half_closes: bool = False) -> bytes:
    received = bytearray()
    with anyio.fail_after(WITHIN_S):
        async with await anyio.connect_tcp(*process.address) as stream:
            await stream.send(sent)
            if half_closes:
                await stream.send_eof()
            try:
                while True:
                    received += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return bytes(received)


# Bytes


DOUBTFUL = {
    "a bare LF": b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: b\nContent-Length: 65\r\n\r\n",
    "obs-fold": b"POST /auth/login HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n",
    "a length twice": REFRESH + b"Content-Length: 21\r\nContent-Length: 21\r\n\r\n",
    "a list of lengths": REFRESH + b"Content-Length: 21, 21\r\n\r\n",
    "a method in lower case": b"get /livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bare LF ends the trailers": REFRESH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\n",
}


@pytest.mark.parametrize("sent", DOUBTFUL.values(), ids=DOUBTFUL)
async def test_what_a_proxy_may_read_otherwise_is_refused_and_nothing_behind_it_is_answered(
    service: ServiceProcess, sent: bytes
) -> None:
    victims = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    assert await talk(service, sent + victims) == [400]


@pytest.mark.parametrize("behind", [b"\r\n", b"\n", b"\0"], ids=repr)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_request_that_is_carried_out_is_answered_whatever_stands_behind_it(
    service: ServiceProcess, api: Api, version: str, behind: bytes
) -> None:
    pair = await api.new_session(await api.new_account())
    body = json.dumps({"refresh_token": pair["refresh_token"]}).encode()
    head = REFRESH.replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    head += b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = await exchange(service, head + body + behind)
    assert answer.startswith(b"HTTP/1.1 200 ")
    service.secrets.add(
        *(json.loads(answer.partition(b"\r\n\r\n")[2])[name] for name in ("access_token", "refresh_token"))
    )


async def test_an_empty_line_before_a_request_is_skipped(service: ServiceProcess) -> None:
    asked = b"\r\nGET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    assert await talk(service, asked * 2 + asked.replace(b"Host", b"Connection: close\r\nHost")) == [200] * 3


async def test_a_client_that_stops_sending_has_hung_up(services: Services) -> None:
    async with services.running(AUTHD_BCRYPT_COST="14", AUTHD_HASH_THREADS="1") as process, process.api() as api:
        body = b"username=nobody%40example.com&password=wrong+password"
        head = b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        assert await exchange(process, head + body, half_closes=True) == b""

        async def is_noticed() -> bool:
            line = 'authd_http_requests_total{method="POST",route="/auth/login",status="499"} 1.0'
            return line in (await api.get("/metrics")).text

        await eventually(is_noticed)


# Pages of other sites


async def hashes(api: Api) -> float:
    [count] = re.findall(r"^authd_hash_seconds_count (\S+)$", (await api.get("/metrics")).text, re.MULTILINE)
    return float(count)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{ORIGIN}.evil.example", None])
async def test_a_page_of_another_site_can_neither_log_in_nor_register(services: Services, origin: str | None) -> None:
    async with (
        services.running(AUTHD_CORS_ORIGINS=ORIGIN, AUTHD_MAX_LOGIN_ATTEMPTS="2") as process,
        process.api() as api,
    ):
        account = await api.new_account()
        headers = {"Sec-Fetch-Site": "cross-site"} | ({"Origin": origin} if origin else {})
        before = await hashes(api)
        for _ in range(5):
            form = {"username": account.username, "password": "wrong password"}
            assert_problem(await api.post("/auth/login", data=form, headers=headers), 403, "cross_site")
        # Not even the type of the body is looked at: a page may send one without a type, and without asking.
        body = json.dumps({"username": "page@example.com", "password": "correct horse battery"}).encode()
        assert_problem(await api.post("/auth/register", content=body, headers=headers), 403, "cross_site")
        assert await hashes(api) == before
        # No lock was set, and the owner gets in.
        assert (await api.login(account.username, account.password)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": ORIGIN},
        {"Sec-Fetch-Site": "same-site", "Origin": "https://www.example.com"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://auth.example.com"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.example"},  # no browser that says more, so perhaps none at all
        {},
    ],
    ids=str,
)
async def test_any_other_client_may_log_in_and_register(services: Services, headers: dict[str, str]) -> None:
    async with services.running(AUTHD_CORS_ORIGINS=ORIGIN) as process, process.api() as api:
        api.headers.update(headers)
        account = await api.new_account()
        await api.new_session(account)


# Operations


async def test_with_an_address_of_their_own_metrics_and_parts_are_told_there_alone(services: Services) -> None:
    inner = f"127.0.0.1:{free_port()}"
    async with services.running(AUTHD_OPERATIONS_BIND=inner) as process, process.api() as api:
        assert_problem(await api.get("/metrics"), 404, "not_found")
        outside = await api.get("/readyz")
        assert (outside.status_code, outside.json()) == (200, {"status": "degraded"})
        assert (await api.get("/livez")).status_code == 200
        described = (await api.get("/openapi.json")).json()["paths"]
        assert ("/metrics" in described, "/readyz" in described) == (False, True)
        async with httpx.AsyncClient(base_url=f"http://{inner}") as operator:
            inside = await operator.get("/readyz")
            assert (inside.status_code, inside.json()["parts"]["user_store"]) == (200, True)
            assert (await operator.get("/livez")).status_code == 200
            assert 'route="/readyz"' in (await operator.get("/metrics")).text
            for path in ("/auth/me", "/.well-known/jwks.json", "/openapi.json"):
                assert_problem(await operator.get(path), 404, "not_found")
            assert (await operator.get("/metrics")).headers["X-Content-Type-Options"] == "nosniff"


async def test_the_inner_address_has_bounds_of_its_own_and_tells_of_the_drain(services: Services) -> None:
    inner = ("127.0.0.1", free_port())
    settings = {
        "AUTHD_OPERATIONS_BIND": f"{inner[0]}:{inner[1]}",
        "AUTHD_CONNECTIONS_MAX": "8",
        "AUTHD_UNREADY_S": "30",
        "AUTHD_HEADER_TIMEOUT_S": "1",
    }
    async with (
        services.running(**settings) as process,
        httpx.AsyncClient(base_url=f"http://{inner[0]}:{inner[1]}") as operator,
    ):
        # Every place outside is taken by clients that say nothing; inside there are others.
        held = [socket.create_connection(process.address) for _ in range(8)]
        assert (await operator.get("/livez")).status_code == 200
        # A head that does not come is given up here, too.
        with anyio.fail_after(WITHIN_S):
            async with await anyio.connect_tcp(*inner) as stream:
                await stream.send(b"GET /metr")
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
        assert (await operator.get("/" + "x" * 9000)).status_code == 414
        for each in held:
            each.close()
        process.signal()

        async def drains() -> bool:
            answer = await operator.get("/readyz")
            return answer.status_code == 503 and answer.json()["status"] == "draining"

        await eventually(drains)
        process.signal()  # at once, for nobody waits for the balancer here
        assert await process.wait() == 1


async def test_two_workers_share_the_inner_address_and_each_tells_of_both(services: Services) -> None:
    inner = f"127.0.0.1:{free_port()}"
    async with services.running(AUTHD_OPERATIONS_BIND=inner, AUTHD_WORKERS="2") as process:
        await eventually(lambda: len(process.lines("ready")) == 2)
        for _ in range(20):  # a connection each
            async with process.api() as api:
                assert (await api.get("/auth/me")).status_code == 401
        texts = []
        for _ in range(4):
            async with httpx.AsyncClient(base_url=f"http://{inner}") as operator:
                texts.append((await operator.get("/metrics")).text)
        line = 'authd_http_requests_total{method="GET",route="/auth/me",status="401"} 20.0'
        assert all(line in text for text in texts)
        assert await process.stop() == 0


async def test_an_inner_address_that_is_taken_ends_the_start_with_a_sentence(services: Services) -> None:
    async with services.prepared() as process:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            bind = f"127.0.0.1:{taken.getsockname()[1]}"
            done = await process.run("serve", AUTHD_OPERATIONS_BIND=bind)
        assert done.returncode == 2
        assert f"AUTHD_OPERATIONS_BIND={bind} cannot be listened on" in done.stderr


# The log


async def test_the_line_of_a_request_has_the_clients_address_beside_the_peers(services: Services) -> None:
    async with services.running(AUTHD_TRUSTED_PROXIES="127.0.0.0/8") as process, process.api() as api:
        await api.post("/auth/login", headers={"X-Forwarded-For": "203.0.113.9:4711"})
        await api.post("/auth/login", headers={"X-Forwarded-For": "junk"})

        async def lines() -> list[dict[str, Any]]:
            found = [line for line in process.lines("request") if line["route"] == "/auth/login"]
            return found if len(found) == 2 else []

        first, second = await eventually(lines)
        assert ip_address(first["peer"]).is_loopback
        assert (first["address"], second["address"]) == ("203.0.113.9", first["peer"])
        assert "authd_forwarded_unusable_total 1.0" in (await api.get("/metrics")).text
