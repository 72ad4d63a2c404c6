"""Caches profiles: what /auth/me shows, with the version of the row that it came from."""

from authd.infra.redis.client import RedisClient
from authd.infra.subject import Subject, bucket_of_user


class UserCache:
    """Read through `SessionStore.inspect`, with the session it belongs to; invalidated by the revocation log."""

    def __init__(self, client: RedisClient, ttl_s: int) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._store = client.script(__package__, "user_cache")

    async def store(self, subject: Subject, version: int, user_json: bytes) -> None:
        """Cache the row, unless a newer one is known."""
        key = self._client.key(bucket_of_user(subject.user_id), f"profile:{subject}")
        await self._client.read(self._store, [key], version, user_json, self._ttl_s)
