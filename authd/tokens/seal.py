"""Makes keys, and seals them under the master secret for Postgres. Pure: no I/O."""

from typing import Any

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, Key, OctKey, OKPKey

from authd.config import SECRET_BYTES_MIN, Secret
from authd.tokens.access import InvalidToken
from authd.tokens.ring import Algorithm, SigningKey

_SHARED_KID = "shared"


class KeySeal:
    """Seals keys under the master secret for storage (JWE, A256GCM); opens what it or the previous secret sealed."""

    def __init__(self, secret: Secret, previous: Secret) -> None:
        self._keys = [_sealing_key(part) for part in (secret, previous) if part]

    def seal(self, plain: bytes, *, label: str) -> str:
        """`label` says what is sealed and is authenticated with it: rows cannot be swapped for one another."""
        return jwe.encrypt_compact({"alg": "dir", "enc": "A256GCM", "kid": label}, plain, self._keys[0])

    def open(self, sealed: str, *, label: str) -> bytes:
        """Return what was sealed.

        :raises InvalidToken: when no master secret opens it, or it was sealed under another label.
        """
        for key in self._keys:
            plain = _open_seal(key, sealed, label)
            if plain is not None:
                return plain
        raise InvalidToken

    def reseal(self, sealed: str, *, label: str) -> str | None:
        """Return the text sealed under the present secret, None where it is so already or none opens it."""
        if _open_seal(self._keys[0], sealed, label) is not None:
            return None
        try:
            return self.seal(self.open(sealed, label=label), label=label)
        except InvalidToken:
            return None


def _open_seal(key: OctKey, sealed: str, label: str) -> bytes | None:
    try:
        opened = jwe.decrypt_compact(sealed, key, algorithms=["dir", "A256GCM"])
    except (JoseError, ValueError):
        return None
    return opened.plaintext if opened.headers().get("kid") == label else None


def generate_signing_key(algorithm: Algorithm, kid: str) -> bytes:
    """Return a new private key as JWK JSON."""
    parameters = {"kid": kid, "use": "sig", "alg": algorithm}
    if algorithm == "ES256":
        made: Key = ECKey.generate_key("P-256", parameters, private=True)  # type: ignore[arg-type]
    else:
        made = OKPKey.generate_key("Ed25519", parameters, private=True)  # type: ignore[arg-type]
    return msgspec.json.encode(made.as_dict(private=True))


def load_signing_key(text: bytes, *, kid: str, algorithm: Algorithm, active_at: float) -> SigningKey:
    kind = ECKey if algorithm == "ES256" else OKPKey
    return SigningKey(kid, algorithm, kind.import_key(msgspec.json.decode(text, type=dict[str, Any])), active_at)


def shared_signing_key(secret: Secret) -> SigningKey:
    """Return the HS256 key that existing services hold too."""
    return SigningKey(_SHARED_KID, "HS256", OctKey.import_key(secret.reveal().encode()), 0.0)


def _sealing_key(secret: Secret) -> OctKey:
    derived = HKDF(SHA256(), SECRET_BYTES_MIN, salt=None, info=b"authd key ring v1").derive(secret.reveal().encode())
    return OctKey.import_key(derived)
