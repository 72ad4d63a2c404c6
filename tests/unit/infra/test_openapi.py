"""The description of the endpoints, held to the endpoints."""

import re
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from quart import Request, Response
from support.declared import ISSUER, declared_endpoints

from authd.config import Settings
from authd.infra.http.app import App, AppSettings
from authd.infra.http.endpoint import PUBLIC, Endpoints
from authd.infra.http.openapi import ANYWHERE, describe
from authd.infra.http.problems import PROBLEMS
from authd.infra.http.replies import StatusReply, json_response

#: Answered where there is no endpoint to describe.
OF_NO_ENDPOINT = {"method_not_allowed"}
ENDPOINTS = declared_endpoints()


@pytest.fixture
def document() -> dict[str, Any]:
    return cast(dict[str, Any], msgspec.json.decode(msgspec.json.encode(describe(ISSUER, ENDPOINTS))))


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(path, method): found for path, methods in document["paths"].items() for method, found in methods.items()}


def resolve(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        assert node["$ref"].startswith("#/")
        found: Any = document
        for part in node["$ref"][2:].split("/"):
            found = found[part]
        node = found
    return node


def test_every_route_is_described_and_no_other(
    document: dict[str, Any], make_settings: Callable[..., Settings]
) -> None:
    served = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in App(make_settings().section(AppSettings), ENDPOINTS).url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }
    assert operations(document).keys() == served
    assert len(ENDPOINTS) == len(served) > 10


def test_what_is_for_operators_is_described_where_it_is_served() -> None:
    outer = {endpoint.name: endpoint for endpoint in declared_endpoints(AUTHD_OPERATIONS_BIND="127.0.0.1:8001")}
    assert {endpoint.name for endpoint in ENDPOINTS} - outer.keys() == {"GET /metrics"}
    assert outer["GET /readyz"].reply is StatusReply


def test_an_optional_body_a_query_and_a_cookie_are_described() -> None:
    endpoint = Endpoints()

    @endpoint(
        "POST",
        "/seats/<row>",
        "A test",
        auth=PUBLIC,
        reply=None,
        body=StatusReply,
        is_body_optional=True,
        query=StatusReply,
        cookies=["seat"],
    )
    async def sit(request: Request, row: str) -> Response:
        return json_response(row)

    operation = describe(ISSUER, endpoint.declared)["paths"]["/seats/{row}"]["post"]
    assert not operation["requestBody"]["required"]
    assert [(each["name"], each["in"], each["required"]) for each in operation["parameters"]] == [
        ("row", "path", True),
        ("status", "query", False),
        ("seat", "cookie", False),
    ]


def test_every_code_is_listed_where_it_can_come_and_none_is_invented(document: dict[str, Any]) -> None:
    listed = set()
    for endpoint in ENDPOINTS:
        responses = operations(document)[endpoint.template, endpoint.method.lower()]["responses"]
        found = {
            (int(status), code)
            for status, response in responses.items()
            for media, content in resolve(document, response)["content"].items()
            if media == "application/problem+json"
            for code in content["schema"]["allOf"][1]["properties"]["code"]["enum"]
        }
        assert found == {(PROBLEMS[code][0], code) for code in (*endpoint.codes, *ANYWHERE)}
        listed |= {code for _, code in found}
    assert listed | OF_NO_ENDPOINT == PROBLEMS.keys()


def test_every_reference_leads_somewhere_and_everything_is_used(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref":"([^"]+)"', msgspec.json.encode(document).decode()))
    for reference in references:
        resolve(document, {"$ref": reference})
    kept = {f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in document["components"][kind]}
    assert references == kept


def test_bodies_and_security_are_those_of_the_endpoints(document: dict[str, Any]) -> None:
    for endpoint in ENDPOINTS:
        operation = operations(document)[endpoint.template, endpoint.method.lower()]
        assert ("requestBody" in operation) == (endpoint.body is not None) == ("invalid_request" in endpoint.codes)
        assert (["bearer"] in [list(each) for each in operation.get("security", [])]) == (
            "token_missing" in endpoint.codes
        )
        assert (["client"] in [list(each) for each in operation.get("security", [])]) == (
            "invalid_client" in endpoint.codes
        )
        assert ({"session_id"} if "<" in endpoint.path else set()) == {
            each["name"] for each in operation.get("parameters", []) if each["in"] == "path"
        }


@pytest.mark.parametrize(("issuer", "servers"), [(ISSUER, [{"url": ISSUER[:-1]}]), ("authd", None)])
def test_the_server_is_named_where_the_issuer_is_a_url(issuer: str, servers: object) -> None:
    assert describe(issuer, ENDPOINTS).get("servers") == servers
