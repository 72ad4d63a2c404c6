"""The producer and its recovery: a record is either acknowledged by all in-sync replicas, or it counts as not sent.

One aiokafka producer is in use at a time. It is idempotent, so its own retries neither repeat nor reorder anything, and
it is thrown away at the first record that was handed to it and not acknowledged:

- A record without an answer is still in that producer, which retries it for ever. Sent again by another producer, and
  followed by the user's next event, it could arrive a second time behind that event. So the old producer is ended for
  good *before* `send` raises, hence before the caller gives up the lock that lets another replica send.
- A record that was refused has used up a sequence number: the broker takes nothing more for that partition.

It stays when a topic is missing or forbidden: nothing of the topic was taken. If a sequence number is lacking when the
topic takes records again, the second rule ends the producer then.

What an ended producer had already written to its socket cannot be called back. A frozen broker handles it when it
wakes, ahead of a new producer, whose first record needs several answers before it is sent.
"""

import asyncio
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import anyio
import msgspec
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka_errors
from aiokafka.conn import collect_hosts
from anyio import TASK_STATUS_IGNORED, CancelScope
from anyio.abc import TaskStatus

from authd.config import ConfigError, Secret
from authd.infra.observe import metrics
from authd.infra.tasks.backoff import Backoff

START_DELAY_MIN_S = 0.2
START_DELAY_MAX_S = 5.0
#: Ending a producer only cancels tasks and aborts sockets; it waits for no broker.
END_TIMEOUT_S = 1.0

#: What a broker says of a record that it will not take.
_REFUSALS = (
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.RecordListTooLargeError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.PolicyViolationError,
    # Also every code that aiokafka has no name for, such as INVALID_RECORD of a broker that checks schemas.
    kafka_errors.UnknownError,
)

#: What a broker says of a topic: it is a setting or a right, which a restart or an administrator fixes. Its events wait
#: for that.
_TOPIC_REFUSALS = (
    kafka_errors.UnknownTopicOrPartitionError,
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.InvalidTopicError,
)

_log = structlog.get_logger()


class BrokerAway(Exception):
    """Not now: no broker, or no answer in time. The record may have arrived; send it again later."""


class TopicUnusable(Exception):
    """The broker answers, and has no such topic or does not let authd write to it. The record has not arrived."""


class RecordRefused(Exception):
    """The broker answers, and will never take this record. It has not arrived."""


class KafkaSettings(msgspec.Struct, frozen=True):
    kafka_bootstrap_servers: tuple[str, ...]
    kafka_timeout_s: float
    kafka_security_protocol: str
    kafka_sasl_mechanism: str
    kafka_username: str
    kafka_password: Secret
    kafka_ca_file: str


class Record(msgspec.Struct, frozen=True):
    """What is sent. `value` is None for a tombstone."""

    topic: str
    key: bytes
    value: bytes | None
    headers: list[tuple[str, bytes]]


