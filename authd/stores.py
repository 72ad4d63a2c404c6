"""The stores of a deployment, wired the same for the service and for its commands."""

from datetime import timedelta

from authd.announcements import EventFactory
from authd.config import Settings
from authd.postgres.clients import Clients
from authd.postgres.database import Database
from authd.postgres.deployment import Deployment
from authd.postgres.keys import Keys
from authd.postgres.outbox import Outbox
from authd.postgres.relay import RelayStore
from authd.postgres.revocations import Revocations, RevocationWriter
from authd.postgres.users import Users
from authd.redis.client import RedisClient
from authd.redis.events import EventStreams
from authd.redis.sessions import SessionStore
from authd.redis.throttle import Throttle
from authd.redis.users import UserCache


class PostgresStores:
    """What remembers."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.events = EventFactory(settings)
        writer = RevocationWriter(self.events, timedelta(seconds=settings.session_ttl_s))
        self.users = Users(database, writer, self.events)
        self.revocations = Revocations(database, writer, self.events)
        self.relay = RelayStore(database, writer)
        self.outbox = Outbox(database)
        self.keys = Keys(database)
        self.clients = Clients(database)
        self.deployment = Deployment(database)


class RedisStores:
    """What decides. `digest_key`: the key ring's."""

    def __init__(self, settings: Settings, client: RedisClient, digest_key: bytes) -> None:
        self.sessions = SessionStore(client, settings)
        self.user_cache = UserCache(client, settings)
        self.throttle = Throttle(client, settings, digest_key)
        self.streams = EventStreams(client)
