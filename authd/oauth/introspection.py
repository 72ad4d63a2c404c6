"""Answers what services ask about tokens (RFC 7662, RFC 7009)."""

from typing import Any

from authd.errors import InvalidAccessToken
from authd.infra.encoding import encode_base64url
from authd.sessions.sessions import Sessions
from authd.tokens.access import InvalidToken, TokenMint
from authd.tokens.refresh import RefreshToken


class TokenDesk:
    """Answers what services ask about tokens. Which kind a token is shows in its form: the hint is not needed."""

    def __init__(self, mint: TokenMint, sessions: Sessions) -> None:
        self._mint = mint
        self._sessions = sessions

    async def introspect(self, token: str) -> dict[str, Any]:
        """Return what the token says (RFC 7662), or only that it is not active.

        :raises Unavailable:
        """
        return await self._introspect_access(token) or await self._introspect_refresh(token) or {"active": False}

    async def revoke(self, token: str) -> None:
        """End the token's session (RFC 7009). A token that authd did not make is no error.

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
