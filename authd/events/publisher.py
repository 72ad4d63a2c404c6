"""Moves events from the outbox to Kafka: at least once, each user's events of a topic in the order of their commits.

What waits is in the outbox and nowhere else; this process only remembers which lanes to look into. So a task may be
cancelled or the process killed at any point: an event is then sent later, or twice.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import anyio
import msgspec
import structlog
from anyio import TASK_STATUS_IGNORED, CancelScope, create_task_group
from anyio.abc import TaskStatus

from authd.errors import Unavailable
from authd.events.contract import Event
from authd.events.postgres import LANE_ROWS, Lane, Outbox, OutboxRow
from authd.infra.kafka.producer import END_TIMEOUT_S, BrokerAway, Producer, Record, RecordRefused, TopicUnusable
from authd.infra.observe import metrics
from authd.infra.tasks.backoff import Backoff
from authd.infra.tasks.every import every
from authd.infra.tasks.work_set import WorkSet

#: Also the longest time that an event waits for a lane that another replica held when it was offered.
SWEEP_S = 2.0
MEASURE_S = 10.0
#: How long a lane is sent before its acknowledged rows are committed away.
LANE_SEND_S = 5.0
#: How long a drain starts to send more rows. Shorter than the time the runtime gives it.
FLUSH_S = 4.0
PROBE_DELAY_MIN_S = 0.2
PROBE_DELAY_MAX_S = 5.0
#: A row is parked after this many refusals.
TRIES_MAX = 5
#: How long a refused row waits for its second try. Doubled for each further one: 15 s in all, and a sweep each.
RETRY_FIRST_S = 1.0
#: How long a row of an unknown channel waits: only a newer replica can send it.
POSTPONE_S = 5.0
#: How often a topic that accepts nothing is tried again.
TOPIC_RETRY_S = 5.0
#: At most 1/POOL_SHARE of the pool may wait for Kafka: the rest is for requests.
POOL_SHARE = 4

_log = structlog.get_logger()


class PublisherSettings(msgspec.Struct, frozen=True):
    kafka_registration_topic: str
    kafka_registration_key: str
    kafka_events_topic: str
    kafka_revocations_topic: str
    kafka_timeout_s: float
    database_timeout_s: float
    database_pool_per_worker: int


class Publisher:
    """Sends the lanes that are offered to it. Lanes go in parallel, in this process one sender to a lane."""

    def __init__(
        self,
        settings: PublisherSettings,
        outbox: Outbox,
        producer: Producer,
        *,
        sweep_s: float = SWEEP_S,
        retry_first_s: float = RETRY_FIRST_S,
        topic_retry_s: float = TOPIC_RETRY_S,
    ) -> None:
        self._outbox = outbox
        self._producer = producer
        self._topics: dict[str, str] = {
            "registration": settings.kafka_registration_topic,
            "events": settings.kafka_events_topic,
            "revocations": settings.kafka_revocations_topic,
        }
        # Topics that the broker lacks or forbids: their rows wait in the outbox and hold up nobody. False: the broker
        # shows the topic again, and the next row tries it.
        self._unusable: dict[str, bool] = {}
        self._registration_key = settings.kafka_registration_key
        self._sweep_s = sweep_s
        self._retry_first_s = retry_first_s
        self._topic_retry_s = topic_retry_s
        self._senders = max(1, settings.database_pool_per_worker // POOL_SHARE)
        # Everything inside a lane's transaction has a deadline of its own; this one is for a frozen Postgres.
        self._lane_timeout_s = (
            LANE_SEND_S + settings.kafka_timeout_s + 2 * END_TIMEOUT_S + 2 * settings.database_timeout_s
        )
        self._lanes = WorkSet()
        self._drained = anyio.Event()
        self._waits: set[CancelScope] = set()
        # Why the last lane was given up. Until a lane goes well, one lane at a time is tried.
        self._trouble: str | None = None
        self._probe_at = 0.0
        self._probe_backoff = Backoff(PROBE_DELAY_MIN_S, PROBE_DELAY_MAX_S)

    def offer(self, lane: int) -> None:
        """Look into this lane soon. Never blocks or raises; what is offered after the drain began, a sweep finds."""
        self._lanes.offer(lane)

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Send lanes until drained or cancelled. Ready at once: the stores may come later."""
        async with create_task_group() as helpers:
            helpers.start_soon(self._lanes.sweep, self._sweep_s, self._waiting_lanes)
            helpers.start_soon(every, self._topic_retry_s, self._ask_for_topics)
            async with create_task_group() as senders:
                for _ in range(self._senders):
                    senders.start_soon(self._send_lanes)
                task_status.started()
            helpers.cancel_scope.cancel()
        self._drained.set()

    async def drain(self, flush_s: float = FLUSH_S) -> None:
        """Take no more offers, let `run` return by itself, and return when it has: when the lanes offered so far are
        sent, or after `flush_s` and what is unanswered then (at most `kafka_timeout_s`), or at once while Kafka or
        Postgres is unavailable. Cancelling this and `run` before that loses nothing; what was just sent is then sent
        again.
        """
        self._lanes.close(anyio.current_time() + flush_s)
        for scope in self._waits:
            scope.cancel()
        await self._drained.wait()

    async def _waiting_lanes(self) -> Iterable[int]:
        """Find every lane that has rows: of other processes, of before the start, of topics that are usable again."""
        return await self._outbox.waiting_lanes(self._channels_aside())

    async def _ask_for_topics(self) -> None:
        """Ask for topics that take nothing, outside of any lane: no user waits for the answer."""
        for topic in [topic for topic, is_aside in self._unusable.items() if is_aside]:
            if await self._producer.has_topic(topic):
                self._unusable[topic] = False

    def _channels_aside(self) -> list[str]:
        return [channel for channel, topic in self._topics.items() if self._unusable.get(topic, False)]

    def _set_aside(self, topic: str, reason: str) -> None:
        if topic not in self._unusable:
            metrics.topic_unusable.labels(topic).set(1)
            metrics.publish_failures.labels("topic_unusable").inc()
            _log.error("topic_unusable", topic=topic, reason=reason)
        self._unusable[topic] = True

    def _note_usable(self, topic: str) -> None:
        if self._unusable.pop(topic, None) is not None:
            metrics.topic_unusable.labels(topic).set(0)
            _log.info("topic_usable", topic=topic)

    async def _send_lanes(self) -> None:
        while (lane := await self._lanes.take()) is not None:
            has_more = False
            try:
                if await self._wait_until_promising():
                    has_more = await self._send_lane(lane)
            finally:
                self._lanes.done(lane, again=has_more)

    async def _wait_until_promising(self) -> bool:
        """Wait, without a transaction, for the producer and for the end of the last failure's delay.

        False where the publisher was closed meanwhile.
        """
        with CancelScope() as scope:
            if self._lanes.is_closed and not self._producer.connected:
                return False
            self._waits.add(scope)
            try:
                if self._lanes.is_probing:
                    await anyio.sleep_until(self._probe_at)
                await self._producer.wait_connected()
                return True
            finally:
                self._waits.discard(scope)
        return False

    async def _send_lane(self, lane: int) -> bool:
        """Send the lane's rows and return whether it has more, or was given up and keeps its rows for later."""
        outcome = _Outcome()
        try:
            async with self._outbox.lane(lane, self._lane_timeout_s, self._channels_aside()) as held:
                # None: another replica sends it. It may have looked before our row was there; the sweeper will tell.
                if held is not None and held.rows:
                    await self._send_rows(held.rows, outcome)
                    await self._settle(held, outcome)
                    outcome.has_more |= len(held.rows) == LANE_ROWS
        except Unavailable as error:
            metrics.unavailable.labels(error.part).inc()
            self._give_up(lane, "postgres_away", error.code)
            return True
        for refusal in outcome.refused:
            _report_refusal(refusal)
        # A refusal ends the producer, and so what it had under way of other users: that says nothing of the broker.
        if outcome.away is not None and not outcome.refused:
            self._give_up(lane, "broker_away", str(outcome.away))
            return True
        outcome.has_more |= outcome.away is not None
        # An empty lane says that Postgres is back, and nothing of the broker.
        if self._trouble == "postgres_away" or (self._trouble is not None and outcome.has_answer):
            _log.info("publisher_recovered", trouble=self._trouble)
            self._trouble, self._lanes.is_probing = None, False
            self._probe_backoff.reset()
        return outcome.has_more

    async def _send_rows(self, rows: Sequence[OutboxRow], outcome: "_Outcome") -> None:
        """Send each user's rows one after the other, and users side by side."""
        rows_by_user: dict[int, list[OutboxRow]] = {}
        for row in rows:
            rows_by_user.setdefault(row.event.user_id, []).append(row)
        stop_at = anyio.current_time() + LANE_SEND_S
        async with create_task_group() as group:
            for user_rows in rows_by_user.values():
                group.start_soon(self._send_user, user_rows, outcome, stop_at)

    async def _send_user(self, rows: Sequence[OutboxRow], outcome: "_Outcome", stop_at: float) -> None:
        for row in rows:
            if outcome.away is not None:
                return
            if anyio.current_time() >= min(stop_at, self._lanes.stop_at):
                outcome.has_more = True
                return
            topic = self._topics.get(row.event.channel)
            if topic is None:
                # Written by a newer replica during a roll-out, which will send it.
                outcome.postponed.append(row.id)
                return
            if self._unusable.get(topic, False):
                continue  # found out since the lane was read
            try:
                await self._send(row.event, topic)
            except BrokerAway as error:
                outcome.away = error
                return
            except TopicUnusable as error:
                # The user's later rows of this topic are left out too; order is guaranteed within a topic.
                outcome.has_answer = True
                self._set_aside(topic, str(error))
                continue
            except RecordRefused as error:
                # The user's later rows stay behind it: sent ahead, they would arrive out of order.
                outcome.has_answer = True
                outcome.refused.append(_Refusal(row, str(error), self._retry_first_s))
                return
            outcome.has_answer = True
            outcome.acknowledged.append(row.id)
            self._note_usable(topic)
            metrics.events_published.labels(row.event.type).inc()

    async def _send(self, event: Event, topic: str) -> None:
        key = self._registration_key if event.key is None else event.key
        await self._producer.send(make_record(event, topic, key.encode()))

    async def _settle(self, held: Lane, outcome: "_Outcome") -> None:
        """Write down what became of the rows, in the lane's transaction."""
        if outcome.acknowledged:
            await held.delete(outcome.acknowledged)
        for row_id in outcome.postponed:
            await held.postpone(row_id, timedelta(seconds=POSTPONE_S))
        for refusal in outcome.refused:
            retry_s = refusal.retry_s
            await held.refuse(refusal.row.id, refusal.reason, None if retry_s is None else timedelta(seconds=retry_s))
            outcome.has_more |= retry_s is None  # the user's later rows may go

    def _give_up(self, lane: int, trouble: str, reason: str) -> None:
        """Try one lane at a time from now on, after a delay. The lane's unsent rows are in the outbox."""
        self._trouble, self._lanes.is_probing = trouble, True
        self._probe_at = anyio.current_time() + self._probe_backoff.next_s()
        metrics.publish_failures.labels(trouble).inc()
        _log.warning("lane_given_up", lane=lane, trouble=trouble, reason=reason)


