"""The stores of a deployment, wired the same for the service and for its commands."""

from datetime import timedelta

from authd.config import Settings
from authd.events.factory import EventFactory
from authd.events.postgres import Outbox
from authd.events.redis import EventStreams
from authd.infra.postgres.database import Database
from authd.infra.redis.client import RedisClient
from authd.login.redis import Throttle
from authd.oauth.postgres import Clients
from authd.sessions.postgres import Revocations, RevocationWriter
from authd.sessions.redis import SessionStore
from authd.sessions.relay_store import RelayStore
from authd.tokens.postgres import Keys
from authd.users.deployment import Deployment
from authd.users.postgres import Users
from authd.users.redis import UserCache


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
