"""The standard endpoints for services: introspection, revocation and the metadata that names them."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from authlib.oauth2.rfc6749.util import extract_basic_authorization
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from quart import Blueprint, Request, Response, abort, request

from authd.config import Settings
from authd.errors import InvalidClient, InvalidRequest
from authd.infra.http.reading import form_fields, json_response, read_form_pairs
from authd.oauth.clients import ClientRegistry
from authd.oauth.introspection import TokenDesk

METADATA_MAX_AGE_S = 300
#: Credentials of ours are far shorter, also percent-encoded; longer ones are not decoded.
AUTHORIZATION_CHARS_MAX = 1024
CLIENT_AUTHENTICATION = ["client_secret_basic", "client_secret_post"]


def make_oauth(settings: Settings, registry: ClientRegistry, desk: TokenDesk) -> Blueprint:
    routes = Blueprint("oauth", __name__)
    metadata = make_metadata(settings.issuer)

    async def authenticated_form() -> dict[str, str]:
        """The form of a registered client. Nothing is said of a token before the client is known."""
        pairs = await read_form_pairs(request)
        await registry.authenticate(*_credentials(request, form_fields(pairs)))
        return form_fields(pairs, "token")

    @routes.post("/auth/introspect")
    async def introspect() -> Response:
        form = await authenticated_form()
        response = json_response(await desk.introspect(form["token"]))
        response.headers["Cache-Control"] = "no-store"
        return response

    @routes.post("/auth/revoke")
    async def revoke() -> Response:
        form = await authenticated_form()
        await desk.revoke(form["token"])
        return json_response({})

    @routes.get("/.well-known/oauth-authorization-server")
    async def describe() -> Response:
        if metadata is None:
            abort(404)
        response = json_response(metadata)
        response.headers["Cache-Control"] = f"public, max-age={METADATA_MAX_AGE_S}"
        return response

    return routes


def make_metadata(issuer: str) -> dict[str, Any] | None:
    """RFC 8414. None where the issuer is no URL, from which the others could be made."""
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
    """The client's id and secret, both by HTTP Basic or both in the form: never one of each (RFC 6749, 2.3).

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
