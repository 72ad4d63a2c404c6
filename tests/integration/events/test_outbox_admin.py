import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from blockbuster import BlockBuster
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from support.kafka import configure_topic, create_topics
from support.relaying import Node, header, make_settings, open_node
from support.stores import read_topic
from support.waiting import eventually

from authd.cli.outbox import drop_outbox, list_outbox, retry_outbox
from authd.config import BUCKETS, Settings
from authd.embedded import KafkaBroker
from authd.events.contract import Event
from authd.events.factory import revocation_record
from authd.events.postgres import LANE_ROWS, Outbox, add_events
from authd.events.publisher import TRIES_MAX, OutboxWatch

pytestmark = pytest.mark.timeout(120)

LANE_S = 5.0
SECRET_TEXT = "x" * 5000
QUICK = {"publish_retry_first_s": 0.1, "publish_sweep_s": 0.1}
#: In one lane.
POISONED, OTHER = 7, 7 + BUCKETS


@pytest.fixture
async def settings(database_url: str) -> Settings:
    return make_settings(database_url, "redis://127.0.0.1:1")


@pytest.fixture
async def node(settings: Settings, no_blocking: BlockBuster) -> AsyncIterator[Node]:
    """Without Redis and without a publisher: rows stay as they are."""
    async with open_node(settings, no_blocking, relays=False) as node:
        for user in (POISONED, OTHER):
            await node.add_user(user)
        yield node


@pytest.fixture
async def poisoned(database_url: str, kafka_broker: KafkaBroker) -> Settings:
    """A deployment whose topics take no record above 2000 bytes."""
    settings = make_settings(database_url, "redis://127.0.0.1:1", kafka_broker.bootstrap_servers)
    await create_topics(
        settings.kafka_bootstrap_servers[0], [settings.kafka_events_topic], **{"max.message.bytes": "2000"}
    )
    return settings


async def test_a_poisonous_event_is_set_aside_and_its_users_later_ones_go_on(
    poisoned: Settings, no_blocking: BlockBuster, capsys: pytest.CaptureFixture[str]
) -> None:
    before = failed("refused")
    with capture_logs() as logs:
        async with open_node(poisoned, no_blocking, relays=False, publishes=True, **QUICK) as node:
            [poison] = await add(node, POISONED, 1, SECRET_TEXT)
            for number in range(2, LANE_ROWS + 50):
                await add(node, POISONED, number)
            for number in range(20):
                await add(node, OTHER, number)
            await node.until_published()
            assert failed("refused") - before == TRIES_MAX
            assert await list_outbox(poisoned) == 0
            told = capsys.readouterr().out
            assert "waiting: 0, " in told
            assert f"\n{poison}  user.enabled  channel=events  user={POISONED}  attempts={TRIES_MAX}  error=" in told
            assert SECRET_TEXT not in told
            watch = OutboxWatch(node.remembered.outbox, poisoned.outbox_degraded_s)
            await watch._measure()
            assert REGISTRY.get_sample_value("authd_outbox_parked") == 1
            assert (watch.oldest_s, watch.is_late) == (0.0, False)
    assert [log["log_level"] for log in logs if log["event"] == "event_parked"] == ["error"]
    assert SECRET_TEXT not in repr(logs)
    assert await numbers(poisoned) == {POISONED: list(range(2, LANE_ROWS + 50)), OTHER: list(range(20))}


async def test_until_it_is_set_aside_its_users_later_events_wait_and_others_do_not(
    poisoned: Settings, no_blocking: BlockBuster
) -> None:
    async with open_node(poisoned, no_blocking, relays=False, publishes=True, publish_retry_first_s=3600) as node:
        await add(node, POISONED, 0)
        await add(node, POISONED, 1, SECRET_TEXT)
        # More than a lane's share, so that those behind them would starve.
        for number in range(2, LANE_ROWS + 50):
            await add(node, POISONED, number)
        for number in range(20):
            await add(node, OTHER, number)
        await eventually(lambda: has_backlog(node, LANE_ROWS + 49))
        [row] = await node.database.fetch("SELECT attempts, parked_at FROM outbox WHERE attempts > 0")
        assert (row["attempts"], row["parked_at"]) == (1, None)
    assert await numbers(poisoned) == {POISONED: [0], OTHER: list(range(20))}


