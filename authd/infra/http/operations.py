"""The endpoints for operators: liveness, readiness and metrics.

Beside the other endpoints of no capability and not in `observe`, which `infra/http` itself counts and logs with.
"""

from prometheus_client import CONTENT_TYPE_LATEST
from quart import Request, Response

from authd.infra.http.endpoint import PUBLIC, Endpoint, Endpoints
from authd.infra.http.replies import StatusReply, json_response
from authd.infra.observe.exposition import make_exposition
from authd.infra.observe.health import Health, Report


def make_probe_endpoints(health: Health) -> list[Endpoint]:
    """Return those for anybody: which parts there are is not said, nor how they are."""
    endpoint = Endpoints()
    _declare_liveness(endpoint)
    summary = "Whether requests would succeed; 503 where not"

    @endpoint("GET", "/readyz", summary, auth=PUBLIC, reply=StatusReply, other_statuses=(503,))
    async def readyz(request: Request) -> Response:
        report = health.report()
        return json_response(StatusReply(report.status), 200 if report.is_ready else 503)

    return endpoint.declared


def make_operation_endpoints(health: Health) -> list[Endpoint]:
    """Return those for operators: at `AUTHD_OPERATIONS_BIND`, or, without one, at `AUTHD_BIND`."""
    endpoint = Endpoints()
    exposition = make_exposition()
    _declare_liveness(endpoint)
    summary = "Which parts answer; 503 when requests would fail"

    @endpoint("GET", "/readyz", summary, auth=PUBLIC, reply=Report, other_statuses=(503,))
    async def readyz(request: Request) -> Response:
        report = health.report()
        return json_response(report, 200 if report.is_ready else 503)

    text = CONTENT_TYPE_LATEST.partition(";")[0]

    @endpoint("GET", "/metrics", "What Prometheus reads", auth=PUBLIC, reply=None, reply_media=text)
    async def metrics(request: Request) -> Response:
        return Response(await exposition.read(), content_type=CONTENT_TYPE_LATEST)

    return endpoint.declared


def _declare_liveness(endpoint: Endpoints) -> None:
    @endpoint("GET", "/livez", "Whether the process answers", auth=PUBLIC, reply=StatusReply)
    async def livez(request: Request) -> Response:
        return json_response(StatusReply("ok"))
