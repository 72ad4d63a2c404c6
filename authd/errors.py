"""What the domain refuses, with stable codes and plain sentences, and no HTTP.

A client may branch on `code`; `detail` is for people. Neither names an internal part or repeats a secret.
"""

from typing import Literal


class Refusal(Exception):
    """A request that authd answers with a problem. One subclass for each stable code."""

    code: str
    detail: str
    retry_after_s: int | None = None

    def __init__(self) -> None:
        super().__init__(self.code)


class MalformedRequest(Refusal):
    """The body or the headers are not what the endpoint reads at all."""

    code = "malformed_request"

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__()


class CrossSite(Refusal):
    """A page would lock its visitor's account, or use its visitors' addresses to guess from."""

    code = "cross_site"
    detail = "Web pages of other sites may not send this request."


class InvalidRequest(Refusal):
    """The body was read, but fields are missing or unusable. `errors` maps each field to a sentence."""

    code = "invalid_request"
    detail = "The request has missing or unusable fields."

    def __init__(self, errors: dict[str, str]) -> None:
        self.errors = errors
        super().__init__()


class UsernameTaken(Refusal):
    code = "username_taken"
    detail = "This username is already registered."


class InvalidCredentials(Refusal):
    """Unknown user, wrong password and disabled user alike: an answer that tells them apart is an oracle."""

    code = "invalid_credentials"
    detail = "The username or the password is wrong."


class LoginLocked(Refusal):
    code = "login_locked"
    detail = "Too many failed logins. Try again later."

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__()


class MissingToken(Refusal):
    code = "token_missing"
    detail = "This endpoint needs a bearer access token."


class InvalidAccessToken(Refusal):
    """Unreadable, forged, expired, or of a session that has ended."""

    code = "token_invalid"
    detail = "The access token is invalid, expired or revoked."


class RegistrationLimited(Refusal):
    code = "registration_limited"
    detail = "Too many registrations from this network. Try again later."

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__()


RefreshRefusalCode = Literal[
    "refresh_token_invalid",
    "refresh_token_expired",
    "refresh_token_superseded",
    "refresh_token_reused",
    "session_ended",
    "session_evicted",
]

_REFRESH_DETAILS: dict[RefreshRefusalCode, str] = {
    "refresh_token_invalid": "The refresh token is not one of ours.",
    "refresh_token_expired": "The refresh token has expired.",
    "refresh_token_superseded": "The refresh token was replaced a moment ago. Use the newest one.",
    "refresh_token_reused": "The refresh token was used before. The session has ended.",
    "session_ended": "The session has ended.",
    "session_evicted": "The session was ended by a newer login.",
}


class RefreshRefused(Refusal):
    def __init__(self, code: RefreshRefusalCode) -> None:
        self.code = code
        self.detail = _REFRESH_DETAILS[code]
        super().__init__()


class UserDisabled(Refusal):
    code = "user_disabled"
    detail = "This user is gone or disabled."


class UnknownSession(Refusal):
    code = "session_unknown"
    detail = "There is no such session of this user."


class InvalidClient(Refusal):
    """The service that asks about a token is not registered, or its secret is wrong (RFC 6749, 5.2)."""

    code = "invalid_client"
    detail = "This endpoint is for registered service clients."


class SessionLimit(Refusal):
    """Only with AUTHD_SESSION_POLICY=refuse. It is no failed login."""

    code = "session_limit"
    detail = "This user has the highest number of active sessions. End one first."


class Unavailable(Refusal):
    """A part is away, slow or full. The code says which part, by its role. `is_busy`: the part answers, and only
    something in it, such as a lock, was not free in time; this says nothing about the part.
    """

    code = "unavailable"

    def __init__(
        self,
        part: Literal["user_store", "session_store", "hashing", "deadline"],
        retry_after_s: int = 1,
        *,
        is_busy: bool = False,
    ):
        self.part = part
        self.is_busy = is_busy
        self.code = _UNAVAILABLE[part][0]
        self.detail = _UNAVAILABLE[part][1]
        self.retry_after_s = retry_after_s
        super().__init__()


_UNAVAILABLE = {
    "user_store": ("user_store_unavailable", "User data cannot be reached at the moment. Try again."),
    "session_store": ("session_store_unavailable", "Sessions cannot be reached at the moment. Try again."),
    "hashing": ("login_busy", "Too many logins are waiting. Try again."),
    "deadline": ("deadline_exceeded", "The request took too long. Try again."),
}
