"""The key ring in the process: loaded from Postgres, sealed there, rotated by age, and followed by all replicas.

A new key is published at once and signs only `key_publish_s` later: by then every replica has read it and every
verifier has fetched the JWKS again. An old key stays until the last token made with it has expired. So which key is
next, current or previous follows from the times in the table and is stored nowhere.

The times are Postgres's. A replica learns at each read how far its own clock is from that one, and signs by it. It
deletes nothing while the two disagree, since one of them is wrong and a deleted key does not come back.
"""

import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

import msgspec
import structlog
from anyio.abc import TaskStatus

from authd.config import Secret
from authd.errors import Unavailable
from authd.infra.clocks import Clock
from authd.infra.observe import metrics
from authd.infra.tasks.every import every
from authd.tokens.access import InvalidToken
from authd.tokens.device import DEVICE_TTL_S
from authd.tokens.postgres import Keys, Lives, NewKey, StoredKey
from authd.tokens.ring import Algorithm, DataKey, KeyRing, MacKey, SigningKey
from authd.tokens.seal import KeySeal, generate_signing_key, load_signing_key, shared_signing_key

RANDOM_KEY_BYTES = 32
MAC, DATA = "mac", "data"
PURPOSES = {MAC, DATA, "ES256", "Ed25519"}
#: A key outlives its last token by this: clocks differ.
EXPIRY_MARGIN = timedelta(minutes=5)
#: Reads of the table within the time that a key is published before it signs.
READS_PER_PUBLICATION = 5
INTERVAL_MAX_S = 30.0

_log = structlog.get_logger()


class SealedByAnotherSecret(Exception):
    """AUTHD_SECRET is not the one that the stored keys were sealed under."""


class KeySettings(msgspec.Struct, frozen=True):
    secret: Secret
    secret_previous: Secret
    jwt_algorithm: Literal["ES256", "Ed25519", "HS256"]
    jwt_secret: Secret
    key_publish_s: int
    key_max_age_s: int
    access_ttl_s: int
    refresh_ttl_s: int
    clock_skew_max_s: float


