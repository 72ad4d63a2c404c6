"""The standard endpoints for services: introspection, revocation and the metadata that names them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from authlib.oauth2.rfc6749.util import extract_basic_authorization
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from msgspec import UNSET, Meta, UnsetType
from quart import Request, Response, abort

from authd.config import Settings
from authd.errors import InvalidClient, InvalidRequest
from authd.infra.http.endpoint import (
    FORM,
    NO_STORE,
    PUBLIC,
    STORES_UNAVAILABLE,
    Auth,
    Endpoint,
    Endpoints,
    Handler,
)
from authd.infra.http.reading import Pairs, form_fields, read_form_pairs
from authd.infra.http.replies import Empty, json_response
from authd.oauth.clients import ClientRegistry
from authd.oauth.introspection import TokenDesk

METADATA_MAX_AGE_S = 300
#: Credentials of ours are far shorter, also percent-encoded; longer ones are not decoded.
AUTHORIZATION_CHARS_MAX = 1024
CLIENT_AUTHENTICATION = ["client_secret_basic", "client_secret_post"]


class Service(Auth):
    """A registered service, by HTTP Basic or in the form, whose pairs the handler gets behind the request."""

    schemes: Mapping[str, Mapping[str, Any]] = {
        "client": {"type": "http", "scheme": "basic", "description": "A client of `authd clients add`."}
    }
    # A client may also name itself in the form.
    security = ({"client": ()}, {})
    refusals = (InvalidClient, *STORES_UNAVAILABLE)

    def __init__(self, registry: ClientRegistry) -> None:
        self._registry = registry

    def guard(self, handler: Handler) -> Handler:
        async def guarded(request: Request, **variables: str) -> Response:
            # Nothing is said of a token before the client is known.
            pairs = await read_form_pairs(request)
            await self._registry.authenticate(*_credentials(request, form_fields(pairs)))
            return await handler(request, pairs, **variables)

        return guarded


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


def make_oauth_endpoints(settings: Settings, registry: ClientRegistry, desk: TokenDesk) -> list[Endpoint]:
    endpoint = Endpoints()
    service = Service(registry)
    metadata = make_metadata(settings.issuer)

    @endpoint(
        "POST",
        "/auth/introspect",
        "What a token says",
        auth=service,
        body=TokenForm,
        body_media=FORM,
        reply=Introspection,
        cache=NO_STORE,
    )
    async def introspect(request: Request, pairs: Pairs) -> Response:
        return json_response(await desk.introspect(form_fields(pairs, "token")["token"]))

    @endpoint(
        "POST",
        "/auth/revoke",
        "End a token's session",
        auth=service,
        body=TokenForm,
        body_media=FORM,
        reply=Empty,
    )
    async def revoke(request: Request, pairs: Pairs) -> Response:
        await desk.revoke(form_fields(pairs, "token")["token"])
        return json_response({})

    @endpoint(
        "GET",
        "/.well-known/oauth-authorization-server",
        "The endpoints (RFC 8414)",
        auth=PUBLIC,
        reply=Metadata,
        refusals=("not_found",),
        cache=f"public, max-age={METADATA_MAX_AGE_S}",
    )
    async def describe(request: Request) -> Response:
        if metadata is None:
            abort(404)
        return json_response(metadata)

    return endpoint.declared


def make_metadata(issuer: str) -> dict[str, Any] | None:
    """Return the metadata of RFC 8414, None where the issuer is no URL, from which the others could be made."""
    if urlsplit(issuer).scheme not in ("http", "https"):
        return None
    base = issuer.rstrip("/")
    metadata: dict[str, Any] = AuthorizationServerMetadata(
        issuer=issuer,
        token_endpoint=f"{base}/auth/login",
        token_endpoint_auth_methods_supported=["none"],
        grant_types_supported=["password"],
        # Required, and never empty (RFC 8414). There is no authorization endpoint that could answer with another.
        response_types_supported=["none"],
        jwks_uri=f"{base}/.well-known/jwks.json",
        introspection_endpoint=f"{base}/auth/introspect",
        introspection_endpoint_auth_methods_supported=CLIENT_AUTHENTICATION,
        revocation_endpoint=f"{base}/auth/revoke",
        revocation_endpoint_auth_methods_supported=CLIENT_AUTHENTICATION,
    )
    return metadata


def _credentials(request: Request, form: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the client's id and secret, both by HTTP Basic or both in the form: never one of each (RFC 6749, 2.3).

    :raises InvalidClient, InvalidRequest:
    """
    authorization = request.headers.get("Authorization", "")
    if authorization.partition(" ")[0].lower() != "basic":
        return form.get("client_id"), form.get("client_secret")
    if "client_secret" in form:
        raise InvalidRequest({"client_secret": "The client authenticates by HTTP Basic already."})
    if len(authorization) > AUTHORIZATION_CHARS_MAX:
        raise InvalidClient
    try:
        client_id, secret = extract_basic_authorization(request.headers)
    except ValueError:  # no UTF-8
        raise InvalidClient from None
    return client_id, secret
