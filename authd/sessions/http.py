"""The endpoints of a session: refresh, logout, and the list of a user's own."""

import msgspec
from quart import Request, Response

from authd.config import Settings
from authd.errors import InvalidRequest, RefreshRefused, SessionLimit, UnknownSession, UserDisabled
from authd.infra.http.address import find_caller
from authd.infra.http.endpoint import BEARER, NO_STORE, PUBLIC, STORES_UNAVAILABLE, Endpoint, Endpoints
from authd.infra.http.reading import media_type, query_field, read_form, read_json
from authd.infra.http.replies import StatusReply, json_response
from authd.sessions.sessions import LogoutScope, Sessions, SessionView, TokenPair


class RefreshRequest(msgspec.Struct):
    refresh_token: str

    def __repr__(self) -> str:
        return "RefreshRequest(***)"


class LogoutRequest(msgspec.Struct):
    scope: LogoutScope = "all"


class SessionsReply(msgspec.Struct):
    sessions: list[SessionView]


def make_session_endpoints(settings: Settings, sessions: Sessions) -> list[Endpoint]:
    endpoint = Endpoints()

    @endpoint(
        "POST",
        "/auth/refresh_token",
        "Exchange a refresh token",
        auth=PUBLIC,
        body=RefreshRequest,
        reply=TokenPair,
        refusals=(RefreshRefused, UserDisabled, SessionLimit, *STORES_UNAVAILABLE),
        cache=NO_STORE,
    )
    async def refresh_token(request: Request) -> Response:
        body = await read_json(request, RefreshRequest)
        caller = find_caller(request, settings.trusted_proxies)
        return json_response(await sessions.refresh(body.refresh_token, caller))

    @endpoint(
        "POST",
        "/auth/logout",
        "End all sessions, or some",
        auth=BEARER,
        body=LogoutRequest,
        is_body_optional=True,
        query=LogoutRequest,
        reply=StatusReply,
    )
    async def logout(request: Request, token: str) -> Response:
        await sessions.logout(token, await read_logout_scope(request))
        return json_response(StatusReply())

    @endpoint("GET", "/auth/sessions", "Where the user is logged in", auth=BEARER, reply=SessionsReply)
    async def list_sessions(request: Request, token: str) -> Response:
        return json_response(SessionsReply(await sessions.list_own(token)))

    @endpoint(
        "DELETE",
        "/auth/sessions/<session_id>",
        "End one session of the user",
        auth=BEARER,
        reply=StatusReply,
        refusals=(UnknownSession, "not_found"),
    )
    async def end_session(request: Request, token: str, session_id: str) -> Response:
        await sessions.end(token, session_id)
        return json_response(StatusReply())

    return endpoint.declared


async def read_logout_scope(request: Request) -> LogoutScope:
    """Return the `scope` of the query, or of a JSON body or a form; `all` where there is none, and old clients send
    none.

    :raises UnsupportedMediaType, MalformedRequest, InvalidRequest:
    """
    scope = query_field(request, "scope")
    mimetype = media_type(request, "application/json") if scope is None else ""
    if mimetype == "application/x-www-form-urlencoded":
        scope = (await read_form(request)).get("scope")
    elif mimetype == "application/json" and await request.body:
        # Not by its length, which a chunked body does not tell: to overlook `current` there would end all.
        return (await read_json(request, LogoutRequest)).scope
    try:
        return msgspec.convert({} if scope is None else {"scope": scope}, LogoutRequest).scope
    except msgspec.ValidationError:
        raise InvalidRequest({"scope": "This field must be current, others or all."}) from None
