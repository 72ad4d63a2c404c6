"""What decides."""

from authd.config import Settings
from authd.events.redis import EventStreams
from authd.infra.redis.client import RedisClient
from authd.login.redis import Throttle, ThrottleSettings
from authd.sessions.redis import SessionSettings, SessionStore
from authd.tokens.ring import KeyRing
from authd.users.redis import UserCache


class RedisStores:
    """All stores backed by Redis, but the throttle, which needs a key of the ring."""

    def __init__(self, settings: Settings, client: RedisClient) -> None:
        self.client = client
        self.sessions = SessionStore(client, settings.section(SessionSettings))
        self.user_cache = UserCache(client, settings.user_cache_ttl_s)
        self.streams = EventStreams(client)


def build_throttle(settings: Settings, client: RedisClient, ring: KeyRing) -> Throttle:
    return Throttle(client, settings.section(ThrottleSettings), ring.digest_key())