class Producer:
    """Sends records, one acknowledgement for each. `run` is a task of the tree; without it nothing connects.

    :raises ConfigError: where the Kafka settings cannot be used.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._timeout_s = settings.kafka_timeout_s
        self._options = _options(settings)
        self._connection: _Connection | None = None
        self._connected = anyio.Event()

    @property
    def connected(self) -> bool:
        """Return whether a producer is started. A broker that went away since is noticed by the next `send`."""
        return self._connection is not None

    async def wait_connected(self) -> None:
        """Return when a producer is started. The caller sets the deadline."""
        while self._connection is None:
            await self._connected.wait()

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Keep a started producer until cancelled. Ready at once: a broker may come later."""
        task_status.started()
        backoff = Backoff(START_DELAY_MIN_S, START_DELAY_MAX_S)
        while True:
            # A fresh one for every try: aiokafka does not guarantee that a stopped producer starts again.
            connection = _Connection(self._options)
            try:
                if await self._start(connection):
                    self._use(connection)
                    await connection.ended.wait()
            finally:
                await self._discard(connection)
            if connection.has_answered:
                backoff.reset()
            await anyio.sleep(backoff.next_s())

    async def send(self, record: Record) -> None:
        """Return when the broker has acknowledged the record.

        :raises BrokerAway: within `kafka_timeout_s` (and END_TIMEOUT_S) when it has not; it may have arrived.
        :raises TopicUnusable: when it has no such topic, found out within half of that, or forbids it.
        :raises RecordRefused: when it never will.
        """
        try:
            with anyio.fail_after(self._timeout_s):
                try:
                    await self._deliver(record, alone=False)
                except _BatchRefused:
                    # One answer stands for the whole batch, which holds other users' records too. By itself, a record
                    # is refused for what it is.
                    await self.wait_connected()
                    await self._deliver(record, alone=True)
        except _BatchRefused as error:
            raise RecordRefused(str(error)) from error.__cause__
        except TimeoutError as error:
            raise BrokerAway(f"no acknowledgement within {self._timeout_s:g} s") from error

    async def has_topic(self, topic: str) -> bool:
        """Ask a broker whether it has the topic and shows it to authd; False also where none answers in time."""
        connection = self._connection
        with anyio.move_on_after(self._timeout_s):
            return connection is not None and await connection.has_topic(topic)
        return False

    async def _start(self, connection: "_Connection") -> bool:
        try:
            with anyio.fail_after(2 * self._timeout_s):
                await connection.start()
        except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
            _log.warning("kafka_unreachable", reason=_reason(error))
            return False
        return True

    async def _deliver(self, record: Record, *, alone: bool) -> None:
        connection = self._connection
        if connection is None:
            raise BrokerAway("not connected")
        try:
            delivery = await connection.hand_over(record, alone=alone)
        except kafka_errors.MessageSizeTooLargeError as error:
            # Found before it was handed over: nothing is wrong with the producer.
            raise RecordRefused(_reason(error)) from error
        except _TOPIC_REFUSALS as error:
            # Nothing was handed over. aiokafka says the same of a topic that it could ask nobody about.
            if await connection.is_answered():
                raise TopicUnusable(_reason(error)) from error
            await self._discard(connection, _reason(error))
            raise BrokerAway(_reason(error)) from error
        except kafka_errors.KafkaError as error:
            await self._discard(connection, _reason(error))
            raise BrokerAway(_reason(error)) from error
        try:
            await connection.acknowledged(delivery)
        except _TOPIC_REFUSALS as error:
            # The whole batch is the topic's, and aiokafka has given it up: the producer is good for all other topics.
            connection.has_answered = True
            raise TopicUnusable(_reason(error)) from error
        except _REFUSALS as error:
            connection.has_answered = True
            await self._discard(connection, _reason(error))
            raise _BatchRefused(_reason(error)) from error
        except kafka_errors.KafkaError as error:
            await self._discard(connection, _reason(error))
            raise BrokerAway(_reason(error)) from error
        except BaseException:
            # The deadline or a cancellation: the record may be on its way. See the module's head.
            await self._discard(connection, "no acknowledgement")
            raise
        connection.has_answered = True

    def _use(self, connection: "_Connection") -> None:
        self._connection = connection
        self._connected.set()
        metrics.kafka_connected.set(1)
        _log.info("kafka_connected")

    async def _discard(self, connection: "_Connection", reason: str = "") -> None:
        """Return when the connection is ended, whoever ends it. From the first moment on nobody is given it."""
        if connection is self._connection:
            self._connection = None
            self._connected = anyio.Event()
            metrics.kafka_connected.set(0)
            if reason:
                _log.warning("kafka_producer_discarded", reason=reason)
        with anyio.move_on_after(END_TIMEOUT_S, shield=True) as ending:
            await connection.end()
        if ending.cancelled_caught:
            _log.error("kafka_producer_not_ended")


class _BatchRefused(Exception):
    """The batch that held the record was refused."""


