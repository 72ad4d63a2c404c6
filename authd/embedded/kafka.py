"""Owns an embedded Kafka: a real broker on Java, its libraries fetched once by Maven into the user's cache."""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import ClassVar

import anyio
import anyio.abc
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from anyio import to_thread

from authd.embedded.processes import EmbeddedServer, StoreError, environment, free_port, guarded, listens

POM = Path(__file__).with_name("pom.xml")
VERSION = "4.1.0"
JAVA_MIN = 17
JAVA_ASK_S = 20
FETCH_S = 600.0
LOCK_POLL_S = 0.2
ANSWER_MS = 2_000
CLUSTER_ID = "authd-embedded-kafka-A"

#: A development broker handles a few messages: start time and memory matter, peak speed does not.
JVM_OPTIONS = (
    "-Xmx256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xshare:auto",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)

#: The short session lets a killed broker come back after 3 s: until it ends, the controller refuses the newcomer.
PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={data}
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""


@dataclass(frozen=True)
class JavaTools:
    """What was found on this machine. `missing` is a phrase for the person at the terminal, empty if nothing is."""

    java: Path | None
    maven: Path | None

    @property
    def missing(self) -> str:
        absent = [] if self.java else [f"Java {JAVA_MIN} or newer"]
        if self.maven is None and not libs_path().is_dir():
            absent.append("Maven")
        return " and ".join(absent)


class KafkaBroker(EmbeddedServer):
    """One broker that is its own controller. It makes topics when they are first used."""

    name: ClassVar[str] = "Kafka"
    start_s: ClassVar[float] = 60.0

    def __init__(self, folder: Path, libs: Path, port: int | None = None) -> None:
        super().__init__(folder, port)
        self._libs = libs
        self._controller_port = 0 if port is None else free_port()

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._controller_port = free_port()

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    async def _prepare(self) -> None:
        data = self.folder / "data"
        text = PROPERTIES.format(port=self.port, controller_port=self._controller_port, data=data)
        await to_thread.run_sync(self._properties.write_text, text)
        if not await to_thread.run_sync((data / "meta.properties").exists):
            await _run(await self._java("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", self._properties))

    async def _spawn(self) -> anyio.abc.Process:
        return await self._spawn_guarded(await self._java("kafka.Kafka", self._properties))

    async def _is_ready(self, pid: int) -> bool:
        if not await to_thread.run_sync(listens, pid, self.port):
            return False
        client = AIOKafkaClient(bootstrap_servers=self.bootstrap_servers, request_timeout_ms=ANSWER_MS)
        try:
            await client.bootstrap()
            return bool(client.cluster.brokers())
        except (KafkaError, OSError):
            return False
        finally:
            await client.close()

    async def _java(self, main: str, *arguments: str | Path) -> list[str | Path]:
        java = await to_thread.run_sync(_find_java)
        if java is None:
            raise StoreError(f"Kafka needs Java {JAVA_MIN} or newer on the PATH or in JAVA_HOME")
        return [java, *JVM_OPTIONS, "-cp", f"{self._libs}/*", main, *arguments]


def libs_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "authd" / f"kafka-{VERSION}"


def find_java_and_maven() -> JavaTools:
    maven = shutil.which("mvn")
    return JavaTools(_find_java(), Path(maven) if maven else None)


async def fetch_libs() -> Path:
    """Return the folder of Kafka's libraries, downloaded (43 MB) if this user has not got them yet."""
    target = libs_path()
    if await to_thread.run_sync(target.is_dir):
        return target
    tools = await to_thread.run_sync(find_java_and_maven)
    if tools.missing:
        raise StoreError(f"Kafka for development needs {tools.missing}")
    with anyio.fail_after(FETCH_S):
        lock = await to_thread.run_sync(_open_lock, target)
        try:
            while not _is_locked_by_us(lock):  # noqa: ASYNC110
                await anyio.sleep(LOCK_POLL_S)
            if not await to_thread.run_sync(target.is_dir):
                await _download(target, str(tools.maven))
        finally:
            os.close(lock)
    return target


async def _download(target: Path, maven: str) -> None:
    temporary = Path(await to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="fetch-", dir=target.parent)))
    try:
        await to_thread.run_sync(shutil.copy, POM, temporary / "pom.xml")
        libs = temporary / "libs"
        goal = ("dependency:copy-dependencies", f"-DoutputDirectory={libs}")
        await _run([maven, "-q", "-B", "-f", temporary / "pom.xml", *goal])
        await to_thread.run_sync(libs.rename, target)
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(lambda: shutil.rmtree(temporary, ignore_errors=True))


async def _run(command: list[str | Path]) -> None:
    done = await anyio.run_process(
        guarded(command),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        check=False,
        env=environment(),
        start_new_session=True,
    )
    if done.returncode:
        output = done.stdout.decode(errors="replace").strip()
        raise StoreError(f"{command[0]} ended with {done.returncode}:\n{output}")


def _find_java() -> Path | None:
    """Run each candidate: macOS has a `java` that only says where to buy one."""
    home = os.environ.get("JAVA_HOME")
    for candidate in (home and shutil.which("java", path=f"{home}/bin"), shutil.which("java")):
        if candidate and _java_major(candidate) >= JAVA_MIN:
            return Path(candidate)
    return None


def _java_major(java: str) -> int:
    try:
        asked = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=JAVA_ASK_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(\d+)', asked.stderr)
    return int(found[1]) if found else 0


def _open_lock(target: Path) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    return os.open(target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_locked_by_us(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
