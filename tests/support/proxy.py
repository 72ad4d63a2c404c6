"""A TCP proxy between authd and a store: it cuts, goes silent, is slow, or holds one chunk back until it is told."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

import anyio
from anyio.abc import SocketStream

from authd.embedded.processes import free_port

#: `asked`: from authd to the store; `answered`: back.
Direction = Literal["asked", "answered"]
Trap = Callable[[Direction, bytes], bool]

CHUNK_BYTES = 65_536
_LOST = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)


class Proxy:
    """Data flows until told otherwise. A chunk is what one read brought: with these protocols mostly one message."""

    def __init__(self, upstream_port: int) -> None:
        self.port = free_port()
        self.delay_s: dict[Direction, float] = {"asked": 0.0, "answered": 0.0}
        self._upstream_port = upstream_port
        self._connections: set[anyio.CancelScope] = set()
        self._is_cut = False
        self._trap: Trap | None = None
        self._traps_all = False
        self.held = anyio.Event()
        self._flows = anyio.Event()
        self._flows.set()
        self._released = anyio.Event()

    def cut(self) -> None:
        """Close every connection, and each new one at once."""
        self._is_cut = True
        self._drop_all()

    def cut_once(self) -> None:
        """Close every connection; new ones work. What was held is lost with its connection."""
        self._drop_all()

    def freeze(self) -> None:
        """Take everything and pass nothing on, like a firewall that forgot the connection."""
        if self._flows.is_set():
            self._flows = anyio.Event()

    def trap(self, trap: Trap, *, each: bool = False) -> None:
        """Hold the next chunk for which `trap` is true, and its connection's direction with it, until `release`; with
        `each` all such chunks. `held` is set when the first is.
        """
        self._trap, self._traps_all = trap, each
        self.held, self._released = anyio.Event(), anyio.Event()

    def trap_step(self, number: int) -> None:
        """Hold the chunk that is the `number`th from now on, in either direction; the first is 1."""
        count = 0

        def is_due(_: Direction, __: bytes) -> bool:
            nonlocal count
            count += 1
            return count == number

        self.trap(is_due)

    def release(self) -> None:
        """Pass on what is held, and hold no more."""
        self._trap = None
        self._released.set()

    def mend(self) -> None:
        """As at the start."""
        self._is_cut = False
        self.delay_s = {"asked": 0.0, "answered": 0.0}
        self._flows.set()
        self.release()

    async def serve(self, stream: SocketStream) -> None:
        async with stream:
            if self._is_cut:
                return
            with anyio.CancelScope() as scope:
                self._connections.add(scope)
                try:
                    async with (
                        await anyio.connect_tcp("127.0.0.1", self._upstream_port) as upstream,
                        anyio.create_task_group() as pumps,
                    ):
                        pumps.start_soon(self._pump, "asked", stream, upstream, pumps.cancel_scope)
                        pumps.start_soon(self._pump, "answered", upstream, stream, pumps.cancel_scope)
                except OSError:
                    pass  # the store is away: so are we
                finally:
                    self._connections.discard(scope)

    async def _pump(
        self, direction: Direction, source: SocketStream, target: SocketStream, both: anyio.CancelScope
    ) -> None:
        try:
            while True:
                data = await source.receive(CHUNK_BYTES)
                if self.delay_s[direction]:
                    await anyio.sleep(self.delay_s[direction])
                if self._trap is not None and self._trap(direction, data):
                    if not self._traps_all:
                        self._trap = None
                    released = self._released
                    self.held.set()
                    await released.wait()
                await self._flows.wait()
                await target.send(data)
        except _LOST:
            both.cancel()

    def _drop_all(self) -> None:
        for scope in list(self._connections):
            scope.cancel()


@asynccontextmanager
async def proxied(upstream_port: int) -> AsyncIterator[Proxy]:
    """A proxy on loopback. Around the process that uses it: what that leaves open is closed with it."""
    proxy = Proxy(upstream_port)
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=proxy.port) as listener,
        anyio.create_task_group() as group,
    ):
        group.start_soon(listener.serve, proxy.serve)
        yield proxy
        group.cancel_scope.cancel()
