"""The one map from what the domain refuses to what HTTP says (RFC 9457)."""

from typing import Any

import msgspec
from quart import Response

from authd.errors import InvalidClient, InvalidRequest, Kind, Refusal, Unavailable

MEDIA_TYPE = "application/problem+json"

#: An answer is data unless its endpoint says otherwise: nothing in it may be sniffed, framed, run or embedded
#: elsewhere. As bytes, for the server adds those that an answer does not bring, and the application need not handle
#: them.
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
]

#: What each kind of refusal is in HTTP. A new code needs nothing here.
STATUSES: dict[Kind, int] = {
    "invalid": 422,
    "unauthenticated": 401,
    "forbidden": 403,
    "missing": 404,
    "conflict": 409,
    "throttled": 429,
    "unavailable": 503,
}
#: Status and title of what HTTP itself refuses, before or around an endpoint.
_OF_THE_EDGE = {
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "body_too_large": (413, "Body too large"),
    "body_timeout": (408, "Body timeout"),
    "bad_http": (400, "Bad request"),
    "headers_too_large": (431, "Header fields too large"),
    "target_too_long": (414, "Target too long"),
    "transfer_coding_unknown": (501, "Not implemented"),
    "http_version_unknown": (505, "HTTP version not supported"),
    "connections_full": (503, "Service unavailable"),
    "internal_error": (500, "Internal error"),
}
#: The status and the title of each code.
PROBLEMS: dict[str, tuple[int, str]] = _OF_THE_EDGE | {
    code: (STATUSES[refusal.kind], title)
    for refusal in Refusal.__subclasses__()
    for code, title in refusal.titles().items()
}


#: What OAuth's own libraries read beside the problem (RFC 6749, 5.2).
_OAUTH_ERRORS = {
    "invalid_client": "invalid_client",
    "invalid_credentials": "invalid_grant",
    "invalid_request": "invalid_request",
    "malformed_request": "invalid_request",
}


class ProblemResponse(Response):
    """Keeps the code for the request's log line and metric."""

    code: str


def refusal_response(refusal: Refusal) -> Response:
    """Return the answer to a refused request."""
    extra: dict[str, Any] = {"error": _OAUTH_ERRORS[refusal.code]} if refusal.code in _OAUTH_ERRORS else {}
    if isinstance(refusal, InvalidRequest):
        extra["errors"] = [{"field": field, "detail": detail} for field, detail in refusal.errors.items()]
    response = problem_response(refusal.code, refusal.detail, **extra)
    if refusal.retry_after_s is not None:
        response.headers["Retry-After"] = str(refusal.retry_after_s)
    if isinstance(refusal, InvalidClient):
        response.headers["WWW-Authenticate"] = 'Basic realm="authd", charset="UTF-8"'
    elif response.status_code == 401:
        # RFC 6750: a request without a token gets no error code.
        error = ', error="invalid_token"' if refusal.code == "token_invalid" else ""
        response.headers["WWW-Authenticate"] = f'Bearer realm="authd"{error}'
    return response


def problem_body(code: str, detail: str, **extra: Any) -> bytes:
    status, title = PROBLEMS[code]
    problem = {"type": f"urn:authd:problem:{code}", "title": title, "status": status, "detail": detail, "code": code}
    return msgspec.json.encode(problem | extra)


def problem_headers(length: int) -> list[tuple[bytes, bytes]]:
    """Return the headers for a problem of `length` bytes after which the connection is closed."""
    headers = {
        "Content-Type": MEDIA_TYPE,
        "Content-Length": str(length),
        "Connection": "close",
        "Cache-Control": "no-store",
    }
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def problem_response(code: str, detail: str, **extra: Any) -> ProblemResponse:
    response = ProblemResponse(problem_body(code, detail, **extra), PROBLEMS[code][0], content_type=MEDIA_TYPE)
    response.headers["Cache-Control"] = "no-store"
    response.code = code
    return response


def deadline_response() -> Response:
    return refusal_response(Unavailable("deadline"))
