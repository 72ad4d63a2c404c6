"""The one map from what the domain refuses to what HTTP says (RFC 9457)."""

from typing import Any

import msgspec
from quart import Response

from authd.errors import InvalidClient, InvalidRequest, Refusal, Unavailable

MEDIA_TYPE = "application/problem+json"

#: Every answer is data: nothing in it may be sniffed, framed, run or embedded elsewhere. As bytes, for the server adds
#: them to every answer, and the application need not handle them.
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
]

#: Each code's status and title. A code that is missing here is a test failure.
PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed_request": (422, "Malformed request"),
    "unsupported_media_type": (422, "Unsupported media type"),
    "invalid_request": (422, "Invalid request"),
    "username_taken": (409, "Username taken"),
    "invalid_credentials": (401, "Invalid credentials"),
    "login_locked": (429, "Login locked"),
    "registration_limited": (429, "Registration limited"),
    "token_missing": (401, "Authentication required"),
    "token_invalid": (401, "Invalid access token"),
    "refresh_token_invalid": (401, "Invalid refresh token"),
    "refresh_token_expired": (401, "Expired refresh token"),
    "refresh_token_superseded": (401, "Superseded refresh token"),
    "refresh_token_reused": (401, "Reused refresh token"),
    "session_ended": (401, "Session ended"),
    "session_evicted": (401, "Session ended"),
    "cross_site": (403, "Cross-site request"),
    "user_disabled": (403, "User disabled"),
    "session_limit": (403, "Session limit"),
    "session_unknown": (404, "Session unknown"),
    "invalid_client": (401, "Invalid client"),
    "user_store_unavailable": (503, "Service unavailable"),
    "session_store_unavailable": (503, "Service unavailable"),
    "login_busy": (503, "Service unavailable"),
    "deadline_exceeded": (503, "Service unavailable"),
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
    """The answer to a refused request."""
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
    """For a problem of `length` bytes after which the connection is closed."""
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
