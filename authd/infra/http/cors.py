"""Which web pages of other origins may read our answers: none, unless AUTHD_CORS_ORIGINS names their origin.

In the application itself and not as hooks around the views (as quart-cors does it): a 503 at the deadline passes no
hook, and a page must be able to read its Retry-After. Credentials are never permitted: no
page of another origin may have its visitor's cookies sent along.
"""

from collections.abc import Collection

from quart import Request, Response
from quart.typing import ResponseTypes

from authd.errors import CrossSite

#: What a page needs; probes and metrics are for nobody's page.
PERMITTED_PATHS = ("/auth/", "/.well-known/", "/openapi.json")
METHODS = "GET, POST, DELETE"
REQUEST_HEADERS = "Authorization, Content-Type, X-Device-Token, X-Request-ID"
READABLE_HEADERS = "Retry-After, WWW-Authenticate, X-Request-ID"
PREFLIGHT_MAX_AGE_S = 600


def refuse_cross_site(request: Request, origins: Collection[str]) -> None:
    """Refuse what a page of another site lets its visitor's browser send, unless its origin is one of `origins`.

    For endpoints that a page may post to without asking first (a form, or a body without a type), and that change
    something for whoever sends it. Clients that are no browser, and old browsers, send no `Sec-Fetch-Site`.

    :raises CrossSite:
    """
    sites = request.headers.getlist("Sec-Fetch-Site")
    if "cross-site" in sites and request.headers.get("Origin") not in origins:
        raise CrossSite


class Cors:
    def __init__(self, origins: Collection[str]) -> None:
        """`origins`: as browsers send them, such as `https://app.example.com`."""
        self._origins = frozenset(origins)

    def preflight(self, request: Request) -> Response | None:
        """Return the answer to a browser that asks before it sends; None to anything else."""
        asked = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not asked or not self._permits(request):
            return None
        response = Response(b"", 204)
        response.headers["Access-Control-Allow-Methods"] = METHODS
        response.headers["Access-Control-Allow-Headers"] = REQUEST_HEADERS
        response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)
        return response

    def permit(self, request: Request, response: ResponseTypes) -> None:
        """Let the page at a permitted origin read the answer."""
        if not self._origins:
            return
        # Or a shared cache would hand one origin's answer to another.
        response.headers.add("Vary", "Origin")
        if self._permits(request):
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = READABLE_HEADERS

    def _permits(self, request: Request) -> bool:
        return request.headers.get("Origin") in self._origins and request.path.startswith(PERMITTED_PATHS)
