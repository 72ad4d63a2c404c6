"""What the domain refuses, with stable codes and plain sentences, and no HTTP.

A client may branch on `code`; `detail` is for people. Neither names an internal part or repeats a secret.
"""

from typing import Literal

#: What is wrong, as far as HTTP tells it apart: see `infra/http/problems.py`.
Kind = Literal["invalid", "unauthenticated", "forbidden", "missing", "conflict", "throttled", "unavailable"]


class Refusal(Exception):
    """A request that authd answers with a problem. One subclass for each stable code, or for a few of one kind."""

    kind: Kind
    code: str
    title: str
    detail: str
    retry_after_s: int | None = None

    def __init__(self) -> None:
        super().__init__(self.code)

    @classmethod
    def titles(cls) -> dict[str, str]:
        """Return the title of each code that the class may have."""
        return {cls.code: cls.title}


class MalformedRequest(Refusal):
    """The body or the headers are not what the endpoint reads at all."""

    kind = "invalid"
    code = "malformed_request"
    title = "Malformed request"

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__()


class UnsupportedMediaType(Refusal):
    """`wanted`: the type that the endpoint reads."""

    kind = "invalid"
    code = "unsupported_media_type"
    title = "Unsupported media type"

    def __init__(self, wanted: str) -> None:
        self.detail = f"The body must be {wanted}."
        super().__init__()


class CrossSite(Refusal):
    """A page of another site could lock its visitor's account, or guess passwords from its visitors' addresses."""

    kind = "forbidden"
    code = "cross_site"
    title = "Cross-site request"
    detail = "Web pages of other sites may not send this request."


class InvalidRequest(Refusal):
    """The body was read, but fields are missing or unusable. `errors` maps each field to a sentence."""

    kind = "invalid"
    code = "invalid_request"
    title = "Invalid request"
    detail = "The request has missing or unusable fields."

    def __init__(self, errors: dict[str, str]) -> None:
        self.errors = errors
        super().__init__()


class UsernameTaken(Refusal):
    kind = "conflict"
    code = "username_taken"
    title = "Username taken"
    detail = "This username is already registered."


class InvalidCredentials(Refusal):
    """Unknown user, wrong password and disabled user alike: an answer that tells them apart is an oracle."""

    kind = "unauthenticated"
    code = "invalid_credentials"
    title = "Invalid credentials"
    detail = "The username or the password is wrong."


class LoginLocked(Refusal):
    kind = "throttled"
    code = "login_locked"
    title = "Login locked"
    detail = "Too many failed logins. Try again later."

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__()


class MissingToken(Refusal):
    kind = "unauthenticated"
    code = "token_missing"
    title = "Authentication required"
    detail = "This endpoint needs a bearer access token."


class InvalidAccessToken(Refusal):
    """Unreadable, forged, expired, or of a session that has ended."""

    kind = "unauthenticated"
    code = "token_invalid"
    title = "Invalid access token"
    detail = "The access token is invalid, expired or revoked."


class RegistrationLimited(Refusal):
    kind = "throttled"
    code = "registration_limited"
    title = "Registration limited"
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

#: The title and the detail of each.
_REFRESH: dict[RefreshRefusalCode, tuple[str, str]] = {
    "refresh_token_invalid": ("Invalid refresh token", "The refresh token is invalid."),
    "refresh_token_expired": ("Expired refresh token", "The refresh token has expired."),
    "refresh_token_superseded": (
        "Superseded refresh token",
        "The refresh token was replaced a moment ago. Use the newest one.",
    ),
    "refresh_token_reused": (
        "Reused refresh token",
        "The refresh token was used before. The session has ended.",
    ),
    "session_ended": ("Session ended", "The session has ended."),
    "session_evicted": ("Session ended", "The session was ended by a newer login."),
}


class RefreshRefused(Refusal):
    kind = "unauthenticated"

    def __init__(self, code: RefreshRefusalCode) -> None:
        self.code = code
        self.title, self.detail = _REFRESH[code]
        super().__init__()

    @classmethod
    def titles(cls) -> dict[str, str]:
        return {code: title for code, (title, _) in _REFRESH.items()}


class UserDisabled(Refusal):
    kind = "forbidden"
    code = "user_disabled"
    title = "User disabled"
    detail = "This user is deleted or disabled."


class UnknownSession(Refusal):
    kind = "missing"
    code = "session_unknown"
    title = "Session unknown"
    detail = "There is no such session of this user."


class InvalidClient(Refusal):
    """The service that asks about a token is not registered, or its secret is wrong (RFC 6749, 5.2)."""

    kind = "unauthenticated"
    code = "invalid_client"
    title = "Invalid client"
    detail = "This endpoint is for registered service clients."


class SessionLimit(Refusal):
    """Only with AUTHD_SESSION_POLICY=refuse. It is no failed login."""

    kind = "forbidden"
    code = "session_limit"
    title = "Session limit"
    detail = "The maximum number of active sessions is reached. End one first."


class Unavailable(Refusal):
    """A store, or another part of the service, is unavailable, slow or full. The code says which, by its role.
    `is_busy`: the store answers, but something in it, such as a lock, was not free in time. This is no failure of the
    store.
    """

    kind = "unavailable"
    code = "unavailable"
    title = "Service unavailable"

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

    @classmethod
    def titles(cls) -> dict[str, str]:
        return {code: cls.title for code, _ in _UNAVAILABLE.values()}


_UNAVAILABLE = {
    "user_store": ("user_store_unavailable", "User data cannot be reached at the moment. Try again."),
    "session_store": ("session_store_unavailable", "Sessions cannot be reached at the moment. Try again."),
    "hashing": ("login_busy", "Too many logins are waiting. Try again."),
    "deadline": ("deadline_exceeded", "The request took too long. Try again."),
}
