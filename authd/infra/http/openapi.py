"""The description of every endpoint (OpenAPI 3.1): one table, and the structs that the endpoints themselves use."""

from collections import defaultdict
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from prometheus_client import CONTENT_TYPE_LATEST
from quart import Blueprint, Response

from authd import __version__
from authd.accounts.registration import FULL_NAME_CHARS_MAX
from authd.config import Settings
from authd.infra.http.problems import MEDIA_TYPE, PROBLEMS
from authd.infra.http.reading import (
    LogoutRequest,
    RefreshRequest,
    RegisterRequest,
    SessionsReply,
    StatusReply,
    json_response,
)
from authd.infra.observe.health import Report
from authd.passwords.formats import PASSWORD_BYTES_MAX, PASSWORD_CHARS_MIN
from authd.sessions.sessions import LoginPair, LogoutScope, TokenPair
from authd.users.profile import Profile
from authd.users.usernames import USERNAME_CHARS_MAX

OPENAPI_MAX_AGE_S = 300

_JSON = "application/json"
_FORM = "application/x-www-form-urlencoded"
_TEXT = CONTENT_TYPE_LATEST.partition(";")[0]


# What is answered or read without a struct of its own


class FieldError(msgspec.Struct):
    field: str
    detail: str


class Problem(msgspec.Struct):
    """Every refusal (RFC 9457). Clients may branch on `code`; `detail` is for people. `error`: as RFC 6749 has it."""

    type: Annotated[str, Meta(pattern="^urn:authd:problem:")]
    title: str
    status: int
    detail: str
    code: str
    error: str | UnsetType = UNSET
    errors: list[FieldError] | UnsetType = UNSET


class LoginForm(msgspec.Struct):
    """The password grant of OAuth 2. What is optional here is not looked at."""

    username: Annotated[str, Meta(min_length=1)]
    password: Annotated[str, Meta(min_length=1)]
    grant_type: str | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET


class TokenForm(msgspec.Struct):
    """`client_id` and `client_secret`: for a client that does not use HTTP Basic."""

    token: Annotated[str, Meta(min_length=1)]
    token_type_hint: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET


class Introspection(msgspec.Struct):
    """RFC 7662. Of a token that is not active nothing else is said. Times: seconds since 1970."""

    active: bool
    token_type: Literal["Bearer", "refresh_token"] | UnsetType = UNSET
    sub: str | UnsetType = UNSET
    inc: int | UnsetType = UNSET
    sid: str | UnsetType = UNSET
    epoch: int | UnsetType = UNSET
    exp: int | UnsetType = UNSET
    iat: int | UnsetType = UNSET
    jti: str | UnsetType = UNSET
    iss: str | UnsetType = UNSET
    aud: str | UnsetType = UNSET


class Metadata(msgspec.Struct):
    """RFC 8414."""

    issuer: str
    token_endpoint: str
    jwks_uri: str
    introspection_endpoint: str
    revocation_endpoint: str
    grant_types_supported: list[str]


class Keys(msgspec.Struct):
    """RFC 7517: the public keys that access tokens are verified with."""

    keys: list[dict[str, str | list[str]]]


class Empty(msgspec.Struct):
    """Nothing: that the answer came is all there is to say."""


# The table

#: Whatever the request, these can come: the connection or the process is in trouble, not the endpoint.
ANYWHERE = (
    *("bad_http", "headers_too_large", "target_too_long", "transfer_coding_unknown", "http_version_unknown"),
    *("connections_full", "deadline_exceeded", "internal_error"),
)
_BODY = ("malformed_request", "unsupported_media_type", "invalid_request", "body_too_large", "body_timeout")
_STORES = ("user_store_unavailable", "session_store_unavailable")
_BEARER = ("token_missing", "token_invalid", *_STORES)
_REGISTER = (*_BODY, "cross_site", "username_taken", "registration_limited", "login_busy", "user_store_unavailable")
_LOGIN = (*_BODY, "cross_site", "invalid_credentials", "login_locked", "session_limit", "login_busy", *_STORES)
_REFRESH = (
    *(*_BODY, "refresh_token_invalid", "refresh_token_expired", "refresh_token_superseded", "refresh_token_reused"),
    *("session_ended", "session_evicted", "user_disabled", "session_limit", *_STORES),
)
_LOGOUT = (*_BODY, *_BEARER)
_END = (*_BEARER, "session_unknown", "not_found")
_CLIENT = (*_BODY, "invalid_client", *_STORES)


class Route(msgspec.Struct, frozen=True):
    """`reply`: what is answered with `status`, or None where that is text. `codes`: all refusals but those of
    `ANYWHERE`. `body`, of the type `media`: only that of the logout may be left out. `security`: a name of `_SECURITY`.
    """

    method: Literal["get", "post", "delete"]
    path: str
    summary: str
    reply: type[msgspec.Struct] | None
    codes: tuple[str, ...] = ()
    body: type[msgspec.Struct] | None = None
    media: str = _JSON
    security: Literal["bearer", "client"] | None = None
    status: int = 200


