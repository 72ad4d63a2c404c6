"""The Quart application: one deadline, one log line and one form of error for every request."""

import logging
import random
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import anyio
import msgspec
import structlog
from prometheus_client import Counter, Histogram
from quart import Blueprint, Quart, Request, Response, signals
from quart.ctx import RequestContext
from quart.typing import ResponseTypes
from quart.wrappers.base import BaseRequestWebsocket
from werkzeug.datastructures import ImmutableMultiDict
from werkzeug.exceptions import HTTPException, NotFound, RequestEntityTooLarge
from werkzeug.routing import MapAdapter, Rule

from authd.config import Network
from authd.errors import Refusal, Unavailable
from authd.infra.http.address import find_address
from authd.infra.http.cors import Cors
from authd.infra.http.endpoint import Endpoint, answer
from authd.infra.http.problems import ProblemResponse, deadline_response, problem_response, refusal_response
from authd.infra.observe import metrics
from authd.infra.observe.logs import RequestLine, log_request
from authd.infra.tasks.deadline import Deadline

FAULT_DETAIL = "Something went wrong on our side."
#: How long the answer to a request whose body nobody read waits for the rest of it.
BODY_REST_S = 0.5
#: Routes, methods and statuses are few: none of the three is what the client wrote.
METERS_MAX = 4096
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Asked every few seconds by machines: a line for each would bury the rest.
_PROBES = {"/livez", "/readyz", "/metrics"}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}

#: Where Quart keeps hooks that run around a request (by blueprint), or around the process. `App` and the server run
#: none of them: each costs every request time, and a deadline or a hang-up passes them by.
_HOOKS = (
    *("before_request_funcs", "after_request_funcs", "teardown_request_funcs", "url_value_preprocessors"),
    *("before_websocket_funcs", "after_websocket_funcs", "teardown_websocket_funcs"),
)
_SERVING_HOOKS = ("before_serving_funcs", "after_serving_funcs", "while_serving_gens")
_SIGNALS = (
    *(signals.request_started, signals.request_finished, signals.got_request_exception),
    *(signals.websocket_started, signals.websocket_finished, signals.got_serving_exception),
)

_log = structlog.get_logger()


class IgnoredHook(RuntimeError):
    """A defect of the code that registers: the argument says what would be ignored."""


class _Request(Request):
    #: Once it is found.
    declared: Endpoint | None = None

    @property
    def cookies(self) -> ImmutableMultiDict[str, str]:
        """Return those that the endpoint's declaration names: no other is seen by anybody."""
        names = self.declared.cookies if self.declared is not None else ()
        return ImmutableMultiDict([(name, value) for name, value in super().cookies.items(multi=True) if name in names])

    @property
    def blueprints(self) -> list[str]:
        """None: Quart would look for hooks of theirs, several times a request, and there are none."""
        return []


class _Context(RequestContext):
    async def _push(self) -> None:
        """Match the request, without the session that Quart would open: it is a cookie, and an endpoint declares its
        own.
        """
        self.match_request()

    def match_request(self) -> None:
        # Werkzeug takes `//path` for `/path`, and `%2F` is a slash to it: a proxy's deny list takes neither so.
        scope = self.request.scope
        if scope["path"].startswith("//") or b"%2f" in scope["raw_path"].lower():
            self.request.routing_exception = NotFound()
        else:
            super().match_request()


class AppSettings(msgspec.Struct, frozen=True):
    request_timeout_s: float
    body_max_bytes: int
    trusted_proxies: tuple[Network, ...]
    cors_origins: tuple[str, ...]


