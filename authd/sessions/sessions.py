"""Opens, refreshes, lists and ends sessions.

Redis decides, in one script each; Postgres remembers every ending. `RevocationFeed` is between them: whenever a script
answers `Behind`, the missing rows are applied first and the script is asked again.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import anyio
import msgspec
import structlog

from authd.errors import (
    InvalidAccessToken,
    InvalidCredentials,
    RefreshRefusalCode,
    RefreshRefused,
    Refusal,
    SessionLimit,
    Unavailable,
    UnknownSession,
    UserDisabled,
)
from authd.events.contract import EndingReason
from authd.events.factory import iso
from authd.infra.caller import Caller
from authd.infra.encoding import decode_base64url, encode_base64url
from authd.infra.subject import Subject, bucket_of_user
from authd.sessions.endings import Endings
from authd.sessions.feed import RevocationFeed
from authd.sessions.redis import Behind, Denied, Live, LiveSession, Opened, Owner, Rotated, SessionStore
from authd.tokens.access import AccessClaims, ExpiredToken, InvalidToken, TokenMint
from authd.tokens.refresh import SESSION_ID_BYTES, RefreshToken
from authd.users.postgres import User, Users

#: Times a script is asked again: after the log was applied or read, the user read again, or the session found.
ROUNDS_MAX = 8
#: How long an answer waits for Postgres to hold what Redis has decided already; the tombstone in Redis holds anyway.
RECORD_WAIT_S = 2.0

LogoutScope = Literal["current", "others", "all"]
Answer = TypeVar("Answer")
#: Says why a subject may have no tokens now, None where it may, by its row as read just before: see login/gate.py.
Gate = Callable[[Subject, User | None], EndingReason | None]

_log = structlog.get_logger()


class TokenPair(msgspec.Struct, frozen=True, kw_only=True):
    """What a client gets. `expires_in`: seconds that the access token lives."""

    access_token: str
    refresh_token: str
    expires_in: int
    token_type: str = "bearer"  # noqa: S105

    def __repr__(self) -> str:
        return "TokenPair(***)"


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """A session as its user sees it. Times: ISO 8601 with offset."""

    id: str
    created_at: str
    last_used_at: str
    expires_at: str
    address: str
    user_agent: str
    current: bool


class Bearer(NamedTuple):
    """An authenticated access token, and its session."""

    claims: AccessClaims
    live: Live

    @property
    def subject(self) -> Subject:
        return self.claims.subject

    @property
    def cached_profile(self) -> bytes:
        return self.live.user_json


class Sessions:
    def __init__(
        self,
        mint: TokenMint,
        users: Users,
        endings: Endings,
        store: SessionStore,
        feed: RevocationFeed,
        gate: Gate,
        on_event: Callable[[int], None],
    ) -> None:
        """`on_event` is called with each bucket in which a script recorded an event."""
        self._mint = mint
        self._users = users
        self._endings = endings
        self._store = store
        self._feed = feed
        self._gate = gate
        self._on_event = on_event

    async def open(self, user: User, caller: Caller) -> TokenPair:
        """Open a session for a user who has just proved who it is, by this row.

        :raises InvalidCredentials: when by now the user may have no tokens, or has another password.
        :raises SessionLimit: only with the policy `refuse`.
        :raises Unavailable:
        """
        session_id = secrets.token_bytes(SESSION_ID_BYTES)
        bucket = bucket_of_user(user.id)
        for _ in range(ROUNDS_MAX):
            if self._gate(user.subject, user) is not None:
                raise InvalidCredentials
            self._feed.learn(bucket, user.revocation)
            open_session = partial(self._store.open, _owner(user), session_id, self._mint.mac_key_id(), caller)
            answer = await self._ask(bucket, open_session)
            if isinstance(answer, Opened):
                self._on_event(bucket)
                await self._record(user.subject, answer.evicted, "evicted")
                return self._pair(user.subject, answer.session)
            if answer.status == "refused":
                raise SessionLimit
            if answer.status == "ended":
                # Opened by a run whose reply did not count, and evicted since: this login begins anew.
                session_id = secrets.token_bytes(SESSION_ID_BYTES)
                continue
            # All sessions ended while the password was hashed. What was verified may be an old password: its version
            # tells, and not the hash, which a parallel login may have renewed.
            fresh = await self._users.find(*user.subject)
            if fresh is None or fresh.password_version != user.password_version:
                raise InvalidCredentials
            user = fresh
        raise Unavailable("session_store")

    async def refresh(self, refresh_token: str, caller: Caller) -> TokenPair:
        """Exchange a refresh token for its successor, once; see session_rotate.lua.

        :raises RefreshRefused:
        :raises UserDisabled: also when the user is deleted.
        :raises SessionLimit: only with the policy `refuse`, for a session that Redis lost: others took its place.
        :raises Unavailable:
        """
        try:
            token = await self.identify(self._mint.read_refresh(refresh_token))
        except ExpiredToken:
            raise RefreshRefused("refresh_token_expired") from None
        except InvalidToken:
            raise RefreshRefused("refresh_token_invalid") from None
        if token is None:
            raise UserDisabled
        bucket = bucket_of_user(token.user_id)
        for _ in range(ROUNDS_MAX):
            key_id = self._mint.mac_key_id()
            rotate = partial(self._store.rotate, token, key_id, caller)
            answer: Rotated | Opened | Denied = await self._ask(bucket, rotate)
            if isinstance(answer, Denied) and answer.status == "unknown":
                answer = await self._rebuild(token, key_id, caller)
            if not isinstance(answer, Denied):
                return self._pair(token.subject, answer.session)
            if answer.status != "present":
                raise await self._refusal(token, answer)
        raise Unavailable("session_store")

    async def identify(self, token: RefreshToken) -> RefreshToken | None:
        """Return the token with its user's incarnation, for which Postgres is asked where the token is of before there
        were any; None where its user is deleted.

        :raises Unavailable:
        """
        if token.incarnation:
            return token
        user = await self._users.find(token.user_id, None)
        # An id that was given twice: what was opened before this user registered is another one's.
        if user is None or token.created_ms < user.registered_ms:
            return None
        return msgspec.structs.replace(token, incarnation=user.incarnation)

    async def list_own(self, access_token: str) -> list[SessionView]:
        """Return the live sessions of the token's user, oldest first.

        :raises InvalidAccessToken, Unavailable:
        """
        claims, _ = await self.authenticate(access_token)
        return [_view(session, claims.session_id) for session in await self._list(claims.subject)]

    async def end(self, access_token: str, session_id: str) -> None:
        """End one live session of the token's user.

        :raises UnknownSession: also for one that has ended, or that is somebody else's.
        :raises InvalidAccessToken, Unavailable: see `logout`.
        """
        claims, _ = await self.authenticate(access_token)
        wanted = decode_base64url(session_id)
        if wanted is None or all(session.id != wanted for session in await self._list(claims.subject)):
            raise UnknownSession
        await self.end_logged(claims.subject, [wanted], "logout")

    async def logout(self, access_token: str, scope: LogoutScope) -> None:
        """End the token's session, its user's others, or all. When this returns, Postgres holds it and Redis has
        applied it: no replica accepts a token of theirs.

        :raises InvalidAccessToken:
        :raises Unavailable: also when only Redis has not applied it yet: it will before it serves that user again.
        """
        claims, _ = await self.authenticate(access_token)
        if scope == "current":
            await self.end_logged(claims.subject, [claims.session_id], "logout")
            return
        if scope == "all":
            row = await self._endings.end_all(claims.subject, "logout")
            if row is not None:
                await self._feed.wait_applied(row.bucket, row.number)
                return
        # Each by itself, also all of a user whose row is deleted: there is no epoch to raise.
        live = [session.id for session in await self._list(claims.subject)]
        ended = [id_ for id_ in live if scope == "all" or id_ != claims.session_id]
        if ended:
            await self.end_logged(claims.subject, ended, "logout")

    async def end_logged(self, subject: Subject, session_ids: Sequence[bytes], reason: EndingReason) -> None:
        """End sessions: first in the log, then in Redis."""
        row = await self._endings.end_sessions(subject, session_ids, reason)
        await self._feed.wait_applied(row.bucket, row.number)

    async def end_of_token(self, token: RefreshToken, reason: EndingReason) -> None:
        """End the session of an identified refresh token, also where Redis has lost it, or the user is deleted; no
        second row where the log has its end.
        """
        user, ended = await self._users.find_of_session(token.subject, token.session_id)
        if user is None:
            is_alive = await self.find_live(token.subject, token.session_id) is not None
        else:
            is_alive = ended is None and user.epoch == token.epoch
        if is_alive:
            await self.end_logged(token.subject, [token.session_id], reason)
        elif user is not None:
            # A request that is repeated after a 503 succeeds only when Redis, too, has applied the row.
            await self._feed.wait_applied(bucket_of_user(user.id), user.revocation)

    async def find_live(self, subject: Subject, session_id: bytes) -> Live | None:
        """Return the session, None where it has ended or Redis does not know it."""
        answer = await self._ask(bucket_of_user(subject.user_id), partial(self._store.inspect, subject, session_id))
        return answer if isinstance(answer, Live) else None

    async def authenticate(self, access_token: str) -> Bearer:
        """Return what a valid access token of a live session says.

        :raises InvalidAccessToken, Unavailable:
        """
        try:
            claims = self._mint.read_access(access_token)
        except InvalidToken:
            raise InvalidAccessToken from None
        # A session that Redis does not know is dead to an access token: it rebuilds nothing, since in HS256 mode every
        # downstream service could forge one.
        live = await self.find_live(claims.subject, claims.session_id)
        if live is None:
            raise InvalidAccessToken
        return Bearer(claims, live)

    async def _list(self, subject: Subject) -> list[LiveSession]:
        return await self._ask(bucket_of_user(subject.user_id), partial(self._store.list_live, subject))

    async def _rebuild(self, token: RefreshToken, key_id: int, caller: Caller) -> Opened | Denied:
        """Put back a session that Redis lost, if Postgres has not ended it."""
        user, ended = await self._users.find_of_session(token.subject, token.session_id)
        reason: str | None = self._gate(token.subject, user)
        if reason is None and user is not None:
            reason = ended if ended or user.epoch == token.epoch else "logout"
        if reason is not None or user is None:
            await self._store.bury(token, reason or "")
            return Denied("ended", reason or "")
        bucket = bucket_of_user(user.id)
        self._feed.learn(bucket, user.revocation)
        answer = await self._ask(bucket, partial(self._store.rebuild, _owner(user), token, key_id, caller))
        if isinstance(answer, Opened):
            _log.info("session_rebuilt", user_id=user.id)
            self._on_event(bucket)
            await self._record(user.subject, answer.evicted, "evicted")
        return answer

    async def _refusal(self, token: RefreshToken, denied: Denied) -> Refusal:
        if denied.status == "refused":
            return SessionLimit()
        if denied.status in ("reused", "evicted"):
            self._on_event(bucket_of_user(token.user_id))
            await self._record(token.subject, [token.session_id], denied.status)
        if denied.status in ("ended", "stale"):
            return (
                UserDisabled()
                if denied.reason in ("user_disabled", "user_deleted")
                else RefreshRefused(_ENDED.get(denied.reason, "session_ended"))
            )
        return RefreshRefused(_REFUSED[denied.status])

    async def _record(self, subject: Subject, session_ids: list[bytes], reason: EndingReason) -> None:
        """Log what Redis ended, before the answer if Postgres is there."""
        with anyio.move_on_after(RECORD_WAIT_S) as waiting:
            await self._feed.record(subject, session_ids, reason)
        if waiting.cancelled_caught:
            _log.warning("ending_not_logged_yet", user_id=subject.user_id, reason=reason, sessions=len(session_ids))

    async def _ask(self, bucket: int, ask: Callable[[int], Awaitable[Answer]]) -> Answer:
        """Ask a script with the highest revocation number that this replica knows."""
        for _ in range(ROUNDS_MAX):
            generation = await self._feed.ensure_heads_known()
            try:
                answer = await ask(self._feed.head(bucket))
            except Behind as behind:
                await self._feed.catch_up(bucket, behind.applied)
                continue
            if generation == self._store.generation:
                return answer
            # Another server has answered, which may lack rows that are not known here: read them and ask again. A
            # script that runs twice changes nothing the second time.
        raise Unavailable("session_store")

    def _pair(self, subject: Subject, session: LiveSession) -> TokenPair:
        token = RefreshToken(
            key_id=session.key_id,
            user_id=subject.user_id,
            incarnation=subject.incarnation,
            session_id=session.id,
            epoch=session.epoch,
            counter=session.counter,
            created_ms=session.created_ms,
            issued_ms=session.issued_ms,
            expires_ms=session.expires_ms,
            authenticated_s=session.authenticated_s,
            factors=session.factors,
            kind=session.kind,
        )
        token_id = encode_base64url(secrets.token_bytes(16))
        return TokenPair(
            access_token=self._mint.make_access(subject, session.id, session.epoch, token_id),
            refresh_token=self._mint.make_refresh(token),
            expires_in=self._mint.access_ttl_s,
        )


def _owner(user: User) -> Owner:
    return Owner(user.subject, user.epoch, user.registered_ms)


def _view(session: LiveSession, current: bytes) -> SessionView:
    return SessionView(
        id=encode_base64url(session.id),
        created_at=iso(session.created_ms),
        last_used_at=iso(session.issued_ms),
        expires_at=iso(session.expires_ms),
        address=session.caller.address,
        user_agent=session.caller.user_agent,
        current=session.id == current,
    )


_ENDED: dict[str, RefreshRefusalCode] = {"evicted": "session_evicted", "reused": "refresh_token_reused"}
_REFUSED: dict[str, RefreshRefusalCode] = {
    "superseded": "refresh_token_superseded",
    "reused": "refresh_token_reused",
    "evicted": "session_evicted",
    "expired": "refresh_token_expired",
}
