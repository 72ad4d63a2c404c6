"""The events born in Redis: one bounded stream for each bucket, filled by scripts and emptied by the relay."""

from collections.abc import Sequence

import msgspec

from authd.config import BUCKETS
from authd.infra.redis.client import RedisClient


class StreamEntry(msgspec.Struct, frozen=True):
    """One event as a script recorded it: `fields` as in `scripts/event_add.lua` and its callers."""

    id: str
    kind: str
    fields: dict[str, bytes]

    @property
    def at_ms(self) -> int:
        """When, in ms of Redis's clock since the epoch."""
        return int(self.id.partition("-")[0])


class EventStreams:
    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def read(self, bucket: int, count: int, after: str = "") -> list[StreamEntry]:
        """The oldest entries, or those that follow the id `after`; at most `count`. They stay."""
        first = f"({after}" if after else "-"
        rows = await self._client.command("XRANGE", event_stream(self._client, bucket), first, "+", "COUNT", count)
        return [_entry(id_, fields) for id_, fields in rows]

    async def delete(self, bucket: int, ids: Sequence[str]) -> None:
        """Forget entries that Postgres holds."""
        await self._client.command("XDEL", event_stream(self._client, bucket), *ids)

    async def filled(self) -> dict[int, int]:
        """The buckets whose streams have entries, and how many."""
        lengths = await self._client.commands("XLEN", [event_stream(self._client, bucket) for bucket in range(BUCKETS)])
        return {bucket: length for bucket, length in enumerate(lengths) if length}


def event_stream(client: RedisClient, bucket: int) -> str:
    """The bucket's stream."""
    return client.key(bucket, "events")


def _entry(entry_id: bytes, fields: dict[bytes, bytes] | list[bytes]) -> StreamEntry:
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    named = {name.decode(): value for name, value in pairs}
    return StreamEntry(entry_id.decode(), named.pop("t").decode(), named)
