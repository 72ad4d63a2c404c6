"""The endpoint with the public keys."""

import msgspec
from quart import Request, Response

from authd.config import Settings
from authd.infra.http.endpoint import PUBLIC, Endpoint, Endpoints
from authd.infra.http.replies import json_response
from authd.tokens.ring import KeyRing

JWKS_MAX_AGE_S = 300


class Keys(msgspec.Struct):
    """RFC 7517: the public keys that access tokens are verified with."""

    keys: list[dict[str, str | list[str]]]


def make_key_endpoints(settings: Settings, ring: KeyRing) -> list[Endpoint]:
    endpoint = Endpoints()
    # A verifier that keeps to it has read a key again before that signs.
    max_age_s = min(JWKS_MAX_AGE_S, settings.key_publish_s // 2)

    @endpoint(
        "GET",
        "/.well-known/jwks.json",
        "The public keys",
        auth=PUBLIC,
        reply=Keys,
        cache=f"public, max-age={max_age_s}",
    )
    async def jwks(request: Request) -> Response:
        return json_response(ring.jwks())

    return endpoint.declared
