"""Register, log in, refresh, log out, who am I, and where am I logged in."""

from quart import Blueprint, Response, request

from authd.accounts.registration import Accounts
from authd.config import Settings
from authd.infra.http.address import bearer_token, find_caller
from authd.infra.http.cors import refuse_cross_site
from authd.infra.http.reading import (
    RefreshRequest,
    RegisterRequest,
    SessionsReply,
    StatusReply,
    json_response,
    read_form,
    read_json,
    read_logout_scope,
)
from authd.sessions.sessions import Sessions, TokenPair


def make_credentials(settings: Settings, accounts: Accounts, sessions: Sessions) -> Blueprint:
    routes = Blueprint("credentials", __name__, url_prefix="/auth")

    @routes.post("/register")
    async def register() -> Response:
        # A body without a type is JSON here, for old clients, and a page may send one without asking.
        refuse_cross_site(request, settings.cors_origins)
        body = await read_json(request, RegisterRequest)
        caller = find_caller(request, settings.trusted_proxies)
        profile = await accounts.register(body.username, body.password, body.full_name or "", caller.address)
        return json_response(profile, 201)

    @routes.post("/login")
    async def login() -> Response:
        refuse_cross_site(request, settings.cors_origins)
        form = await read_form(request, "username", "password")
        caller = find_caller(request, settings.trusted_proxies)
        device_token = form.get("device_token") or request.headers.get("X-Device-Token", "")
        return _tokens(await sessions.login(form["username"], form["password"], caller, device_token))

    @routes.post("/refresh_token")
    async def refresh_token() -> Response:
        body = await read_json(request, RefreshRequest)
        caller = find_caller(request, settings.trusted_proxies)
        return _tokens(await sessions.refresh(body.refresh_token, caller))

    @routes.post("/logout")
    async def logout() -> Response:
        await sessions.logout(bearer_token(request), await read_logout_scope(request))
        return json_response(StatusReply())

    @routes.get("/sessions")
    async def list_sessions() -> Response:
        return json_response(SessionsReply(await sessions.list_own(bearer_token(request))))

    @routes.delete("/sessions/<session_id>")
    async def end_session(session_id: str) -> Response:
        await sessions.end(bearer_token(request), session_id)
        return json_response(StatusReply())

    @routes.get("/me")
    async def me() -> Response:
        return json_response(await sessions.profile(bearer_token(request)))

    return routes


def _tokens(pair: TokenPair) -> Response:
    response = json_response(pair)
    response.headers["Cache-Control"] = "no-store"
    return response
