"""What comes over the wire and how it is read: structs for JSON, one reader for forms."""

from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from quart import Request, Response

from authd.errors import InvalidRequest, MalformedRequest, Refusal
from authd.sessions import LogoutScope, SessionView

FORM_FIELDS_MAX = 32


class RegisterRequest(msgspec.Struct):
    username: str
    password: str
    full_name: str | None = None

    def __repr__(self) -> str:
        return "RegisterRequest(***)"


class RefreshRequest(msgspec.Struct):
    refresh_token: str

    def __repr__(self) -> str:
        return "RefreshRequest(***)"


class LogoutRequest(msgspec.Struct):
    scope: LogoutScope = "all"


class SessionsReply(msgspec.Struct):
    sessions: list[SessionView]


class StatusReply(msgspec.Struct):
    status: str = "success"


class UnsupportedMediaType(Refusal):
    code = "unsupported_media_type"

    def __init__(self, wanted: str) -> None:
        self.detail = f"The body must be {wanted}."
        super().__init__()


Body = TypeVar("Body", bound=msgspec.Struct)


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The body as `kind`; unknown fields are ignored, as old clients expect.

    :raises UnsupportedMediaType, MalformedRequest, InvalidRequest:
    """
    # Old clients may name no type at all; most name just this one, and to take it apart costs more than to compare it.
    if request.headers.get("Content-Type") != "application/json":
        mimetype = request.mimetype
        if mimetype and mimetype != "application/json" and not mimetype.endswith("+json"):
            raise UnsupportedMediaType("application/json")
    body = await request.body
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise _field_errors(body, kind) from None


async def read_form(request: Request, *required: str) -> dict[str, str]:
    """The fields of an urlencoded form. An empty value counts as missing (RFC 6749, 3.1).

    :raises UnsupportedMediaType, MalformedRequest, InvalidRequest: the last also for a field given twice.
    """
    if request.mimetype != "application/x-www-form-urlencoded":
        raise UnsupportedMediaType("application/x-www-form-urlencoded")
    body = await request.body
    try:
        pairs = parse_qsl(body.decode(), errors="strict", max_num_fields=FORM_FIELDS_MAX)
    except ValueError:
        raise MalformedRequest("The body is not an urlencoded form in UTF-8.") from None
    fields = dict(pairs)
    errors = {name: "This field is required." for name in required if name not in fields}
    names = [name for name, _ in pairs]
    errors |= {name: "This field stands more than once." for name in required if names.count(name) > 1}
    if errors:
        raise InvalidRequest(errors)
    return fields


async def read_logout_scope(request: Request) -> LogoutScope:
    """The `scope` of the query, or of a JSON body or a form; `all` where there is none, and old clients send none.

    :raises MalformedRequest, InvalidRequest:
    """
    scope = request.args.get("scope")
    if scope is None and request.mimetype == "application/x-www-form-urlencoded":
        scope = (await read_form(request)).get("scope")
    elif scope is None and request.mimetype == "application/json" and await request.body:
        # Not by its length, which a chunked body does not tell: to overlook `current` there would end all.
        return (await read_json(request, LogoutRequest)).scope
    try:
        return msgspec.convert({} if scope is None else {"scope": scope}, LogoutRequest).scope
    except msgspec.ValidationError:
        raise InvalidRequest({"scope": "One of current, others and all is taken."}) from None


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, content_type="application/json")


def _field_errors(body: bytes, kind: type[msgspec.Struct]) -> Refusal:
    """Every field that is missing or of a wrong type: msgspec itself stops at the first, and reads no further."""
    errors = {}
    try:
        # Raw, so that nothing is built of what nobody asked for: a body of empty lists takes 50 ms otherwise.
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        for field in msgspec.structs.fields(kind):
            if field.encode_name not in members:
                if field.required:
                    errors[field.encode_name] = "This field is required."
                continue
            try:
                msgspec.json.decode(members[field.encode_name], type=field.type)
            except msgspec.ValidationError:
                errors[field.encode_name] = "This field has a wrong type."
    except msgspec.ValidationError:
        return MalformedRequest("The body is not a JSON object.")
    except (ValueError, RecursionError):
        return MalformedRequest("The body is not JSON in UTF-8.")
    return InvalidRequest(errors)
