"""Everything that is kept in Postgres."""

from datetime import timedelta

from authd.accounts.creation import Creation
from authd.accounts.disabling import Disabling
from authd.config import Settings
from authd.events.factory import EventFactory
from authd.events.postgres import Outbox
from authd.infra.postgres.database import Database
from authd.oauth.postgres import Clients
from authd.sessions.endings import Endings
from authd.sessions.postgres import RelayStore, Revocations, RevocationWriter
from authd.tokens.postgres import Keys
from authd.users.deployment import Deployment
from authd.users.postgres import Users


class PostgresStores:
    """All stores backed by Postgres."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.database = database
        self.events = EventFactory(
            has_broker=bool(settings.kafka_bootstrap_servers), access_ttl_s=settings.access_ttl_s
        )
        writer = RevocationWriter(self.events, timedelta(seconds=settings.session_ttl_s))
        self.users = Users(database)
        self.creation = Creation(database, self.users, self.events)
        self.revocations = Revocations(database)
        self.endings = Endings(database, self.users, writer, self.events)
        self.disabling = Disabling(database, self.users, writer, self.events)
        self.relay = RelayStore(database, writer)
        self.outbox = Outbox(database)
        self.keys = Keys(database)
        self.clients = Clients(database)
        self.deployment = Deployment(database)
