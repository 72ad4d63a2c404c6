"""Redis behind Sentinel and behind TLS: real servers and sentinels, and a real handshake. The binary that the tests
have speaks no TLS itself, so a proxy ends it in front of the server, as stunnel does for older ones.
"""

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self
from unittest.mock import ANY

import anyio
import anyio.abc
import pytest
from anyio import to_thread
from blockbuster import BlockBuster
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from redis.asyncio import Redis
from support.deployment import CLIENT, unguarded
from support.waiting import eventually

from authd.config import Secret, Settings
from authd.embedded import RedisServer
from authd.embedded.processes import free_port
from authd.embedded.redis import _find_program
from authd.errors import Unavailable
from authd.infra.redis.client import RedisClient, open_redis
from authd.infra.subject import Subject
from authd.sessions.redis import Live, Opened, Owner, SessionSettings, SessionStore

SERVICE = "authd-redis"
SENTINELS, QUORUM = 3, 2
DOWN_AFTER_MS, FAILOVER_TIMEOUT_MS = 500, 3000
USER, EPOCH, KEY = 7, 1, 1
SUBJECT = Subject(USER, 5)
#: As long as authd waits for Redis by default.
TIMEOUT_S = 1.0
#: On a busy machine; whoever waits for what is not there has no end.
IN_TIME_S = TIMEOUT_S + 2


class SentinelServer(RedisServer):
    """A sentinel that watches one master. It rewrites its own configuration, so each start is a first one."""

    def __init__(self, folder: Path, master_port: int) -> None:
        super().__init__(folder, durable=False)
        self._master_port = master_port

    async def _spawn(self) -> anyio.abc.Process:
        config = self.folder / "sentinel.conf"
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.folder}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._master_port} {QUORUM}",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} {FAILOVER_TIMEOUT_MS}",
        ]
        await anyio.Path(config).write_text("\n".join(lines))
        return await self._spawn_guarded([await to_thread.run_sync(_find_program), config, "--sentinel"])


@dataclass
class Watched:
    """A master, its replica and the sentinels that watch them."""

    master: RedisServer
    replica: RedisServer
    sentinels: list[SentinelServer]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{one.port}' for one in self.sentinels)}/{SERVICE}"

    async def is_whole(self) -> bool:
        """Every sentinel knows the others and a replica to promote, which follows its master."""
        wanted = {"num-other-sentinels": str(SENTINELS - 1), "num-slaves": "1", "flags": "master"}
        states = [await ask(sentinel, "SENTINEL", "MASTER", SERVICE) for sentinel in self.sentinels]
        # The sentinels ask servers for their roles rarely: the servers themselves must agree too.
        ports = {str(self.master.port)} | {state["port"] for state in states}
        return (
            len(ports) == 1
            and all(wanted.items() <= state.items() for state in states)
            and await ask(self.replica, "ROLE") == ["slave", "127.0.0.1", self.master.port, "connected", ANY]
        )


async def ask(server: RedisServer, *command: str) -> Any:
    # Protocol 2, and the name with its blank, are what redis-py parses nothing of.
    async with Redis(host="127.0.0.1", port=server.port, protocol=2, decode_responses=True) as client:
        answer = await client.execute_command(*command)  # type: ignore[no-untyped-call]
    if command[:2] == ("SENTINEL", "MASTER"):
        return dict(zip(answer[::2], answer[1::2], strict=True))
    return answer


async def role(server: RedisServer) -> str:
    return str((await ask(server, "ROLE"))[0])


@pytest.fixture(scope="module")
async def servers(stores_folder: Path) -> AsyncIterator[Watched]:
    folder = stores_folder / "sentinel"
    async with AsyncExitStack() as stack:
        names = ("one", "two")
        master, replica = [await stack.enter_async_context(RedisServer(folder / name, durable=False)) for name in names]
        await ask(replica, "REPLICAOF", "127.0.0.1", str(master.port))
        sentinels = [
            await stack.enter_async_context(SentinelServer(folder / f"sentinel-{number}", master.port))
            for number in range(SENTINELS)
        ]
        yield Watched(master, replica, sentinels)


@pytest.fixture
async def watched(servers: Watched) -> Watched:
    """The servers, whichever is the master now, when all is well with them."""
    if await role(servers.master) != "master":
        servers.master, servers.replica = servers.replica, servers.master
    await eventually(servers.is_whole)
    return servers