class _Refusal(msgspec.Struct, frozen=True):
    """A row that the broker will not take, and its name for that."""

    row: OutboxRow
    reason: str
    retry_first_s: float

    @property
    def retry_s(self) -> float | None:
        """Return how long the row waits for its next try; None where this was the last."""
        if self.row.attempts + 1 >= TRIES_MAX:
            return None
        return self.retry_first_s * float(2**self.row.attempts)


class _Outcome(msgspec.Struct):
    """What became of a lane's rows. `has_answer`: the broker said something of at least one."""

    acknowledged: list[int] = []
    refused: list[_Refusal] = []
    postponed: list[int] = []
    away: BrokerAway | None = None
    has_answer: bool = False
    has_more: bool = False


def make_record(event: Event, topic: str, key: bytes) -> Record:
    """Return what Kafka is to hold: the event's value, and its identity as headers."""
    headers = [
        ("event_id", str(event.id).encode()),
        ("event_type", event.type.encode()),
        ("schema_version", str(event.version).encode()),
    ]
    return Record(topic, key, event.value, headers)


def _report_refusal(refusal: _Refusal) -> None:
    row, retry_s = refusal.row, refusal.retry_s
    fields = {
        "id": row.id,
        "event_id": str(row.event.id),
        "event_type": row.event.type,
        "channel": row.event.channel,
        "user_id": row.event.user_id,
        "reason": refusal.reason,
        "attempts": row.attempts + 1,
    }
    metrics.publish_failures.labels("refused").inc()
    if retry_s is None:
        _log.error("event_parked", **fields)
    else:
        _log.warning("event_refused", retry_s=retry_s, **fields)


class OutboxWatch:
    """Measures what waits in the outbox, with a broker or without one."""

    def __init__(self, outbox: Outbox, degraded_s: int) -> None:
        self._outbox = outbox
        self._degraded_s = degraded_s
        #: The age of the oldest event that waits, in seconds, as last measured.
        self.oldest_s = 0.0

    @property
    def is_late(self) -> bool:
        """Return whether something has waited longer than `outbox_degraded_s`."""
        return self.oldest_s > self._degraded_s

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Measure every MEASURE_S until cancelled; ready when that was tried once."""
        await every(MEASURE_S, self._measure, at_once=True, task_status=task_status)

    async def _measure(self) -> None:
        backlog = await self._outbox.backlog()
        self.oldest_s = backlog.oldest_s
        metrics.outbox_events.set(backlog.events)
        metrics.outbox_oldest_seconds.set(backlog.oldest_s)
        metrics.outbox_parked.set(backlog.parked)
