"""Service clients: who may ask whether a token is active (RFC 7662) and revoke one (RFC 7009)."""

import hashlib
import hmac
import secrets
from collections import OrderedDict
from typing import Any

import anyio
import msgspec

from authd.base64url import encode_base64url
from authd.errors import InvalidAccessToken, InvalidClient, Unavailable
from authd.postgres.clients import Clients
from authd.refresh_tokens import RefreshToken
from authd.sessions import Sessions
from authd.tokens import InvalidToken, TokenMint

#: How long a client's registration is believed without asking Postgres: the longest life of a removed client.
FRESH_S = 10.0
#: How long it is believed while Postgres is away.
STALE_S = 3600.0
KNOWN_CLIENTS_MAX = 1000
_CLIENT_ID_CHARS_MAX = 128


class NewClient(msgspec.Struct, frozen=True):
    """A registration. The secret is shown once and kept nowhere."""

    client_id: str
    secret: str

    def __repr__(self) -> str:
        return f"NewClient({self.client_id!r})"


class ClientRegistry:
    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._known: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    async def add(self, name: str) -> NewClient:
        client = NewClient(secrets.token_hex(8), secrets.token_urlsafe(32))
        await self._clients.insert(client.client_id, name, _digest(client.secret))
        return client

    async def authenticate(self, client_id: str | None, secret: str | None) -> None:
        """:raises InvalidClient, Unavailable:"""
        if not client_id or not secret or len(client_id) > _CLIENT_ID_CHARS_MAX or "\0" in client_id:
            raise InvalidClient
        expected = await self._find_hash(client_id)
        if expected is None or not hmac.compare_digest(expected, _digest(secret)):
            raise InvalidClient

    async def _find_hash(self, client_id: str) -> bytes | None:
        now = anyio.current_time()
        known = self._known.get(client_id)
        if known is not None and now - known[1] < FRESH_S:
            return known[0]
        try:
            found = await self._clients.find_secret_hash(client_id)
        except Unavailable:
            if known is not None and now - known[1] < STALE_S:
                return known[0]
            raise
        if found is None:
            self._known.pop(client_id, None)
            return None
        self._known[client_id] = (found, now)
        self._known.move_to_end(client_id)
        if len(self._known) > KNOWN_CLIENTS_MAX:
            self._known.popitem(last=False)
        return found


class TokenDesk:
    """Answers what services ask about tokens. Which kind a token is shows in its form: the hint is not needed."""

    def __init__(self, mint: TokenMint, sessions: Sessions) -> None:
        self._mint = mint
        self._sessions = sessions

    async def introspect(self, token: str) -> dict[str, Any]:
        """RFC 7662: what the token says, or only that it is not active.

        :raises Unavailable:
        """
        return await self._introspect_access(token) or await self._introspect_refresh(token) or {"active": False}

    async def revoke(self, token: str) -> None:
        """RFC 7009: end the token's session. A token that is nothing to us is no error.

        :raises Unavailable:
        """
        refresh = await self._read_refresh(token)
        if refresh is not None:
            await self._sessions.end_of_token(refresh, "revoked")
            return
        try:
            claims, _ = await self._sessions.authenticate(token)
        except InvalidAccessToken:
            return
        await self._sessions.end_logged(claims.subject, [claims.session_id], "revoked")

    async def _introspect_access(self, token: str) -> dict[str, Any] | None:
        try:
            claims, live = await self._sessions.authenticate(token)
        except InvalidAccessToken:
            return None
        return {
            "active": True,
            "token_type": "Bearer",
            "sub": str(claims.user_id),
            "inc": claims.subject.incarnation,
            "sid": encode_base64url(claims.session_id),
            "epoch": live.session.epoch,
            "exp": claims.expires_at,
            "iat": claims.issued_at,
            "jti": claims.token_id,
            "iss": claims.issuer,
            **({"aud": claims.audience} if claims.audience else {}),
        }

    async def _introspect_refresh(self, token: str) -> dict[str, Any] | None:
        refresh = await self._read_refresh(token)
        if refresh is None:
            return None
        live = await self._sessions.find_live(refresh.subject, refresh.session_id)
        # Only the newest of a session: an older one is at best repeated.
        if live is None or live.session.counter != refresh.counter or live.session.epoch != refresh.epoch:
            return None
        return {
            "active": True,
            "token_type": "refresh_token",
            "sub": str(refresh.user_id),
            "inc": refresh.incarnation,
            "sid": encode_base64url(refresh.session_id),
            "exp": refresh.expires_ms // 1000,
            "iat": refresh.issued_ms // 1000,
        }

    async def _read_refresh(self, token: str) -> RefreshToken | None:
        try:
            return await self._sessions.identify(self._mint.read_refresh(token))
        except InvalidToken:
            return None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