def settings_for(url: str) -> Settings:
    return Settings(
        database_url=Secret("unused"),
        redis_url=Secret(url),
        secret=Secret("s" * 32),
        deployment=f"t-{secrets.token_hex(8)}",
        redis_timeout_s=TIMEOUT_S,
    )


@dataclass
class Replica:
    """A process's way to Redis."""

    redis: RedisClient
    store: SessionStore

    async def open(self) -> bytes:
        session_id = secrets.token_bytes(16)
        assert isinstance(await self.store.open(Owner(SUBJECT, EPOCH, 0), session_id, KEY, CLIENT, 0), Opened)
        return session_id

    async def is_live(self, session_id: bytes) -> bool:
        return isinstance(await self.store.inspect(SUBJECT, session_id, 0), Live)

    async def can_open(self) -> bool:
        try:
            await self.open()
        except Unavailable as refusal:
            assert refusal.part == "session_store"
            return False
        return True


async def connect(stack: AsyncExitStack, url: str, guard: BlockBuster) -> Replica:
    settings = settings_for(url)
    client = await stack.enter_async_context(open_redis(settings))
    with unguarded(guard):
        return Replica(client, SessionStore(client, settings.section(SessionSettings)))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


# Sentinel


async def test_scripts_run_on_the_master_that_sentinel_names(
    watched: Watched, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    replica = await connect(stack, watched.url, no_blocking)
    assert await replica.is_live(await replica.open())
    assert await ask(watched.master, "EXISTS", replica.redis.key(USER, f"user:{SUBJECT}")) == 1
    await replica.redis.ping()


async def test_a_master_that_steps_down_is_left_for_the_next(
    watched: Watched, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    replica = await connect(stack, watched.url, no_blocking)
    async with anyio.create_task_group() as group:  # several connections, all to the old one
        for _ in range(8):
            group.start_soon(replica.open)
    session_id = await replica.open()
    await ask(watched.master, "WAIT", "1", "5000")
    await ask(watched.sentinels[0], "SENTINEL", "FAILOVER", SERVICE)

    async def is_promoted() -> bool:
        return await role(watched.replica) == "master"

    await eventually(is_promoted)
    # What Sentinel does too, some seconds later, and then it closes the connections, which is the easier case.
    await ask(watched.master, "REPLICAOF", "127.0.0.1", str(watched.replica.port))
    await eventually(replica.can_open)
    assert await replica.is_live(session_id)
    await until_nothing_fails(replica)


async def test_a_lost_master_is_followed_to_the_next_without_a_restart(
    watched: Watched, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    replica = await connect(stack, watched.url, no_blocking)
    session_id = await replica.open()
    await ask(watched.master, "WAIT", "1", "5000")
    await watched.master.kill()
    with pytest.raises(Unavailable):
        await replica.is_live(session_id)
    with anyio.fail_after(IN_TIME_S), suppress(Unavailable):  # no wait for a master that is not there yet
        await replica.open()
    await eventually(replica.can_open)
    assert await role(watched.replica) == "master"
    assert await replica.is_live(session_id)
    await watched.master.start()
    await ask(watched.master, "REPLICAOF", "127.0.0.1", str(watched.replica.port))
    await until_nothing_fails(replica)


async def until_nothing_fails(replica: Replica) -> None:
    """Connections that still lead to the old master fail once each."""

    async def do_all_open() -> bool:
        return [await replica.can_open() for _ in range(20)] == [True] * 20

    await eventually(do_all_open)


async def test_sentinels_that_are_away_leave_time_to_ask_the_next(
    watched: Watched, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    nobody = f"redis+sentinel://127.0.0.1:{free_port()},"
    await watched.sentinels[0].pause()
    try:
        replica = await connect(stack, watched.url.replace("redis+sentinel://", nobody), no_blocking)
        assert await replica.is_live(await replica.open())
    finally:
        await watched.sentinels[0].resume()


async def test_without_a_sentinel_or_the_service_redis_is_unavailable_in_time(
    watched: Watched, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    nobody = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/{SERVICE}"
    for url in (nobody, watched.url.replace(SERVICE, "another")):
        replica = await connect(stack, url, no_blocking)
        with anyio.fail_after(IN_TIME_S), pytest.raises(Unavailable):
            await replica.open()


# TLS


@dataclass
class Certificates:
    """A CA, a server's certificate by it, and another CA that nobody asked."""

    ca: Path
    other_ca: Path
    server: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    (ca_key, ca), (_, other) = (make_certificate(name) for name in ("a test's CA", "another CA"))
    server_key, server = make_certificate("127.0.0.1", ca_key, ca)
    made = Certificates(folder / "ca.pem", folder / "other.pem", folder / "server.pem")
    made.ca.write_bytes(ca.public_bytes(Encoding.PEM))
    made.other_ca.write_bytes(other.public_bytes(Encoding.PEM))
    private = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    made.server.write_bytes(private + server.public_bytes(Encoding.PEM))
    return made


def make_certificate(
    name: str, issuer_key: ec.EllipticCurvePrivateKey | None = None, issuer: x509.Certificate | None = None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A CA's, without an issuer; else that of the server at an address."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        # Python 3.13 takes no certificate that does not name its keys, as RFC 5280 wants it.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((issuer_key or key).public_key()), critical=False
        )
    )
    if issuer is None:
        signs = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **signs), critical=True)
    if issuer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))]), critical=False)
    return key, builder.sign(issuer_key or key, hashes.SHA256())