class _Connection:
    """One aiokafka producer, from its start to its end.

    aiokafka's `stop` first waits for every pending record, and when that wait is cancelled its tasks go on sending.
    `end` therefore reaches into the private parts of aiokafka 0.14, which is why the minor version is pinned.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.ended = anyio.Event()
        self.has_answered = False
        self._producer = AIOKafkaProducer(**options)
        self._is_ending = False
        self._requests: set[asyncio.Task[Any]] = set()
        self._waits: set[CancelScope] = set()
        self._send_request = self._producer._sender._send_produce_req
        self._producer._sender._send_produce_req = self._send_request_noted

    async def start(self) -> None:
        await self._producer.start()

    async def hand_over(self, record: Record, *, alone: bool) -> asyncio.Future[Any]:
        """Return what waits for the acknowledgement. A call that raises, or is cancelled, has handed over nothing.

        :raises ProducerClosed: when the connection ends meanwhile, as `acknowledged` does.
        """
        producer = self._producer
        delivery: asyncio.Future[Any]
        with self._wait():
            if not alone:
                delivery = await producer.send(record.topic, key=record.key, value=record.value, headers=record.headers)
                return delivery
            await producer.partitions_for(record.topic)
            partition = producer._partition(record.topic, None, record.key, record.value, record.key, record.value)
            batch = producer.create_batch()
            batch.append(timestamp=None, key=record.key, value=record.value, headers=record.headers)
            batch.close()
            delivery = await producer.send_batch(batch, record.topic, partition=partition)
            return delivery

    async def is_answered(self) -> bool:
        """Ask for the metadata of all topics in use; False where no broker answers."""
        try:
            with self._wait():
                return bool(await self._producer.client.force_metadata_update())
        except kafka_errors.KafkaError:
            return False

    async def has_topic(self, topic: str) -> bool:
        client = self._producer.client
        client.add_topic(topic)
        return await self.is_answered() and client.cluster.partitions_for_topic(topic) is not None

    async def acknowledged(self, delivery: asyncio.Future[Any]) -> None:
        with self._wait():
            await delivery

    @contextmanager
    def _wait(self) -> Generator[None, None, None]:
        with CancelScope() as scope:
            self._waits.add(scope)
            try:
                yield
            finally:
                self._waits.discard(scope)
        if scope.cancelled_caught:
            raise kafka_errors.ProducerClosed()

    async def end(self) -> None:
        """Return when nothing of this producer will be sent any more. Its unanswered records fail."""
        if self._is_ending:
            await self.ended.wait()
            return
        self._is_ending = True
        producer = self._producer
        producer._closed = True  # else its finaliser complains
        producer._message_accumulator._closed = True  # takes no more records
        try:
            tasks = {task for task in (producer._sender.sender_task, *self._requests) if task is not None}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            for link in list(producer.client._conns.values()):
                # A polite close would wait until a frozen broker has read everything.
                if link._writer is not None:
                    link._writer.transport.abort()
            await producer.client.close()
        except Exception:
            # A task of the library that had failed long before: this is where its error comes out.
            _log.exception("kafka_producer_end_failed")
        finally:
            self.ended.set()
            for wait in self._waits:
                wait.cancel()

    async def _send_request_noted(self, node_id: Any, batches: Any) -> None:
        task = asyncio.current_task()
        if self._is_ending or task is None:
            return
        self._requests.add(task)
        try:
            await self._send_request(node_id, batches)
        finally:
            self._requests.discard(task)


def _options(settings: KafkaSettings) -> dict[str, Any]:
    servers = list(settings.kafka_bootstrap_servers)
    try:
        collect_hosts(servers)
    except ValueError:
        raise ConfigError("AUTHD_KAFKA_BOOTSTRAP_SERVERS must be host:port, separated by commas.") from None
    options: dict[str, Any] = {
        "bootstrap_servers": servers,
        "client_id": "authd",
        "acks": "all",
        "enable_idempotence": True,
        # Half of a send's deadline, so that an unanswered request is tried once more, perhaps at a new leader.
        "request_timeout_ms": int(settings.kafka_timeout_s * 500),
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        try:
            options["ssl_context"] = ssl.create_default_context(cafile=settings.kafka_ca_file or None)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"AUTHD_KAFKA_CA_FILE is not usable: {error}.") from None
    if settings.kafka_security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_username
        options["sasl_plain_password"] = settings.kafka_password.reveal()
    return options


def _reason(error: BaseException) -> str:
    """Return the error's name for the log, without its text, which may hold what was sent."""
    return type(error).__name__
