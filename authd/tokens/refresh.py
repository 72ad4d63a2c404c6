"""Refresh tokens: ``v2.`` and base64url of these big-endian fields and their HMAC-SHA-256.

    MAC key id u32 | user id u64 | incarnation u32 | session id 16 bytes | epoch u32 | counter u64
    | created, issued, expires u64 ms | authenticated u32 s | factors u8 | kind u8 | two zero bytes

So junk is refused with no I/O, every key in Redis follows from the token, and nothing stored can be turned into one.
Equal fields give equal bytes: that is how a repeated refresh gets the same successor. For the same reason the time and
the factors of the login never change in a session.

Tokens ``v1.`` of before are read and no longer made: they lack the incarnation and all that comes after `expires`.
Pure: no I/O.
"""

from collections.abc import Callable

import msgspec

from authd.infra.subject import Subject
from authd.tokens.mac import MacToken

SESSION_ID_BYTES = 16
#: What a session's login proved, in bits, and what the session is. Each has a place for what later versions add.
PASSWORD_FACTOR = 1
USER_KIND = 1

_REFRESH_V1 = MacToken("v1.", "Q16sIQQQQ")
_REFRESH = MacToken("v2.", "QI16sIQQQQIBBxx", purpose="refresh")


class RefreshToken(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a refresh token. `*_ms`: milliseconds of Redis's clock since the epoch; `authenticated_s`: seconds
    of it, when the login was. An incarnation of 0, which no user has, is that of a token from before there were any.
    """

    key_id: int
    user_id: int
    incarnation: int
    session_id: bytes
    epoch: int
    counter: int
    created_ms: int
    issued_ms: int
    expires_ms: int
    authenticated_s: int
    factors: int = PASSWORD_FACTOR
    kind: int = USER_KIND

    @property
    def subject(self) -> Subject:
        return Subject(self.user_id, self.incarnation)


def make_refresh_token(token: RefreshToken, secret: bytes) -> str:
    """Return the text of a token: the same bytes for the same fields. `secret`: that of its MAC key."""
    return _REFRESH.make(
        token.key_id,
        secret,
        token.user_id,
        token.incarnation,
        token.session_id,
        token.epoch,
        token.counter,
        token.created_ms,
        token.issued_ms,
        token.expires_ms,
        token.authenticated_s,
        token.factors,
        token.kind,
    )


def read_refresh_token(text: str, find_secret: Callable[[int], bytes | None]) -> RefreshToken | None:
    """Return the fields of a token of ours, expired or not; None for any other text."""
    if fields := _REFRESH.read(text, find_secret):
        return RefreshToken(**dict(zip(RefreshToken.__struct_fields__, fields, strict=True)))
    if fields := _REFRESH_V1.read(text, find_secret):
        return _of_v1(*fields)
    return None


def _of_v1(
    key_id: int,
    user_id: int,
    session_id: bytes,
    epoch: int,
    counter: int,
    created_ms: int,
    issued_ms: int,
    expires_ms: int,
) -> RefreshToken:
    """Return a token of before, whose session was opened by the login, with a password: there was nothing else."""
    return RefreshToken(
        key_id=key_id,
        user_id=user_id,
        incarnation=0,
        session_id=session_id,
        epoch=epoch,
        counter=counter,
        created_ms=created_ms,
        issued_ms=issued_ms,
        expires_ms=expires_ms,
        authenticated_s=created_ms // 1000,
    )
