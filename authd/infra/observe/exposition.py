"""Renders the metrics for Prometheus in slices, so that no request waits for a scrape."""

import os
import sys
from collections.abc import Callable, Iterable

import anyio
import anyio.to_thread
from prometheus_client import REGISTRY, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

#: Between the beginnings of two renderings. A rendering is some milliseconds of work for the event loop.
RENDER_INTERVAL_S = 0.25
#: Between two families of one rendering: time for what came meanwhile.
SLICE_PAUSE_S = 0.001
#: While a thread collects, the event loop waits this long for the interpreter each time: Python's own 5 ms add up.
SWITCH_INTERVAL_S = 0.0005


class Exposition:
    """`collect` returns the families to render, each at a time."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], *, is_blocking: bool = False) -> None:
        """`is_blocking`: `collect` reads files, and is called on a thread."""
        self._collect = collect
        self._is_blocking = is_blocking
        self._lock = anyio.Lock()
        #: When the last rendering began, and when the one that is kept did.
        self._begun_at = self._rendered_at = float("-inf")
        self._text = b""

    async def read(self) -> bytes:
        """Return all metrics as they were after this call. Callers that wait at the same time share one rendering."""
        asked_at = anyio.current_time()
        async with self._lock:
            if self._rendered_at <= asked_at:
                await anyio.sleep(max(0, self._begun_at + RENDER_INTERVAL_S - anyio.current_time()))
                begun_at = self._begun_at = anyio.current_time()
                self._text = await self._render()
                self._rendered_at = begun_at
            return self._text

    async def _render(self) -> bytes:
        families = await anyio.to_thread.run_sync(self._collect_politely) if self._is_blocking else self._collect()
        parts = []
        for family in families:
            parts.append(generate_latest(_One(family)))
            await anyio.sleep(SLICE_PAUSE_S)
        return b"".join(parts)

    def _collect_politely(self) -> Iterable[Metric]:
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            return self._collect()
        finally:
            sys.setswitchinterval(interval_s)


def make_exposition() -> Exposition:
    """Of this process, or, where there are several workers, of all of them."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        collector = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
        return Exposition(collector.collect, is_blocking=True)
    return Exposition(REGISTRY.collect)


class _One(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family]