def bulk_string(port: int) -> bytes:
    return f"$5\r\n{port}\r\n".encode()


class TlsProxy:
    """Ends TLS in front of a server, and may change what the server answers: sentinels name ports without TLS."""

    def __init__(self, target: int, certificate: Path, replies: Mapping[int, int] | None = None) -> None:
        self.port = free_port()
        self.handshakes = 0
        self._target = target
        self._replies = {
            f"$5\r\n{old}\r\n".encode(): f"$5\r\n{new}\r\n".encode() for old, new in (replies or {}).items()
        }
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        self._tasks: set[asyncio.Task[Any]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handshakes += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, away = await asyncio.open_connection("127.0.0.1", self._target)
        back = self._pump(there, writer, self._replies)
        ways = [asyncio.create_task(way) for way in (self._pump(reader, away, {}), back)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            away.close()
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replace: dict[bytes, bytes]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                for old, new in replace.items():
                    data = data.replace(old, new)
                writer.write(data)
                await writer.drain()


async def test_a_rediss_url_speaks_tls_and_proves_the_server_by_the_ca_it_names(
    redis_server: RedisServer, certificates: Certificates, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    proxy = await stack.enter_async_context(TlsProxy(redis_server.port, certificates.server))
    url = f"rediss://127.0.0.1:{proxy.port}"
    replica = await connect(stack, f"{url}?ssl_ca_certs={certificates.ca}", no_blocking)
    assert await replica.is_live(await replica.open())
    assert proxy.handshakes > 0
    handshakes = proxy.handshakes
    for distrusted in (f"{url}?ssl_ca_certs={certificates.other_ca}", url, url.replace("rediss", "redis")):
        replica = await connect(stack, distrusted, no_blocking)
        with anyio.fail_after(IN_TIME_S), pytest.raises(Unavailable):
            await replica.open()
    assert proxy.handshakes == handshakes
    # It is the name in the URL that the certificate must have.
    replica = await connect(stack, f"rediss://localhost:{proxy.port}?ssl_ca_certs={certificates.ca}", no_blocking)
    with pytest.raises(Unavailable):
        await replica.open()


async def test_a_rediss_url_of_sentinels_speaks_tls_to_them_and_to_the_master(
    watched: Watched, certificates: Certificates, stack: AsyncExitStack, no_blocking: BlockBuster
) -> None:
    master = await stack.enter_async_context(TlsProxy(watched.master.port, certificates.server))
    ports = {watched.master.port: master.port}
    sentinels = [
        await stack.enter_async_context(TlsProxy(one.port, certificates.server, ports)) for one in watched.sentinels
    ]
    nodes = ",".join(f"127.0.0.1:{proxy.port}" for proxy in sentinels)
    url = f"rediss+sentinel://{nodes}/{SERVICE}?ssl_ca_certs="
    replica = await connect(stack, url + str(certificates.ca), no_blocking)
    await eventually(replica.can_open)
    assert await replica.is_live(await replica.open())
    # A sentinel that is slow once gives way to the next.
    assert (master.handshakes > 0, any(proxy.handshakes for proxy in sentinels)) == (True, True)
    handshakes = master.handshakes
    replica = await connect(stack, url + str(certificates.other_ca), no_blocking)
    with anyio.fail_after(IN_TIME_S), pytest.raises(Unavailable):
        await replica.open()
    assert master.handshakes == handshakes
