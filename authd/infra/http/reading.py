"""Reads what comes over the wire: JSON as structs, forms and queries as texts."""

from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from quart import Request
from werkzeug.exceptions import RequestEntityTooLarge

from authd.errors import InvalidRequest, MalformedRequest, Refusal, UnsupportedMediaType

FORM_FIELDS_MAX = 32
#: A form of `%4` would hold up everybody for 0.3 s at the highest AUTHD_BODY_MAX_BYTES. The longest username and
#: password that are checked, each byte of them escaped, have 28,000.
FORM_BYTES_MAX = 32_768
#: Taking a type with its parameters apart costs far more than its length in bytes suggests.
CONTENT_TYPE_CHARS_MAX = 256


Body = TypeVar("Body", bound=msgspec.Struct)
#: The names and values of a form in their order.
Pairs = Sequence[tuple[str, str]]


async def read_json(request: Request, kind: type[Body]) -> Body:
    """Return the body as `kind`; unknown fields are ignored, as old clients expect.

    :raises UnsupportedMediaType, MalformedRequest, InvalidRequest:
    """
    # Old clients may name no type at all; most name just this one, and to take it apart costs more than to compare it.
    if request.headers.get("Content-Type") != "application/json":
        mimetype = media_type(request, "application/json")
        if mimetype and mimetype != "application/json" and not mimetype.endswith("+json"):
            raise UnsupportedMediaType("application/json")
    body = await request.body
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        raise _field_errors(body, kind) from None


async def read_form(request: Request, *required: str) -> dict[str, str]:
    """Return the fields of an urlencoded form. An empty value counts as missing (RFC 6749, 3.1).

    :raises UnsupportedMediaType, RequestEntityTooLarge, MalformedRequest, InvalidRequest: the last also for a field
        given twice.
    """
    return form_fields(await read_form_pairs(request), *required)


async def read_form_pairs(request: Request) -> Pairs:
    """Return the names and values of an urlencoded form, for `form_fields`.

    :raises UnsupportedMediaType, RequestEntityTooLarge, MalformedRequest:
    """
    wanted = "application/x-www-form-urlencoded"
    if media_type(request, wanted) != wanted:
        raise UnsupportedMediaType(wanted)
    body = await request.body
    if len(body) > FORM_BYTES_MAX:
        raise RequestEntityTooLarge
    try:
        return parse_qsl(body.decode(), errors="strict", max_num_fields=FORM_FIELDS_MAX)
    except ValueError:
        raise MalformedRequest("The body is not an urlencoded form in UTF-8.") from None


def form_fields(pairs: Pairs, *required: str) -> dict[str, str]:
    """Return the fields of a form that has each of `required` once.

    :raises InvalidRequest:
    """
    fields = dict(pairs)
    errors = {name: "This field is required." for name in required if name not in fields}
    names = [name for name, _ in pairs]
    errors |= {name: "This field appears more than once." for name in required if names.count(name) > 1}
    if errors:
        raise InvalidRequest(errors)
    return fields


def media_type(request: Request, wanted: str) -> str:
    """Return the type of the body in lower case, without its parameters; empty where there is none.

    :raises UnsupportedMediaType: over one that is too long.
    """
    if len(request.headers.get("Content-Type", "")) > CONTENT_TYPE_CHARS_MAX:
        raise UnsupportedMediaType(wanted)
    return request.mimetype


def query_field(request: Request, name: str) -> str | None:
    """Return the first value of a field of the query; None where there is none.

    :raises MalformedRequest:
    """
    try:
        pairs = parse_qsl(request.query_string.decode(), keep_blank_values=True, max_num_fields=FORM_FIELDS_MAX)
    except ValueError:
        raise MalformedRequest(f"The query is not UTF-8, or has more than {FORM_FIELDS_MAX} fields.") from None
    return next((value for found, value in pairs if found == name), None)


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
