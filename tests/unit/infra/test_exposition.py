"""How often metrics are rendered, and who waits for it."""

import time
from collections.abc import Iterable
from itertools import pairwise

import anyio
import anyio.lowlevel
import pytest
from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.registry import Collector

from authd.infra.observe import exposition
from authd.infra.observe.exposition import Exposition

WITHIN_S = 5.0


class Renderings(Collector):
    """A metric that tells how often it was rendered."""

    def __init__(self) -> None:
        self.began_at: list[float] = []

    @property
    def count(self) -> int:
        return len(self.began_at)

    def collect(self) -> Iterable[Metric]:
        self.began_at.append(time.monotonic())
        family = Metric("renderings", "How many there were.", "gauge")
        family.add_sample("renderings", {}, self.count)
        yield family


@pytest.fixture
def counted() -> tuple[Exposition, Renderings]:
    registry, renderings = CollectorRegistry(), Renderings()
    Counter("first", "Comes before.", registry=registry)
    registry.register(renderings)
    Counter("last", "Comes after.", registry=registry)
    renderings.began_at.clear()  # to be registered it was described
    return Exposition(registry.collect), renderings


async def test_scrapes_that_wait_at_the_same_time_share_a_rendering(counted: tuple[Exposition, Renderings]) -> None:
    metrics, renderings = counted
    texts: list[bytes] = []

    async def scrape() -> None:
        texts.append(await metrics.read())

    with anyio.fail_after(WITHIN_S):
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(scrape)
        assert len(texts) == 100
        # The first to come renders at once, and what came after it began shares the next.
        assert renderings.count <= 2


async def test_a_scrape_sees_what_happened_before_it_and_renderings_keep_their_distance(
    counted: tuple[Exposition, Renderings],
) -> None:
    metrics, renderings = counted
    with anyio.fail_after(WITHIN_S):
        for number in range(1, 4):
            assert f"renderings {number}.0" in (await metrics.read()).decode()
            assert renderings.count == number
    distances = [later - earlier for earlier, later in pairwise(renderings.began_at)]
    # A busy machine notes a beginning late, so that the next one seems near.
    assert all(distance >= exposition.RENDER_INTERVAL_S / 2 for distance in distances)


async def test_a_rendering_gives_way_between_two_families(counted: tuple[Exposition, Renderings]) -> None:
    metrics, renderings = counted
    turns: list[int] = []

    async def take_turns() -> None:
        while True:
            turns.append(renderings.count)
            await anyio.lowlevel.checkpoint()

    with anyio.fail_after(WITHIN_S):
        async with anyio.create_task_group() as group:
            group.start_soon(take_turns)
            await anyio.lowlevel.checkpoint()
            turns.clear()
            await metrics.read()
            group.cancel_scope.cancel()
    # Another task ran before the counting family was rendered, and after it.
    assert {0, 1} <= set(turns)


async def test_a_scraper_that_hangs_up_costs_no_rendering_more(counted: tuple[Exposition, Renderings]) -> None:
    metrics, renderings = counted
    with anyio.fail_after(WITHIN_S):
        await metrics.read()
        for _ in range(20):
            with anyio.move_on_after(0):
                await metrics.read()
        assert renderings.count == 1


async def test_the_text_is_what_prometheus_clients_library_renders(counted: tuple[Exposition, Renderings]) -> None:
    registry = CollectorRegistry()
    Counter("one", "One.", ["label"], registry=registry).labels('a"b').inc()
    Counter("two", "Two.", registry=registry).inc(2)
    assert await Exposition(registry.collect).read() == generate_latest(registry)
