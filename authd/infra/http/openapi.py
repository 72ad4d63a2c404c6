"""Describes the declared endpoints (OpenAPI 3.1)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from quart import Request, Response

from authd import __version__
from authd.infra.http.endpoint import PUBLIC, Endpoint, Endpoints
from authd.infra.http.problems import MEDIA_TYPE, PROBLEMS
from authd.infra.http.replies import Empty, json_response

OPENAPI_MAX_AGE_S = 300

#: Whatever the request, these can come: the connection or the process is in trouble, not the endpoint.
ANYWHERE = (
    *("bad_http", "headers_too_large", "target_too_long", "transfer_coding_unknown", "http_version_unknown"),
    *("connections_full", "deadline_exceeded", "internal_error"),
)
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}}


class FieldError(msgspec.Struct):
    field: str
    detail: str


class Problem(msgspec.Struct):
    """Every refusal (RFC 9457). Clients may branch on `code`; `detail` is for people. `error`: as RFC 6749 has it."""

    type: Annotated[str, Meta(pattern="^urn:authd:problem:")]
    title: str
    status: int
    detail: str
    code: str
    error: str | UnsetType = UNSET
    errors: list[FieldError] | UnsetType = UNSET


def make_openapi_endpoints(issuer: str, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    """Return the endpoint that describes `endpoints` and itself; see `describe`."""
    endpoint = Endpoints()

    @endpoint(
        "GET",
        "/openapi.json",
        "This description",
        auth=PUBLIC,
        reply=Empty,
        cache=f"public, max-age={OPENAPI_MAX_AGE_S}",
    )
    async def openapi(request: Request) -> Response:
        return json_response(document)

    document = msgspec.Raw(msgspec.json.encode(describe(issuer, [*endpoints, *endpoint.declared])))
    return endpoint.declared


def describe(issuer: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the document. `issuer` is named as the server where it is a URL."""
    used = {Problem, *(kind for each in endpoints for kind in (each.reply, each.body) if kind is not None)}
    kinds = sorted(used, key=str)
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    refusals: dict[str, Any] = {}
    schemes: dict[str, Any] = {}
    for endpoint in endpoints:
        paths[endpoint.template][endpoint.method.lower()] = _operation(endpoint, refusals)
        schemes |= endpoint.auth.schemes
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "authd", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "responses": refusals, "securitySchemes": schemes},
    }
    return document | ({"servers": [{"url": issuer.rstrip("/")}]} if issuer.startswith("http") else {})


def _operation(endpoint: Endpoint, refusals: dict[str, Any]) -> dict[str, Any]:
    """Return the operation; the refusals that it points to are added."""
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": _responses(endpoint, refusals)}
    parameters = _parameters(endpoint)
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = _content(endpoint.body, endpoint.body_media)
        operation["requestBody"] = {"required": not endpoint.is_body_optional, "content": content}
    if endpoint.auth.security:
        operation["security"] = endpoint.auth.security
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    parameters = [_parameter(name, "path", {"type": "string", "minLength": 1}) for name in endpoint.variables]
    for field in msgspec.structs.fields(endpoint.query) if endpoint.query is not None else ():
        schema = msgspec.json.schema(field.type)
        parameters.append(_parameter(field.encode_name, "query", schema, is_required=field.required))
    parameters += [
        _parameter(name, "cookie", {"type": "string"}, is_required=False) for name in sorted(endpoint.cookies)
    ]
    return parameters


def _responses(endpoint: Endpoint, refusals: dict[str, Any]) -> dict[str, Any]:
    content = _content(endpoint.reply, endpoint.reply_media)
    responses: dict[str, Any] = {str(endpoint.status): {"description": endpoint.summary, "content": content}}
    by_status: dict[int, list[str]] = defaultdict(list)
    for code in (*endpoint.codes, *ANYWHERE):
        by_status[PROBLEMS[code][0]].append(code)
    for status, codes in by_status.items():
        name = ".".join(codes)
        refusals[name] = refusal = _refusal(status, codes)
        responses[str(status)] = _reference("responses", name)
        if status in endpoint.other_statuses:
            responses[str(status)] = refusal | {"content": refusal["content"] | content}
    return responses


def _refusal(status: int, codes: list[str]) -> dict[str, Any]:
    schema = {"allOf": [_reference("schemas", "Problem"), {"properties": {"code": {"enum": codes}}}]}
    refusal = {"description": PROBLEMS[codes[0]][1], "content": {MEDIA_TYPE: {"schema": schema}}}
    return refusal | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})


def _content(kind: type[msgspec.Struct] | None, media: str) -> dict[str, Any]:
    return {media: {"schema": {"type": "string"} if kind is None else _reference("schemas", kind.__name__)}}


def _parameter(name: str, place: str, schema: dict[str, Any], *, is_required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": place, "required": is_required, "schema": schema}


def _reference(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}