ROUTES = (
    Route("post", "/auth/register", "Add a user", Profile, _REGISTER, RegisterRequest, status=201),
    Route("post", "/auth/login", "Open a session", LoginPair, _LOGIN, LoginForm, _FORM),
    Route("post", "/auth/refresh_token", "Exchange a refresh token", TokenPair, _REFRESH, RefreshRequest),
    Route("post", "/auth/logout", "End all sessions, or some", StatusReply, _LOGOUT, LogoutRequest, security="bearer"),
    Route("get", "/auth/sessions", "Where the user is logged in", SessionsReply, _BEARER, security="bearer"),
    Route("delete", "/auth/sessions/{session_id}", "End one session of the user", StatusReply, _END, security="bearer"),
    Route("get", "/auth/me", "Who the user is", Profile, _BEARER, security="bearer"),
    Route("post", "/auth/introspect", "What a token says", Introspection, _CLIENT, TokenForm, _FORM, "client"),
    Route("post", "/auth/revoke", "End a token's session", Empty, _CLIENT, TokenForm, _FORM, "client"),
    Route("get", "/.well-known/oauth-authorization-server", "The endpoints (RFC 8414)", Metadata, ("not_found",)),
    Route("get", "/.well-known/jwks.json", "The public keys", Keys),
    Route("get", "/openapi.json", "This description", Empty),
    Route("get", "/livez", "Whether the process answers", StatusReply),
    Route("get", "/readyz", "Which parts answer; 503 when requests would fail", Report),
    Route("get", "/metrics", "What Prometheus reads", None),
)
#: With `AUTHD_OPERATIONS_BIND`, what is left of them at `AUTHD_BIND`; None: nothing.
_OUTER = {
    "/readyz": Route("get", "/readyz", "Whether requests would succeed; 503 where not", StatusReply),
    "/metrics": None,
}

#: Beyond the types, what a value has to be.
_HINTS: dict[tuple[str, str], dict[str, Any]] = {
    ("RegisterRequest", "username"): {"format": "email", "maxLength": USERNAME_CHARS_MAX},
    ("RegisterRequest", "password"): {"minLength": PASSWORD_CHARS_MIN, "maxLength": PASSWORD_BYTES_MAX},
    ("RegisterRequest", "full_name"): {"maxLength": FULL_NAME_CHARS_MAX},
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    "client": {"type": "http", "scheme": "basic", "description": "A client of `authd clients add`."},
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}}


def make_openapi(settings: Settings) -> Blueprint:
    routes = Blueprint("openapi", __name__)
    document = msgspec.json.encode(describe(settings.issuer, is_outer=bool(settings.operations_bind)))

    @routes.get("/openapi.json")
    async def openapi() -> Response:
        response = json_response(msgspec.Raw(document))
        response.headers["Cache-Control"] = f"public, max-age={OPENAPI_MAX_AGE_S}"
        return response

    return routes


def describe(issuer: str, *, is_outer: bool = False) -> dict[str, Any]:
    """The document. `issuer` is named as the server where it is a URL. `is_outer`: metrics and parts are told to an
    inner address alone.
    """
    routes = [found for route in ROUTES if (found := _OUTER.get(route.path, route) if is_outer else route)]
    used = {Problem, *(kind for route in routes for kind in (route.reply, route.body) if kind is not None)}
    kinds = sorted(used, key=str)
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for (name, field), hint in _HINTS.items():
        schemas[name]["properties"][field].update(hint)
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    refusals: dict[str, Any] = {}
    for route in routes:
        paths[route.path][route.method] = _operation(route, refusals)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "authd", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "responses": refusals, "securitySchemes": _SECURITY},
    }
    return document | ({"servers": [{"url": issuer.rstrip("/")}]} if issuer.startswith("http") else {})


def _operation(route: Route, refusals: dict[str, Any]) -> dict[str, Any]:
    """The operation; the refusals that it points to are added."""
    operation: dict[str, Any] = {"summary": route.summary, "responses": _responses(route, refusals)}
    if "{session_id}" in route.path:
        operation["parameters"] = [_parameter("session_id", "path", {"type": "string", "minLength": 1})]
    if route.body is LogoutRequest:
        operation["parameters"] = [_parameter("scope", "query", msgspec.json.schema(LogoutScope))]
    if route.body is not None:
        content = {route.media: {"schema": _reference("schemas", route.body.__name__)}}
        operation["requestBody"] = {"required": route.body is not LogoutRequest, "content": content}
    if route.security is not None:
        # A client may also name itself in the form.
        operation["security"] = [{route.security: []}, *([{}] if route.security == "client" else [])]
    return operation


def _responses(route: Route, refusals: dict[str, Any]) -> dict[str, Any]:
    content = {_TEXT: {"schema": {"type": "string"}}} if route.reply is None else _content(route.reply)
    responses: dict[str, Any] = {str(route.status): {"description": route.summary, "content": content}}
    by_status: dict[int, list[str]] = defaultdict(list)
    for code in (*route.codes, *ANYWHERE):
        by_status[PROBLEMS[code][0]].append(code)
    for status, codes in by_status.items():
        name = ".".join(codes)
        refusals[name] = refusal = _refusal(status, codes)
        responses[str(status)] = _reference("responses", name)
        if route.path == "/readyz" and route.reply is not None and status == 503:
            responses["503"] = refusal | {"content": refusal["content"] | _content(route.reply)}
    return responses


def _refusal(status: int, codes: list[str]) -> dict[str, Any]:
    schema = {"allOf": [_reference("schemas", "Problem"), {"properties": {"code": {"enum": codes}}}]}
    refusal = {"description": PROBLEMS[codes[0]][1], "content": {MEDIA_TYPE: {"schema": schema}}}
    return refusal | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})


def _content(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {_JSON: {"schema": _reference("schemas", kind.__name__)}}


def _parameter(name: str, place: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _reference(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}