class KeyKeeper:
    """Makes, seals, rotates and reads the keys of a deployment. `clock`: this process's, in epoch seconds."""

    def __init__(self, settings: KeySettings, keys: Keys, clock: Clock = time.time) -> None:
        self._settings = settings
        self._keys = keys
        self._clock = clock
        self._seal = KeySeal(settings.secret, settings.secret_previous)
        self._publish = timedelta(seconds=settings.key_publish_s)
        self._max_age = timedelta(seconds=settings.key_max_age_s)
        self._lives = Lives(
            mac=timedelta(seconds=max(settings.refresh_ttl_s, DEVICE_TTL_S)) + EXPIRY_MARGIN,
            signing=timedelta(seconds=settings.access_ttl_s) + EXPIRY_MARGIN,
        )

    @property
    def rotating(self) -> list[str]:
        """Return the purposes whose keys follow one another."""
        algorithm = self._settings.jwt_algorithm
        return [MAC] if algorithm == "HS256" else [MAC, algorithm]

    async def load(self) -> KeyRing:
        """Return the ring, with a first key of each purpose where there is none, all sealed under the present secret.

        :raises SealedByAnotherSecret, Unavailable:
        """
        if self._settings.secret_previous:
            await self._keys.reseal(lambda key: self._seal.reseal(key.sealed, label=_label(key.purpose, key.kid)))
        ring = KeyRing([], [])
        await self.refresh(ring)
        return ring

    async def refresh(self, ring: KeyRing) -> None:
        """Read the stored keys into the ring, after adding those that are due and deleting those that are over.

        :raises SealedByAnotherSecret, Unavailable:
        """
        asked_at = self._clock()
        now_s = await self._keys.time_s()
        ahead_s = (asked_at + self._clock()) / 2 - now_s
        now = datetime.fromtimestamp(now_s, UTC)
        stored = await self.read()
        due = [purpose for purpose in [DATA, *self.rotating] if self._is_due(purpose, stored, now)]
        is_over = any(key.is_over for key in stored) and abs(ahead_s) <= self._settings.clock_skew_max_s
        if is_over:
            await self._keys.delete_over(self._lives)
        for purpose in due:
            max_age = None if purpose == DATA else self._max_age
            await self._keys.add_if_due(self._make(purpose), self._publish, max_age)
        if due or is_over:
            stored = await self.read()
        ring.replace(*self._open(stored, ahead_s))

    async def read(self) -> list[StoredKey]:
        """Return the stored keys, sealed, oldest first."""
        return await self._keys.load(self._lives)

    async def rotate(self) -> list[str]:
        """Add a next key of each purpose that rotates, whatever the age of the current one, and return their ids.

        :raises SealedByAnotherSecret: before a key is added that no replica could open.
        """
        self._open(await self.read())
        made = [self._make(purpose) for purpose in self.rotating]
        for key in made:
            await self._keys.add(key, self._publish)
        return [key.kid for key in made]

    async def follow(self, ring: KeyRing, *, task_status: TaskStatus[None]) -> None:
        """Keep the ring up with the table, often enough that no key signs before every replica knows it."""
        interval_s = min(INTERVAL_MAX_S, self._publish.total_seconds() / READS_PER_PUBLICATION)
        await every(interval_s, partial(self._refresh_again, ring), task_status=task_status)

    async def _refresh_again(self, ring: KeyRing) -> None:
        try:
            await self.refresh(ring)
        except (Unavailable, SealedByAnotherSecret) as error:
            if isinstance(error, Unavailable):
                metrics.unavailable.labels(error.part).inc()
            _log.error("keys_not_read", cause=repr(error.__cause__ or error))

    def _is_due(self, purpose: str, stored: Sequence[StoredKey], now: datetime) -> bool:
        # A first key is active from the beginning; its age counts from when it was made.
        newest = max((max(key.active_at, key.created_at) for key in stored if key.purpose == purpose), default=None)
        return newest is None or (purpose != DATA and newest + self._max_age < now)

    def _make(self, purpose: str) -> NewKey:
        kid = secrets.token_hex(8)
        is_random = purpose in (MAC, DATA)
        plain = secrets.token_bytes(RANDOM_KEY_BYTES) if is_random else generate_signing_key(_algorithm(purpose), kid)
        return NewKey(purpose, kid, self._seal.seal(plain, label=_label(purpose, kid)))

    def _open(
        self, stored: Sequence[StoredKey], ahead_s: float = 0.0
    ) -> tuple[list[SigningKey], list[MacKey], list[DataKey]]:
        """Open the keys. `ahead_s`: how far this process's clock, in which the ring's times are, is from Postgres's."""
        signing, mac, data = [], [], []
        for key in stored:
            if key.purpose not in PURPOSES:
                continue  # a newer replica's
            try:
                plain = self._seal.open(key.sealed, label=_label(key.purpose, key.kid))
            except InvalidToken:
                raise SealedByAnotherSecret(
                    f"Key {key.kid} was sealed under another AUTHD_SECRET. Set that one as AUTHD_SECRET_PREVIOUS."
                ) from None
            active_at = key.active_at.timestamp() + ahead_s
            if key.purpose == MAC:
                mac.append(MacKey(key.id, plain, active_at))
            elif key.purpose == DATA:
                data.append(DataKey(key.id, plain))
            elif self._settings.jwt_algorithm != "HS256":  # then nothing is public, nor taken for ours
                algorithm = _algorithm(key.purpose)
                signing.append(load_signing_key(plain, kid=key.kid, algorithm=algorithm, active_at=active_at))
        if self._settings.jwt_algorithm == "HS256":
            signing.append(shared_signing_key(self._settings.jwt_secret))
        return signing, mac, data


def _algorithm(purpose: str) -> Algorithm:
    return "Ed25519" if purpose == "Ed25519" else "ES256"


def _label(purpose: str, kid: str) -> str:
    return f"{purpose}/{kid}"
