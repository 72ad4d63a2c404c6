"""For operators and verifiers: liveness, readiness, metrics and the public keys."""

import os

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from quart import Blueprint, Response

from authd.config import Settings
from authd.health import Health
from authd.http.wire import StatusReply, json_response
from authd.tokens import KeyRing

JWKS_MAX_AGE_S = 300


def make_operations(settings: Settings, health: Health, ring: KeyRing) -> Blueprint:
    routes = Blueprint("operations", __name__)
    # A verifier that keeps to it has read a key again before that signs.
    jwks_max_age_s = min(JWKS_MAX_AGE_S, settings.key_publish_s // 2)

    @routes.get("/livez")
    async def livez() -> Response:
        return json_response(StatusReply("ok"))

    @routes.get("/readyz")
    async def readyz() -> Response:
        report = health.report()
        return json_response(report, 200 if report.is_ready else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        registry = REGISTRY
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # several workers: each answers for all
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    @routes.get("/.well-known/jwks.json")
    async def jwks() -> Response:
        response = json_response(ring.jwks())
        response.headers["Cache-Control"] = f"public, max-age={jwks_max_age_s}"
        return response

    return routes
