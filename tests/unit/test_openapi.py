"""The description of the endpoints, held to the endpoints."""

import re
from typing import Any, cast

import msgspec
import pytest

from authd.config import Settings, parse_settings
from authd.infra.http.app import App
from authd.infra.http.openapi import ANYWHERE, ROUTES, describe, make_openapi
from authd.infra.http.problems import PROBLEMS
from authd.infra.observe.http import make_operations
from authd.login.http import make_credentials
from authd.oauth.http import make_oauth

ISSUER = "https://auth.example.com/"
#: Answered where there is no endpoint to describe.
OF_NO_ENDPOINT = {"method_not_allowed"}


@pytest.fixture
def settings() -> Settings:
    names = {"AUTHD_DATABASE_URL": "postgresql://x", "AUTHD_REDIS_URL": "redis://x", "AUTHD_SECRET": "s" * 32}
    return parse_settings(names)


@pytest.fixture
def document() -> dict[str, Any]:
    return cast(dict[str, Any], msgspec.json.decode(msgspec.json.encode(describe(ISSUER))))


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


def test_every_route_is_described_and_no_other(document: dict[str, Any], settings: Settings) -> None:
    nothing = cast(Any, None)  # what the endpoints use is not needed to list them
    blueprints = [
        make_credentials(settings, nothing, nothing),
        make_oauth(settings, nothing, nothing),
        make_operations(settings, nothing, nothing),
        make_openapi(settings),
    ]
    served = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in App(settings, blueprints).url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }
    assert operations(document).keys() == served
    assert len(ROUTES) == len(served)


def test_every_code_is_listed_where_it_can_come_and_none_is_invented(document: dict[str, Any]) -> None:
    listed = set()
    for route in ROUTES:
        responses = operations(document)[route.path, route.method]["responses"]
        found = {
            (int(status), code)
            for status, response in responses.items()
            for media, content in resolve(document, response)["content"].items()
            if media == "application/problem+json"
            for code in content["schema"]["allOf"][1]["properties"]["code"]["enum"]
        }
        assert found == {(PROBLEMS[code][0], code) for code in (*route.codes, *ANYWHERE)}
        listed |= {code for _, code in found}
    assert listed | OF_NO_ENDPOINT == PROBLEMS.keys()


def test_every_reference_leads_somewhere_and_everything_is_used(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"\$ref":"([^"]+)"', msgspec.json.encode(document).decode()))
    for reference in references:
        resolve(document, {"$ref": reference})
    kept = {f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in document["components"][kind]}
    assert references == kept


def test_bodies_and_security_are_those_of_the_endpoints(document: dict[str, Any]) -> None:
    for route in ROUTES:
        operation = operations(document)[route.path, route.method]
        assert ("requestBody" in operation) == (route.body is not None) == ("invalid_request" in route.codes)
        assert (["bearer"] in [list(each) for each in operation.get("security", [])]) == (
            "token_missing" in route.codes
        )
        assert (["client"] in [list(each) for each in operation.get("security", [])]) == (
            "invalid_client" in route.codes
        )
        assert ({"session_id"} if "{" in route.path else set()) == {
            each["name"] for each in operation.get("parameters", []) if each["in"] == "path"
        }


@pytest.mark.parametrize(("issuer", "servers"), [(ISSUER, [{"url": ISSUER[:-1]}]), ("authd", None)])
def test_the_server_is_named_where_the_issuer_is_a_url(issuer: str, servers: object) -> None:
    assert describe(issuer).get("servers") == servers
