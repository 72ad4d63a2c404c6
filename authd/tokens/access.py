"""Access tokens: made and read. Pure: no I/O, the clock is an argument."""

import re
import time
from typing import Any, TypeGuard

import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import Key
from joserfc.jws import JWSRegistry

from authd.infra.clocks import Clock
from authd.infra.encoding import decode_base64url, encode_base64url
from authd.infra.subject import Subject
from authd.tokens.refresh import SESSION_ID_BYTES, RefreshToken, make_refresh_token, read_refresh_token
from authd.tokens.ring import Algorithm, KeyRing, SigningKey

ACCESS_TOKEN_CHARS_MAX = 4096


#: How far the clocks of replicas may be apart: a token that is issued later than that from now is a forgery.
CLOCKS_APART_S = 300


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


class MintSettings(msgspec.Struct, frozen=True):
    jwt_algorithm: Algorithm
    issuer: str
    audience: str
    access_ttl_s: int


class TokenMint:
    """Makes and proves tokens with the key ring."""

    def __init__(self, settings: MintSettings, ring: KeyRing, clock: Clock = time.time) -> None:
        self._ring = ring
        self._clock = clock
        self._algorithm: Algorithm = settings.jwt_algorithm
        self._issuer = settings.issuer
        self._audience = settings.audience
        self.access_ttl_s = settings.access_ttl_s

    def mac_key_id(self) -> int:
        """Return the key that refresh tokens are made with now."""
        return self._ring.mac_key(self._clock()).id

    def make_access(self, subject: Subject, session_id: bytes, epoch: int, token_id: str) -> str:
        """Return a signed access token. `token_id` becomes `jti`; `epoch` lets a service that never asks authd tell
        tokens of before an ending of all sessions from those of after it.
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
        """Return the claims of an access token of ours.

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
        """Return the text of a refresh token: the same bytes for the same fields."""
        secret = self._find_secret(token.key_id)
        if secret is None:
            raise InvalidToken
        return make_refresh_token(token, secret)

    def read_refresh(self, text: str) -> RefreshToken:
        """Return the fields of a refresh token of ours.

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


def _lower_s(signature: bytes) -> bytes:
    """Of the two ES256 signatures of a text with the same r the one with the lower s."""
    r, s = signature[:32], int.from_bytes(signature[32:])
    return r + min(s, _P256_ORDER - s).to_bytes(32)


def _is_time(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
