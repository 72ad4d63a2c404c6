"""Brings the stored key ring into the process: made once, sealed, agreed upon by all replicas."""

import secrets

from authd.config import Settings
from authd.postgres.keys import Keys, NewKey, StoredKey
from authd.tokens import (
    Algorithm,
    InvalidToken,
    KeyRing,
    KeySeal,
    MacKey,
    generate_signing_key,
    load_signing_key,
    shared_signing_key,
)

MAC_KEY_BYTES = 32
_MAC = "mac"


class SealedByAnotherSecret(Exception):
    """AUTHD_SECRET is not the one that the stored keys were sealed under."""


async def load_key_ring(settings: Settings, keys: Keys) -> KeyRing:
    """The ring from Postgres, with a first key of each purpose where there is none.

    :raises SealedByAnotherSecret:
    :raises Unavailable:
    """
    seal = KeySeal(settings.secret, settings.secret_previous)
    stored = await keys.load()
    wanted: list[Algorithm | str] = [_MAC]
    if settings.jwt_algorithm != "HS256":
        wanted.append(settings.jwt_algorithm)
    missing = [purpose for purpose in wanted if purpose not in {key.purpose for key in stored}]
    if missing:
        stored = await keys.ensure([_make(purpose, seal) for purpose in missing])
    return _open_ring(settings, stored, seal)


def _make(purpose: str, seal: KeySeal) -> NewKey:
    kid = secrets.token_hex(8)
    plain = secrets.token_bytes(MAC_KEY_BYTES) if purpose == _MAC else generate_signing_key(purpose, kid)  # type: ignore[arg-type]
    return NewKey(purpose, kid, seal.seal(plain, label=_label(purpose, kid)))


def _label(purpose: str, kid: str) -> str:
    return f"{purpose}/{kid}"


def _open_ring(settings: Settings, stored: list[StoredKey], seal: KeySeal) -> KeyRing:
    signing, mac = [], []
    for key in stored:
        try:
            plain = seal.open(key.sealed, label=_label(key.purpose, key.kid))
        except InvalidToken:
            raise SealedByAnotherSecret(
                f"Key {key.kid} was sealed under another AUTHD_SECRET. Set that one as AUTHD_SECRET_PREVIOUS."
            ) from None
        active_at = key.active_at.timestamp()
        if key.purpose == _MAC:
            mac.append(MacKey(key.id, plain, active_at))
        else:
            algorithm: Algorithm = key.purpose  # type: ignore[assignment]
            signing.append(load_signing_key(plain, kid=key.kid, algorithm=algorithm, active_at=active_at))
    if settings.jwt_algorithm == "HS256":
        signing.append(shared_signing_key(settings.jwt_secret))
    return KeyRing(signing, mac)
