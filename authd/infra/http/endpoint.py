"""The one declaration of an endpoint: by it the application serves it, and OpenAPI describes it.

Whoever may call an endpoint stands in its declaration, and no default does: one that names nobody stops the start. A
capability declares its endpoints in a function that gets what they use:

    def make_profile_endpoints(...) -> list[Endpoint]:
        endpoint = Endpoints()

        @endpoint("GET", "/auth/me", "Who the user is", auth=BEARER, reply=Profile)
        async def me(request: Request, token: str) -> Response: ...

        return endpoint.declared
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from quart import Request, Response

from authd.errors import InvalidAccessToken, MissingToken, Refusal
from authd.infra.http.address import bearer_token
from authd.infra.http.problems import PROBLEMS
from authd.infra.http.replies import JSON

FORM = "application/x-www-form-urlencoded"
STORES_UNAVAILABLE = ("user_store_unavailable", "session_store_unavailable")
NO_STORE = "no-store"
#: What may be refused wherever a body is read.
_OF_A_BODY = ("malformed_request", "unsupported_media_type", "invalid_request", "body_too_large", "body_timeout")
_VARIABLE = re.compile(r"<(\w+)>")

#: Gets the request, then what `Auth` found of the caller, then the variables of the path by their names.
Handler = Callable[..., Awaitable[Response]]
#: A class of refusals stands for all its codes.
Refusals = Sequence[type[Refusal] | str]


class Auth:
    """Who may call an endpoint: anybody. Subclasses know callers by something."""

    #: How OpenAPI describes it, by the name that `security` uses.
    schemes: Mapping[str, Mapping[str, Any]] = {}
    #: The alternatives; empty: nothing is needed.
    security: Sequence[Mapping[str, Sequence[str]]] = ()
    refusals: Refusals = ()

    def guard(self, handler: Handler) -> Handler:
        """Return the handler that refuses everybody else, and hands over who it is."""
        return handler


class Bearer(Auth):
    """Whoever brings a bearer token, which the handler gets behind the request. Whether it is valid, the use case
    decides that takes it.
    """

    schemes: Mapping[str, Mapping[str, Any]] = {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    security = ({"bearer": ()},)
    refusals = (MissingToken, InvalidAccessToken, *STORES_UNAVAILABLE)

    def guard(self, handler: Handler) -> Handler:
        # No coroutine of its own, which would cost each request a frame.
        def guarded(request: Request, **variables: str) -> Awaitable[Response]:
            return handler(request, bearer_token(request), **variables)

        return guarded


PUBLIC = Auth()
BEARER = Bearer()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as it was declared; see `Endpoints`. `codes`: all its refusals but those that come anywhere."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    summary: str
    auth: Auth
    codes: tuple[str, ...]
    reply: type[msgspec.Struct] | None
    reply_media: str
    status: int
    other_statuses: tuple[int, ...]
    body: type[msgspec.Struct] | None
    body_media: str
    is_body_optional: bool
    query: type[msgspec.Struct] | None
    cookies: frozenset[str]
    #: Of an answer that is no refusal.
    headers: tuple[tuple[str, str], ...]
    handler: Handler

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def variables(self) -> list[str]:
        """Return the names of the variables in the path."""
        return _VARIABLE.findall(self.path)

    @property
    def template(self) -> str:
        """Return the path as OpenAPI writes it."""
        return _VARIABLE.sub(r"{\1}", self.path)


class Endpoints:
    """Declares endpoints; `declared` lists them."""

    def __init__(self) -> None:
        self.declared: list[Endpoint] = []

    def __call__(
        self,
        method: Literal["GET", "POST", "DELETE"],
        path: str,
        summary: str,
        *,
        auth: Auth,
        reply: type[msgspec.Struct] | None,
        reply_media: str = JSON,
        status: int = 200,
        other_statuses: Sequence[int] = (),
        refusals: Refusals = (),
        body: type[msgspec.Struct] | None = None,
        body_media: str = JSON,
        is_body_optional: bool = False,
        query: type[msgspec.Struct] | None = None,
        cookies: Sequence[str] = (),
        csp: str | None = None,
        cache: str | None = None,
    ) -> Callable[[Handler], Handler]:
        """Declare the decorated handler.

        :param path: with its variables in angle brackets.
        :param auth: who may call it; it has no default.
        :param reply: what is answered with `status`, and with `other_statuses`; None for a text of `reply_media`.
        :param refusals: classes or codes, without those of the body, of `auth`, and of any request.
        :param query: one field for each parameter.
        :param cookies: names of the cookies that the handler may see; it sees no other.
        :param csp: replaces the Content-Security-Policy of all answers, which forbids everything.
        :param cache: the Cache-Control; None: the answer is not to be stored.
        :raises KeyError: over a code that is none.
        """
        headers = {"Content-Security-Policy": csp, "Cache-Control": cache}
        codes = (*(_OF_A_BODY if body is not None else ()), *_codes(auth.refusals), *_codes(refusals))

        def declare(handler: Handler) -> Handler:
            endpoint = Endpoint(
                method=method,
                path=path,
                summary=summary,
                auth=auth,
                codes=codes,
                reply=reply,
                reply_media=reply_media,
                status=status,
                other_statuses=tuple(other_statuses),
                body=body,
                body_media=body_media,
                is_body_optional=is_body_optional,
                query=query,
                cookies=frozenset(cookies),
                headers=tuple((name, value) for name, value in headers.items() if value is not None),
                handler=auth.guard(handler),
            )
            self.declared.append(endpoint)
            return handler

        return declare


async def answer(endpoint: Endpoint, request: Request) -> Response:
    """Answer a request to the endpoint.

    :raises Refusal:
    """
    response = await endpoint.handler(request, **(request.view_args or {}))
    for name, value in endpoint.headers:
        response.headers[name] = value
    return response


def _codes(refusals: Refusals) -> list[str]:
    found: list[str] = []
    for refusal in refusals:
        found += [refusal] if isinstance(refusal, str) else refusal.titles()
    for code in found:
        PROBLEMS[code]
    return found
