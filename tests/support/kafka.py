"""What the tests ask a broker, past authd."""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest
from anyio import to_thread
from support.stores import read_topic

from authd.embedded import KafkaBroker

#: Kafka's numbers of what an ACL is about.
TOPIC_RESOURCE, LITERAL = 2, 3
WRITE, DESCRIBE = 4, 8
DENY, ALLOW = 2, 3
#: Whoever comes without SASL.
ANYBODY = "User:ANONYMOUS"


class StrictBroker(KafkaBroker):
    """Makes no topic by itself, and obeys ACLs: a topic without one is everybody's."""

    async def _prepare(self) -> None:
        await super()._prepare()
        lines = (
            "auto.create.topics.enable=false",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found=true",
            "",
        )
        await to_thread.run_sync(_append, self._properties, "\n".join(lines))


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def topics(name: str) -> dict[str, str]:
    """The settings of a deployment with topics of its own."""
    return {
        "AUTHD_KAFKA_REGISTRATION_TOPIC": f"{name}.users",
        "AUTHD_KAFKA_EVENTS_TOPIC": f"{name}.events",
        "AUTHD_KAFKA_REVOCATIONS_TOPIC": f"{name}.revocations",
    }


async def create_topics(servers: str, names: Iterable[str], **config: str) -> None:
    async with _admin(servers) as admin:
        await admin.create_topics([NewTopic(name, 1, 1, topic_configs=config) for name in names])


async def forbid_writing(broker: KafkaBroker, topic: str, *, is_hidden: bool) -> None:
    """`is_hidden`: the topic may not even be seen."""
    async with _admin(broker.bootstrap_servers) as admin:
        for operation, permission in ((WRITE, DENY), (DESCRIBE, DENY if is_hidden else ALLOW)):
            request = CreateAclsRequest(TOPIC_RESOURCE, topic, LITERAL, ANYBODY, "*", operation, permission)
            answer = await admin._send_request(request)
            assert [error for error, _ in answer.creation_responses] == [0]


async def allow_writing(broker: KafkaBroker, topic: str) -> None:
    async with _admin(broker.bootstrap_servers) as admin:
        for operation, permission in ((WRITE, DENY), (DESCRIBE, DENY), (DESCRIBE, ALLOW)):
            request = DeleteAclsRequest(TOPIC_RESOURCE, topic, LITERAL, ANYBODY, "*", operation, permission)
            answer = await admin._send_request(request)
            assert [error for error, *_ in answer.filter_responses] == [0]


async def configure_topic(servers: str, name: str, **config: str) -> None:
    async with _admin(servers) as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, config)])


@asynccontextmanager
async def _admin(servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=servers)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def events_in(broker: KafkaBroker, topic: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a topic at their first delivery, in order: type and value. A tombstone is an empty value."""
    seen: set[bytes] = set()
    first: list[ConsumerRecord] = []
    for record in await read_topic(broker.bootstrap_servers, topic):
        event_id = dict(record.headers)["event_id"]
        if event_id not in seen:
            seen.add(event_id)
            first.append(record)
    return [(dict(record.headers)["event_type"].decode(), json.loads(record.value or b"{}")) for record in first]