async def test_what_was_set_aside_is_sent_after_the_topic_was_mended(
    poisoned: Settings, no_blocking: BlockBuster, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_node(poisoned, no_blocking, relays=False, publishes=True, **QUICK) as node:
        rows = [(await add(node, user, 1, SECRET_TEXT))[0] for user in (POISONED, OTHER)]
        await eventually(lambda: has_parked(node, 2))
        assert await retry_outbox(poisoned, [rows[0], 2**62]) == 1
        told = capsys.readouterr()
        assert f"{rows[0]}  waits for the broker again" in told.out.splitlines()
        assert told.err == f"authd: Not parked: {2**62}.\n"
        await eventually(lambda: has_parked(node, 2))  # refused and parked again
        limit = {"max.message.bytes": "20000"}
        await configure_topic(poisoned.kafka_bootstrap_servers[0], poisoned.kafka_events_topic, **limit)
        assert await retry_outbox(poisoned, None) == 0
        await eventually(lambda: has_parked(node, 0))
        await node.until_published()
    assert await numbers(poisoned) == {POISONED: [1], OTHER: [1]}


async def test_only_what_is_set_aside_is_dropped(
    node: Node, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    [gone], [waiting] = await add(node, POISONED, 1), await add(node, POISONED, 2)
    await park(node, gone)
    assert await drop_outbox(settings, [gone, waiting]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{gone}  dropped\n", f"authd: Not parked: {waiting}.\n")
    assert [row["id"] for row in await node.rows()] == [waiting]


async def test_a_lane_with_nothing_but_set_aside_rows_does_not_wait(node: Node) -> None:
    [row] = await add(node, POISONED, 1)
    await park(node, row)
    outbox = node.remembered.outbox
    assert await outbox.waiting_lanes() == []
    backlog = await outbox.backlog()
    assert (backlog.events, backlog.oldest_s, backlog.parked) == (0, 0.0, 1)


async def test_a_retried_revocation_never_stands_over_a_newer_one(
    node: Node, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        await node.end_all(POISONED)
    await node.remembered.endings.end_sessions(await node.subject(POISONED), [b"s" * 16, b"t" * 16], "logout")
    older, newer, session, over = [row["id"] for row in await node.rows("revocations")]
    [user_tombstone] = await promise(node, revocation_record(POISONED, None, None))
    [tombstone] = await promise(node, revocation_record(OTHER, b"o" * 16, None))
    value = json.loads((await node.rows("revocations"))[3]["value"]) | {"until": "2026-01-01T00:00:00+00:00"}
    await node.database.fetch("UPDATE outbox SET value = $2 WHERE id = $1", over, json.dumps(value).encode())
    for row in (older, newer, session, over, user_tombstone, tombstone):
        await park(node, row)
    assert await retry_outbox(settings, None) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [f"{row}  waits for the broker again" for row in (newer, session, tombstone)]
    assert [line.split()[0] for line in told[3:]] == [str(row) for row in (older, over, user_tombstone)]
    assert [row["id"] for row in await node.rows("revocations")] == [newer, session, tombstone]


async def test_what_waits_too_long_is_late_and_what_is_set_aside_is_not(node: Node, settings: Settings) -> None:
    watch = OutboxWatch(node.remembered.outbox, settings.outbox_degraded_s)
    [row] = await add(node, POISONED, 1)
    await watch._measure()
    assert not watch.is_late
    age = settings.outbox_degraded_s + 5
    await node.database.fetch("UPDATE outbox SET created_at = now() - make_interval(secs => $1)", age)
    await watch._measure()
    assert watch.is_late
    assert age <= watch.oldest_s < age + 60
    await park(node, row)
    await watch._measure()
    assert not watch.is_late


async def test_an_empty_outbox_says_so(node: Node, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert await list_outbox(settings) == 0
    assert capsys.readouterr().out == "waiting: 0, the oldest for 0 s\nparked: 0\n"
    assert await retry_outbox(settings, None) == 0


async def add(node: Node, user_id: int, number: int, padding: str = "") -> list[int]:
    """Promise an event of the user, and offer its lane."""
    value = json.dumps({"user_id": user_id, "number": number, "padding": padding}).encode()
    rows = await promise(
        node,
        Event(
            id=uuid.uuid4(),
            channel="events",
            type="user.enabled",
            version=1,
            user_id=user_id,
            key=str(user_id),
            value=value,
        ),
    )
    node.offer_lane(user_id % BUCKETS)
    return rows


async def promise(node: Node, event: Event) -> list[int]:
    """The new row's id."""
    async with node.database.transaction() as connection:
        await add_events(connection, [event])
        rows = await connection.fetch("SELECT id FROM outbox WHERE event_id = $1", event.id)
    return [row["id"] for row in rows]


async def park(node: Node, row: int) -> None:
    async with Outbox(node.database).lane(POISONED % BUCKETS, LANE_S) as lane:
        assert lane is not None
        await lane.refuse(row, "MessageSizeTooLargeError", None)


async def has_backlog(node: Node, events: int) -> bool:
    return (await node.remembered.outbox.backlog()).events == events


async def has_parked(node: Node, rows: int) -> bool:
    return len(await node.remembered.outbox.parked()) == rows


async def numbers(settings: Settings) -> dict[int, list[int]]:
    """First deliveries of each user."""
    found: dict[int, dict[str, Any]] = {}
    for record in await read_topic(settings.kafka_bootstrap_servers[0], settings.kafka_events_topic):
        value = json.loads(record.value)
        found.setdefault(value["user_id"], {}).setdefault(header(record, "event_id"), value["number"])
    return {user: list(by_id.values()) for user, by_id in found.items()}


def failed(reason: str) -> float:
    return REGISTRY.get_sample_value("authd_publish_failures_total", {"reason": reason}) or 0.0