class App(Quart):
    """Serves declared endpoints. `inflight` holds the deadline of every request that is being answered."""

    request_class = _Request

    def __init__(self, settings: AppSettings, endpoints: Sequence[Endpoint]) -> None:
        super().__init__("authd", static_folder=None, template_folder=None)
        self.inflight: set[Deadline] = set()
        self.is_draining = False
        self._timeout_s = settings.request_timeout_s
        self._trusted_proxies = settings.trusted_proxies
        self.config["MAX_CONTENT_LENGTH"] = settings.body_max_bytes
        self.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
        # `/a//b` is a path that we do not have, and nothing to redirect to.
        self.url_map.merge_slashes = False
        self._cors = Cors(settings.cors_origins)
        self._endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        for endpoint in endpoints:
            self.add_url_rule(endpoint.path, endpoint.name, endpoint.handler, methods=[endpoint.method])
        self.register_error_handler(Refusal, _on_refusal)
        self.register_error_handler(HTTPException, _on_http_exception)
        self.register_error_handler(Exception, _on_fault)

    def register_blueprint(self, blueprint: Blueprint, **options: Any) -> None:  # type: ignore[override]
        """Register it, unless it brings a hook.

        :raises IgnoredHook:
        """
        super().register_blueprint(blueprint, **options)
        self.refuse_hooks()

    def refuse_hooks(self) -> None:
        """Raise where something was registered that a request would pass without running it: a hook that guards
        endpoints must not be left out in silence, and a route that was not declared has no `auth`. Called again at the
        start, for what was registered later.

        :raises IgnoredHook:
        """
        holders = [self, *self.blueprints.values()]
        found = [name for name in _HOOKS if any(any(getattr(holder, name).values()) for holder in holders)]
        found += [name for name in _SERVING_HOOKS if getattr(self, name)]
        # The error handlers of a blueprint are looked for by the request's blueprints, and `_Request` names none.
        found += [f"errorhandler of {name}" for name, spec in self.error_handler_spec.items() if name and any(spec)]
        found += [f"route {rule.rule}" for rule in self.url_map.iter_rules() if rule.endpoint not in self._endpoints]
        found += [signal.name for signal in _SIGNALS if signal.has_receivers_for(self)]
        if found:
            raise IgnoredHook(f"never run here, so do without: {', '.join(found)}")

    def end_requests(self) -> None:
        """Every request's deadline is now: what the drain ends with."""
        for deadline in self.inflight:
            deadline.end()

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        # Whatever the Host: no route depends on it, and Quart's own raises over one that is no name.
        if request is None:
            return None
        return self.url_map.bind("authd", path_info=request.path, default_method=request.method)

    def request_context(self, request: Request) -> RequestContext:
        return _Context(self, request)

    async def full_dispatch_request(self, request_context: RequestContext | None = None) -> ResponseTypes:
        """Answer by the endpoint's declaration: without Quart's views, hooks, signals and sessions, of which we have
        none.
        """
        context = cast(RequestContext, request_context)
        request = cast(_Request, context.request)
        try:
            if request.routing_exception is not None:
                raise request.routing_exception
            request.declared = self._endpoints[cast(Rule, request.url_rule).endpoint]
            return await answer(request.declared, request)
        except Exception as error:
            return await self.make_response(await self.handle_user_exception(error))

    async def handle_request(self, request: Request) -> ResponseTypes:
        # Runs in the handler's own task, outside every hook. A deadline in a hook or around the ASGI call would answer
        # while the view ran on.
        started = time.perf_counter()
        # Not from `headers`, whose look for what is not there costs more than all of these lines.
        request_id = dict(request.scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(64):016x}"
        structlog.contextvars.bind_contextvars(request_id=request_id)
        response: ResponseTypes | None = None
        try:
            response = await self._answer(request)
            if not await _has_whole_body(request) or self.is_draining:
                # It ends after this answer; a client that does not know would use it again.
                response.headers["Connection"] = "close"
            response.headers["X-Request-ID"] = request_id
            # Only what says otherwise is for everybody: anything else may hold a token or tell of a user.
            response.headers.setdefault("Cache-Control", "no-store")
            self._cors.permit(request, response)
            return response
        finally:
            address = find_address(request, self._trusted_proxies)
            _record(request, request_id, address, response, time.perf_counter() - started)

    async def _answer(self, request: Request) -> ResponseTypes:
        with Deadline(self._timeout_s) as deadline:
            self.inflight.add(deadline)
            try:
                return self._cors.preflight(request) or await super().handle_request(request)
            finally:
                self.inflight.discard(deadline)
        if not _has_read_body(request):
            return problem_response("body_timeout", "The request body did not arrive in time.")
        metrics.unavailable.labels("deadline").inc()
        return deadline_response()


async def _has_whole_body(request: Request) -> bool:
    if request.body._must_raise is not None:  # it is too large, and the rest of it was thrown away
        return False
    if _has_read_body(request):
        return True
    with anyio.move_on_after(BODY_REST_S):
        try:
            await request.body
        except RequestEntityTooLarge:
            return False
        return True
    return False


def _has_read_body(request: Request) -> bool:
    # Asked of the event itself: to wait for what is there already would cost a scope.
    return request.body._complete.is_set() or not (request.content_length or "Transfer-Encoding" in request.headers)


def _record(request: Request, request_id: str, address: str, response: ResponseTypes | None, seconds: float) -> None:
    # No response: the client hung up (nginx's 499).
    status = response.status_code if response is not None else 499
    route, method = (request.url_rule.rule, request.method) if request.url_rule is not None else ("unmatched", "-")
    answers, durations = _meters(route, method, status)
    answers.inc()
    durations.observe(seconds)
    line = RequestLine(
        request_id=request_id,
        method=request.method,
        route=route,
        status=status,
        ms=round(seconds * 1000, 1),
        peer=(request.scope.get("client") or ("",))[0],
        address=address,
    )
    if isinstance(response, ProblemResponse):
        line.code = response.code
        metrics.refusals.labels(response.code).inc()
    log_request(line, logging.DEBUG if route in _PROBES and status < 400 else logging.INFO)


@lru_cache(METERS_MAX)
def _meters(route: str, method: str, status: int) -> tuple[Counter, Histogram]:
    """To find them by their labels each time costs more than to count."""
    return metrics.requests.labels(route, method, status), metrics.request_seconds.labels(route)


async def _on_refusal(refusal: Refusal) -> Response:
    if isinstance(refusal, Unavailable):
        metrics.unavailable.labels(refusal.part).inc()
        _log.warning("unavailable", part=refusal.part, cause=repr(refusal.__cause__) if refusal.__cause__ else None)
    return refusal_response(refusal)


async def _on_http_exception(error: HTTPException) -> Response:
    status = error.code or 500
    code = _HTTP_CODES.get(status, "malformed_request" if status < 500 else "internal_error")
    response = problem_response(code, error.name + ".")
    if status == 405:
        response.headers["Allow"] = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
    return response


async def _on_fault(error: Exception) -> Response:
    _log.error("fault", exc_info=error)
    return problem_response("internal_error", FAULT_DETAIL)
