"""Access tokens, and the key ring that makes and proves all tokens. Pure: no I/O, the clock is an argument."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeGuard, TypeVar

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from joserfc import jwe, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, Key, OctKey, OKPKey
from joserfc.jws import JWSRegistry

from authd.base64url import decode_base64url, encode_base64url
from authd.clocks import Clock
from authd.config import SECRET_BYTES_MIN, Secret, Settings
from authd.mac_tokens import Subject
from authd.refresh_tokens import SESSION_ID_BYTES, RefreshToken, make_refresh_token, read_refresh_token

Algorithm = Literal["ES256", "Ed25519", "HS256"]
TimedKey = TypeVar("TimedKey", "SigningKey", "MacKey")

DERIVED_BYTES = 32
ACCESS_TOKEN_CHARS_MAX = 4096

#: How far the clocks of replicas may be apart: a token that is issued later than that from now is a forgery.
CLOCKS_APART_S = 300
_SHARED_KID = "shared"
#: Old services accept any HS256 token whose type is the plain one; others get the type of RFC 9068.
_TYPES: dict[Algorithm, str] = {"ES256": "at+jwt", "Ed25519": "at+jwt", "HS256": "JWT"}
_SIGNERS = {name: JWSRegistry.algorithms[name] for name in _TYPES}
_USER_ID = re.compile(r"[1-9][0-9]{0,18}")
_USER_ID_MAX = 2**63 - 1
_INCARNATION_MAX = 2**32 - 1
#: The order of P-256's group (FIPS 186-5). Beside a signature (r, s) there is (r, order - s) for the same text.
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class InvalidToken(Exception):
    """The token is not one of ours, or no longer valid."""


class ExpiredToken(InvalidToken):
    """The token was ours, and its time is over."""


class AccessClaims(msgspec.Struct, frozen=True):
    """What a valid access token says. Times in seconds since the epoch; `audience` may be empty."""

    subject: Subject
    session_id: bytes
    token_id: str
    issuer: str
    audience: str
    issued_at: int
    expires_at: int

    @property
    def user_id(self) -> int:
        return self.subject.user_id


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
        """The public keys (RFC 7517). A shared secret is no public key and never stands here."""
        public = [key for key in self._signing.values() if key.algorithm != "HS256"]
        return {"keys": [dict(key.key.as_dict(private=False)) for key in public]}


class TokenMint:
    """Makes and proves tokens with the key ring."""

    def __init__(self, settings: Settings, ring: KeyRing, clock: Clock = time.time) -> None:
        self._ring = ring
        self._clock = clock
        self._algorithm: Algorithm = settings.jwt_algorithm
        self._issuer = settings.issuer
        self._audience = settings.audience
        self.access_ttl_s = settings.access_ttl_s

    def mac_key_id(self) -> int:
        """The key that refresh tokens are made with now."""
        return self._ring.mac_key(self._clock()).id

    def make_access(self, subject: Subject, session_id: bytes, epoch: int, token_id: str) -> str:
        """A signed access token. `token_id` becomes `jti`; `epoch` lets a service that never asks authd tell tokens of
        before an ending of all sessions from those of after it.
        """
        now = self._clock()
        key = self._ring.signing_key(self._algorithm, now)
        claims: dict[str, Any] = {
            "iss": self._issuer,
            "sub": str(subject.user_id),
            "inc": subject.incarnation,
            "sid": encode_base64url(session_id),
            "epoch": epoch,
            "jti": token_id,
            "iat": int(now),
            "exp": int(now) + self.access_ttl_s,
        }
        if self._audience:
            claims["aud"] = self._audience
        header = {"typ": _TYPES[key.algorithm], "alg": key.algorithm, "kid": key.kid}
        # Not by `jwt.encode`, which checks a header and claims that we wrote ourselves, at the cost of the signature.
        signed = ".".join(encode_base64url(msgspec.json.encode(part)) for part in (header, claims))
        signature = _SIGNERS[key.algorithm].sign(signed.encode(), key.key)
        if key.algorithm == "ES256":
            signature = _lower_s(signature)
        return f"{signed}.{encode_base64url(signature)}"

    def read_access(self, text: str) -> AccessClaims:
        """The claims of an access token of ours.

        :raises ExpiredToken: when only its time is over.
        :raises InvalidToken: otherwise.
        """
        if len(text) > ACCESS_TOKEN_CHARS_MAX:
            raise InvalidToken
        try:
            # The key is found by `kid`, and the algorithm allowed is the key's own: a header that says another one
            # (`none`, or HS256 over a public key) is refused before any signature is computed.
            found: list[SigningKey] = []

            def key_of(token: Any) -> Key:
                key = self._ring.find_signing_key(token.headers().get("kid"))
                if key is None or token.headers().get("alg") != key.algorithm:
                    raise InvalidToken
                found.append(key)
                return key.key

            token = jwt.decode(text, key_of, algorithms=["ES256", "Ed25519", "HS256"])
        except (JoseError, ValueError, TypeError, RecursionError):
            raise InvalidToken from None
        if token.header.get("typ") != _TYPES[found[0].algorithm]:
            raise InvalidToken
        if found[0].algorithm == "ES256":
            signature = decode_base64url(text.rpartition(".")[2])
            # The other signature of the same text would be a second text of one token.
            if signature is None or signature != _lower_s(signature):
                raise InvalidToken
        return self._claims(token.claims)

    def _claims(self, claims: dict[str, Any]) -> AccessClaims:
        subject, session = claims.get("sub"), claims.get("sid")
        issued, expires = claims.get("iat"), claims.get("exp")
        if claims.get("iss") != self._issuer or (self._audience and claims.get("aud") != self._audience):
            raise InvalidToken
        if not isinstance(subject, str) or not _USER_ID.fullmatch(subject) or int(subject) > _USER_ID_MAX:
            raise InvalidToken
        incarnation = claims.get("inc")
        if not isinstance(incarnation, int) or isinstance(incarnation, bool) or not 0 < incarnation <= _INCARNATION_MAX:
            raise InvalidToken
        if not isinstance(session, str) or not _is_time(issued) or not _is_time(expires):
            raise InvalidToken
        # Whoever holds the secret of HS256 could sign a token for ever.
        if expires - issued > self.access_ttl_s or issued > self._clock() + CLOCKS_APART_S:
            raise InvalidToken
        session_id = decode_base64url(session)
        if session_id is None or len(session_id) != SESSION_ID_BYTES:
            raise InvalidToken
        if not expires > self._clock():
            raise ExpiredToken
        return AccessClaims(
            subject=Subject(int(subject), incarnation),
            session_id=session_id,
            token_id=str(claims.get("jti", "")),
            issuer=self._issuer,
            audience=self._audience,
            issued_at=int(issued),
            expires_at=int(expires),
        )

    def make_refresh(self, token: RefreshToken) -> str:
        """The text of a refresh token: the same bytes for the same fields."""
        secret = self._find_secret(token.key_id)
        if secret is None:
            raise InvalidToken
        return make_refresh_token(token, secret)

    def read_refresh(self, text: str) -> RefreshToken:
        """The fields of a refresh token of ours.

        :raises ExpiredToken: when only its time is over.
        :raises InvalidToken: otherwise.
        """
        token = read_refresh_token(text, self._find_secret)
        if token is None:
            raise InvalidToken
        if token.expires_ms <= self._clock() * 1000:
            raise ExpiredToken
        return token

    def _find_secret(self, key_id: int) -> bytes | None:
        key = self._ring.find_mac_key(key_id)
        return None if key is None else key.secret


class KeySeal:
    """Seals keys under the master secret for storage (JWE, A256GCM); opens what it or the previous secret sealed."""

    def __init__(self, secret: Secret, previous: Secret) -> None:
        self._keys = [_sealing_key(part) for part in (secret, previous) if part]

    def seal(self, plain: bytes, *, label: str) -> str:
        """`label` says what is sealed and is authenticated with it: rows cannot be swapped for one another."""
        return jwe.encrypt_compact({"alg": "dir", "enc": "A256GCM", "kid": label}, plain, self._keys[0])

    def open(self, sealed: str, *, label: str) -> bytes:
        """:raises InvalidToken: when no master secret opens it, or it was sealed under another label."""
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
    """A new private key as JWK JSON."""
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
    """The HS256 key that existing services hold too."""
    return SigningKey(_SHARED_KID, "HS256", OctKey.import_key(secret.reveal().encode()), 0.0)


def _lower_s(signature: bytes) -> bytes:
    """Of the two ES256 signatures of a text with the same r the one with the lower s."""
    r, s = signature[:32], int.from_bytes(signature[32:])
    return r + min(s, _P256_ORDER - s).to_bytes(32)


def _newest(keys: Sequence[TimedKey], now: float) -> TimedKey:
    return next((key for key in reversed(keys) if key.active_at <= now), keys[0])


def _is_time(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53


def _sealing_key(secret: Secret) -> OctKey:
    derived = HKDF(SHA256(), SECRET_BYTES_MIN, salt=None, info=b"authd key ring v1").derive(secret.reveal().encode())
    return OctKey.import_key(derived)
