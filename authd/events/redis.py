"""The events born in Redis: one bounded stream for each bucket, filled by scripts and emptied by the relay."""

from collections.abc import Sequence

import msgspec

from authd.config import BUCKETS
from authd.events.contract import LockCounter
from authd.infra.redis.client import RedisClient
from authd.infra.subject import Subject

#: The names that an entry's fields have in Redis: the scripts that call `add_event` write them.
FIELDS = {
    "kind": "t",
    "user_id": "u",
    "incarnation": "i",
    "session_id": "s",
    "caller": "c",
    "counter": "k",
    "address": "a",
}


class StreamEntry(msgspec.Struct, frozen=True):
    """One event as a script recorded it. A property raises KeyError where the entry has no such field, and ValueError
    where the field is not what this version writes.
    """

    id: str
    fields: dict[str, bytes]

    @property
    def at_ms(self) -> int:
        """Return when it was recorded, in ms of Redis's clock since the epoch."""
        return int(self.id.partition("-")[0])

    @property
    def kind(self) -> str:
        """Return the event's type: an EventType, or a newer version's."""
        return self._field("kind").decode()

    @property
    def user_id(self) -> int:
        """Return whom it is about, 0 for no known user."""
        return int(self._field("user_id"))

    @property
    def subject(self) -> Subject:
        """Return whom it is about. Entries of before incarnations have the incarnation 0."""
        return Subject(self.user_id, int(self.fields.get(FIELDS["incarnation"], 0)))

    @property
    def session_id(self) -> bytes:
        return self._field("session_id")

    @property
    def caller(self) -> bytes:
        """Return the packed address and user agent: see sessions/redis.py."""
        return self._field("caller")

    @property
    def counter(self) -> LockCounter:
        counter: LockCounter = msgspec.convert(self._field("counter").decode(), LockCounter)
        return counter

    @property
    def address(self) -> str:
        return self._field("address").decode()

    def _field(self, name: str) -> bytes:
        return self.fields[FIELDS[name]]


class EventStreams:
    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def read(self, bucket: int, count: int, after: str = "") -> list[StreamEntry]:
        """Return the oldest entries, or those that follow the id `after`; at most `count`. They stay."""
        first = f"({after}" if after else "-"
        rows = await self._client.command("XRANGE", event_stream(self._client, bucket), first, "+", "COUNT", count)
        return [_entry(id_, fields) for id_, fields in rows]

    async def delete(self, bucket: int, ids: Sequence[str]) -> None:
        """Forget entries that Postgres holds."""
        await self._client.command("XDEL", event_stream(self._client, bucket), *ids)

    async def filled(self) -> dict[int, int]:
        """Return the buckets whose streams have entries, and how many."""
        lengths = await self._client.commands("XLEN", [event_stream(self._client, bucket) for bucket in range(BUCKETS)])
        return {bucket: length for bucket, length in enumerate(lengths) if length}


def event_stream(client: RedisClient, bucket: int) -> str:
    """Return the key of the bucket's stream."""
    return client.key(bucket, "events")


def _entry(entry_id: bytes, fields: dict[bytes, bytes] | list[bytes]) -> StreamEntry:
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    named = {name.decode(): value for name, value in pairs}
    return StreamEntry(entry_id.decode(), named)
