"""For operators and verifiers: liveness, readiness, metrics and the public keys."""

from prometheus_client import CONTENT_TYPE_LATEST
from quart import Blueprint, Response

from authd.config import Settings
from authd.infra.http.reading import StatusReply, json_response
from authd.infra.observe.exposition import make_exposition
from authd.infra.observe.health import Health
from authd.tokens.ring import KeyRing

JWKS_MAX_AGE_S = 300


def make_operations(settings: Settings, health: Health, ring: KeyRing) -> Blueprint:
    """The endpoints at `AUTHD_BIND`: with `AUTHD_OPERATIONS_BIND` the metrics and the parts are told there alone."""
    routes = make_inner_operations(health) if not settings.operations_bind else _make_probes(health, has_parts=False)
    # A verifier that keeps to it has read a key again before that signs.
    jwks_max_age_s = min(JWKS_MAX_AGE_S, settings.key_publish_s // 2)

    @routes.get("/.well-known/jwks.json")
    async def jwks() -> Response:
        response = json_response(ring.jwks())
        response.headers["Cache-Control"] = f"public, max-age={jwks_max_age_s}"
        return response

    return routes


def make_inner_operations(health: Health) -> Blueprint:
    """The endpoints at `AUTHD_OPERATIONS_BIND`."""
    routes = _make_probes(health, has_parts=True)
    exposition = make_exposition()

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(await exposition.read(), content_type=CONTENT_TYPE_LATEST)

    return routes


def _make_probes(health: Health, *, has_parts: bool) -> Blueprint:
    routes = Blueprint("operations", __name__)

    @routes.get("/livez")
    async def livez() -> Response:
        return json_response(StatusReply("ok"))

    @routes.get("/readyz")
    async def readyz() -> Response:
        report = health.report()
        return json_response(report if has_parts else StatusReply(report.status), 200 if report.is_ready else 503)

    return routes
