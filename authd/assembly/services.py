"""Everything that one replica is made of, except its HTTP app."""

import time

import msgspec

from authd.accounts.registration import Accounts
from authd.assembly.postgres import PostgresStores
from authd.assembly.redis import RedisStores, build_throttle
from authd.config import Settings
from authd.events import publisher
from authd.events.publisher import OutboxWatch, Publisher, PublisherSettings
from authd.infra.clocks import Clock
from authd.infra.kafka.producer import KafkaSettings, Producer
from authd.infra.observe.health import Health
from authd.login.gate import refuse_tokens
from authd.login.login import Login
from authd.login.password import PasswordCheck
from authd.oauth.clients import ClientRegistry
from authd.oauth.introspection import TokenDesk
from authd.passwords.hasher import Hasher, HashSettings
from authd.sessions import relay
from authd.sessions.feed import RevocationFeed
from authd.sessions.relay import EventRelay
from authd.sessions.sessions import Sessions
from authd.tokens.access import MintSettings, TokenMint
from authd.tokens.device import DeviceMint
from authd.tokens.ring import KeyRing
from authd.users.profile import Profiles


class Intervals(msgspec.Struct, frozen=True, kw_only=True):
    """How often, in seconds, the tasks look for what nobody offered to them."""

    relay_sweep_s: float = relay.SWEEP_S
    publish_sweep_s: float = publisher.SWEEP_S
    publish_retry_first_s: float = publisher.RETRY_FIRST_S
    topic_retry_s: float = publisher.TOPIC_RETRY_S


_INTERVALS = Intervals()


class Services:
    """The objects of one replica, over open stores. Each `_build_…` uses only what those before it made.

    `clock`: this process's, in epoch seconds.
    """

    def __init__(
        self,
        settings: Settings,
        postgres: PostgresStores,
        redis: RedisStores,
        ring: KeyRing,
        *,
        clock: Clock = time.time,
        intervals: Intervals = _INTERVALS,
    ) -> None:
        self.settings = settings
        self.postgres = postgres
        self.redis = redis
        self.ring = ring
        self._clock = clock
        self._intervals = intervals
        self._build_events()
        self._build_tokens()
        self._build_passwords()
        self._build_feed()
        self._build_sessions()
        self._build_users()
        self._build_login()
        self._build_accounts()
        self._build_oauth()
        self._build_health()

    def offer_lane(self, lane: int) -> None:
        """Tell the publisher, where there is one, that a lane of the outbox has rows. Never blocks or raises."""
        if self.publisher is not None:
            self.publisher.offer(lane)

    def _build_events(self) -> None:
        self.outbox_watch = OutboxWatch(self.postgres.outbox, self.settings.outbox_degraded_s)
        self.producer: Producer | None = None
        self.publisher: Publisher | None = None
        if self.settings.kafka_bootstrap_servers:
            self.producer = Producer(self.settings.section(KafkaSettings))
            self.publisher = Publisher(
                self.settings.section(PublisherSettings),
                self.postgres.outbox,
                self.producer,
                sweep_s=self._intervals.publish_sweep_s,
                retry_first_s=self._intervals.publish_retry_first_s,
                topic_retry_s=self._intervals.topic_retry_s,
            )

    def _build_tokens(self) -> None:
        self.mint = TokenMint(self.settings.section(MintSettings), self.ring, self._clock)
        self.devices = DeviceMint(self.ring, self._clock)

    def _build_passwords(self) -> None:
        self.hasher = Hasher(self.settings.section(HashSettings))

    def _build_feed(self) -> None:
        self.feed = RevocationFeed(
            self.postgres.revocations, self.postgres.endings, self.redis.sessions, self.offer_lane
        )
        self.relay = EventRelay(
            self.redis.streams,
            self.postgres.relay,
            self.postgres.events,
            self.feed,
            self.offer_lane,
            sweep_s=self._intervals.relay_sweep_s,
        )

    def _build_sessions(self) -> None:
        self.sessions = Sessions(
            self.mint,
            self.postgres.users,
            self.postgres.endings,
            self.redis.sessions,
            self.feed,
            refuse_tokens,
            self.relay.offer,
        )

    def _build_users(self) -> None:
        self.profiles = Profiles(self.postgres.users, self.redis.user_cache, self.sessions.authenticate)

    def _build_login(self) -> None:
        self.throttle = build_throttle(self.settings, self.redis.client, self.ring)
        self.passwords = PasswordCheck(
            self.settings.bcrypt_cost, self.postgres.users, self.throttle, self.hasher, self.devices
        )
        self.logins = Login(self.passwords, self.sessions)

    def _build_accounts(self) -> None:
        self.accounts = Accounts(self.postgres.creation, self.hasher, self.throttle, self.offer_lane)

    def _build_oauth(self) -> None:
        self.clients = ClientRegistry(self.postgres.clients)
        self.token_desk = TokenDesk(self.mint, self.sessions)

    def _build_health(self) -> None:
        producer, outbox = self.producer, self.outbox_watch
        self.health = Health(
            {"user_store": self.postgres.database.ping, "session_store": self.redis.client.ping},
            events=lambda: producer is not None and producer.connected and not outbox.is_late,
            oldest_s=lambda: outbox.oldest_s,
        )
