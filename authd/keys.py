"""The key ring in the process: loaded from Postgres, sealed there, rotated by age, and followed by all replicas.

A new key is published at once and signs only `key_publish_s` later: by then every replica has read it and every
verifier has fetched the JWKS again. An old key stays until the last token made with it has expired. So which key is
next, current or previous follows from the times in the table and is stored nowhere.
"""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import anyio
import structlog
from anyio.abc import TaskStatus

from authd.config import Settings
from authd.devices import DEVICE_TTL_S
from authd.errors import Unavailable
from authd.postgres.keys import Keys, NewKey, StoredKey
from authd.tokens import (
    Algorithm,
    InvalidToken,
    KeyRing,
    KeySeal,
    MacKey,
    SigningKey,
    generate_signing_key,
    load_signing_key,
    shared_signing_key,
)

MAC_KEY_BYTES = 32
MAC = "mac"
#: A key outlives its last token by this: clocks differ.
EXPIRY_MARGIN = timedelta(minutes=5)
#: Reads of the table within the time that a key is published before it signs.
READS_PER_PUBLICATION = 5
INTERVAL_MAX_S = 30.0

_log = structlog.get_logger()


class SealedByAnotherSecret(Exception):
    """AUTHD_SECRET is not the one that the stored keys were sealed under."""


class KeyKeeper:
    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self._seal = KeySeal(settings.secret, settings.secret_previous)
        self._publish = timedelta(seconds=settings.key_publish_s)
        self._max_age = timedelta(seconds=settings.key_max_age_s)

    @property
    def purposes(self) -> list[str]:
        """What this deployment needs keys for."""
        algorithm = self._settings.jwt_algorithm
        return [MAC] if algorithm == "HS256" else [MAC, algorithm]

    async def load(self) -> KeyRing:
        """The ring, with a first key of each purpose where there is none.

        :raises SealedByAnotherSecret, Unavailable:
        """
        ring = KeyRing([], [])
        await self.refresh(ring)
        return ring

    async def refresh(self, ring: KeyRing) -> None:
        """Read the stored keys into the ring, after adding those that are due and dropping those that are over."""
        stored = await self._keys.load()
        due = [purpose for purpose in self.purposes if self._is_due(purpose, stored)]
        over = self._expired(stored)
        if due or over:
            await self._keys.delete(over)
            for purpose in due:
                await self._keys.add_if_due(self._make(purpose), self._publish, self._max_age)
            stored = await self._keys.load()
        ring.replace(*self._open(stored))

    async def rotate(self) -> list[str]:
        """Add a next key of each purpose, whatever the age of the current one, and return their ids.

        :raises SealedByAnotherSecret: before a key is added that no replica could open.
        """
        self._open(await self._keys.load())
        made = [self._make(purpose) for purpose in self.purposes]
        for key in made:
            await self._keys.add(key, self._publish)
        return [key.kid for key in made]

    async def follow(self, ring: KeyRing, *, task_status: TaskStatus[None]) -> None:
        """Keep the ring up with the table, often enough that no key signs before every replica knows it."""
        task_status.started()
        interval_s = min(INTERVAL_MAX_S, self._publish.total_seconds() / READS_PER_PUBLICATION)
        while True:
            await anyio.sleep(interval_s)
            try:
                await self.refresh(ring)
            except (Unavailable, SealedByAnotherSecret) as error:
                _log.error("keys_not_read", cause=repr(error.__cause__ or error))

    def _is_due(self, purpose: str, stored: Sequence[StoredKey]) -> bool:
        times = [key.active_at for key in stored if key.purpose == purpose]
        # A first key is active since ever; its age counts from when it was made.
        newest = max((max(key.active_at, key.created_at) for key in stored if key.purpose == purpose), default=None)
        return not times or (newest is not None and newest + self._max_age < _now())

    def _expired(self, stored: Sequence[StoredKey]) -> list[int]:
        """Keys whose successor has been active for longer than any token of theirs lives."""
        over = []
        for key in stored:
            life_s = self._settings.access_ttl_s
            if key.purpose == MAC:
                life_s = max(self._settings.refresh_ttl_s, DEVICE_TTL_S)
            successors = [other.active_at for other in stored if _follows(other, key)]
            if successors and min(successors) + timedelta(seconds=life_s) + EXPIRY_MARGIN < _now():
                over.append(key.id)
        return over

    def _make(self, purpose: str) -> NewKey:
        kid = secrets.token_hex(8)
        is_mac = purpose == MAC
        plain = secrets.token_bytes(MAC_KEY_BYTES) if is_mac else generate_signing_key(_algorithm(purpose), kid)
        return NewKey(purpose, kid, self._seal.seal(plain, label=_label(purpose, kid)))

    def _open(self, stored: Sequence[StoredKey]) -> tuple[list[SigningKey], list[MacKey]]:
        signing, mac = [], []
        for key in stored:
            try:
                plain = self._seal.open(key.sealed, label=_label(key.purpose, key.kid))
            except InvalidToken:
                raise SealedByAnotherSecret(
                    f"Key {key.kid} was sealed under another AUTHD_SECRET. Set that one as AUTHD_SECRET_PREVIOUS."
                ) from None
            active_at = key.active_at.timestamp()
            if key.purpose == MAC:
                mac.append(MacKey(key.id, plain, active_at))
            elif self._settings.jwt_algorithm != "HS256":  # then nothing is public, nor taken for ours
                algorithm = _algorithm(key.purpose)
                signing.append(load_signing_key(plain, kid=key.kid, algorithm=algorithm, active_at=active_at))
        if self._settings.jwt_algorithm == "HS256":
            signing.append(shared_signing_key(self._settings.jwt_secret))
        return signing, mac


def _follows(other: StoredKey, key: StoredKey) -> bool:
    return other.purpose == key.purpose and (other.active_at, other.id) > (key.active_at, key.id)


def _algorithm(purpose: str) -> Algorithm:
    return "Ed25519" if purpose == "Ed25519" else "ES256"


def _label(purpose: str, kid: str) -> str:
    return f"{purpose}/{kid}"


def _now() -> datetime:
    return datetime.now(UTC)
