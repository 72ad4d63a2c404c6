"""The key ring: which keys sign, and which prove. Pure: no I/O."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from joserfc.jwk import Key

Algorithm = Literal["ES256", "Ed25519", "HS256"]


TimedKey = TypeVar("TimedKey", "SigningKey", "MacKey")


DERIVED_BYTES = 32


class SigningKey(msgspec.Struct, frozen=True):
    """A key for access tokens. It is published as soon as it is loaded and signs from `active_at` (epoch seconds)."""

    kid: str
    algorithm: Algorithm
    key: Key
    active_at: float

    def __repr__(self) -> str:
        return f"SigningKey({self.kid!r}, {self.algorithm!r})"


class MacKey(msgspec.Struct, frozen=True):
    """A key for refresh tokens and device tokens. `active_at` in epoch seconds."""

    id: int
    secret: bytes
    active_at: float

    def __repr__(self) -> str:
        return f"MacKey({self.id})"


class DataKey(msgspec.Struct, frozen=True):
    """A key for what is kept: never deleted."""

    id: int
    secret: bytes

    def derive(self, purpose: str) -> bytes:
        """Return the key of 32 bytes for one purpose, from which neither this one nor another follows."""
        return HKDF(SHA256(), DERIVED_BYTES, salt=None, info=f"authd {purpose}".encode()).derive(self.secret)

    def __repr__(self) -> str:
        return f"DataKey({self.id})"


class KeyRing:
    """The keys of this process, newest last; replaced as a whole when the stored ring changes. A clock that is behind
    every key gets the oldest: a wrong clock must not refuse every login.
    """

    def __init__(self, signing: Sequence[SigningKey], mac: Sequence[MacKey], data: Sequence[DataKey] = ()) -> None:
        self.replace(signing, mac, data)

    def replace(self, signing: Sequence[SigningKey], mac: Sequence[MacKey], data: Sequence[DataKey] = ()) -> None:
        """Take these keys in the place of all others; `data` oldest first."""
        self._signing = {key.kid: key for key in sorted(signing, key=lambda key: key.active_at)}
        self._mac = {key.id: key for key in sorted(mac, key=lambda key: key.active_at)}
        self._data = list(data)

    def signing_key(self, algorithm: Algorithm, now: float) -> SigningKey:
        """Return the newest key of the algorithm that signs at `now`, in epoch seconds of this process's clock."""
        return _newest([key for key in self._signing.values() if key.algorithm == algorithm], now)

    def mac_key(self, now: float) -> MacKey:
        """Return the newest MAC key that is in use at `now`, in epoch seconds of this process's clock."""
        return _newest(list(self._mac.values()), now)

    def digest_key(self) -> bytes:
        """Return the key of the digests in Redis, the same on every replica for the life of the deployment."""
        return self._data[0].derive("digests")

    def find_signing_key(self, kid: object) -> SigningKey | None:
        return self._signing.get(kid) if isinstance(kid, str) else None

    def find_mac_key(self, key_id: int) -> MacKey | None:
        return self._mac.get(key_id)

    def jwks(self) -> dict[str, list[dict[str, Any]]]:
        """Return the public keys (RFC 7517). A shared secret is no public key and never stands here."""
        public = [key for key in self._signing.values() if key.algorithm != "HS256"]
        return {"keys": [dict(key.key.as_dict(private=False)) for key in public]}


def _newest(keys: Sequence[TimedKey], now: float) -> TimedKey:
    return next((key for key in reversed(keys) if key.active_at <= now), keys[0])
