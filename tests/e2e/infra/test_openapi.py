"""Schemathesis against the real process: whatever the description permits or forbids, no answer is undocumented."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.api import Account
from support.declared import declared_endpoints
from support.process import ServiceProcess
from support.services import Services

from authd.infra.http.endpoint import Endpoint

EXAMPLES_MAX = 60
#: All the examples of one endpoint, each of which hashes a password at most twice.
WITHIN_S = 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ENDPOINTS = declared_endpoints()
SECURED = [endpoint for endpoint in ENDPOINTS if endpoint.auth.security]


@dataclass(frozen=True)
class Target:
    process: ServiceProcess
    schema: Any
    account: Account
    #: Of a registered service client: its id and secret.
    client: tuple[str, str]


@pytest.fixture(scope="module")
async def target(services: Services) -> AsyncIterator[Target]:
    # So many wrong passwords from one address are what is wanted here.
    unlimited = {"AUTHD_ADDRESS_MAX_FAILURES": "100000", "AUTHD_ACCOUNT_MAX_FAILURES": "10000"}
    async with services.running(AUTHD_MAX_LOGIN_ATTEMPTS="1000", **unlimited) as process, process.api() as api:
        document = (await api.get("/openapi.json")).json()
        added = await process.run("clients", "add", "schemathesis")
        client_id, secret = (line.partition("=")[2] for line in added.stdout.splitlines())
        process.secrets.add(secret)
        yield Target(process, schemathesis.openapi.from_dict(document), await api.new_account(), (client_id, secret))


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def fuzz(target: Target, session: requests.Session, method: str, path: str, security: str | None) -> None:
    operation = target.schema[path][method.upper()]
    cases = one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @given(case=cases)
    @settings(
        max_examples=EXAMPLES_MAX,
        deadline=None,
        derandomize=True,  # a finding is a finding on every machine
        database=None,
        phases=[Phase.explicit, Phase.generate],  # to shrink takes longer than to read
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        kwargs: dict[str, Any] = {}
        if security == "bearer":  # each its own: many of them end it
            kwargs["headers"] = {"Authorization": f"Bearer {log_in(target, session)}"}
        elif security == "client":
            kwargs["auth"] = target.client
        answer = case.call(base_url=target.process.url, session=session, timeout=10, **kwargs)
        case.validate_response(answer, checks=CHECKS)

    run()


def log_in(target: Target, session: requests.Session) -> str:
    form = {"username": target.account.username, "password": target.account.password}
    pair = session.post(f"{target.process.url}/auth/login", data=form, timeout=10).json()
    target.process.secrets.add(pair["access_token"], pair["refresh_token"])
    token: str = pair["access_token"]
    return token


async def run_in_thread(target: Target, session: requests.Session, *what: str | None) -> None:
    with anyio.fail_after(WITHIN_S):
        await anyio.to_thread.run_sync(fuzz, target, session, *what, abandon_on_cancel=True)


@pytest.mark.proof
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_no_answer_is_undocumented_to_whoever_comes(
    target: Target, session: requests.Session, endpoint: Endpoint
) -> None:
    await run_in_thread(target, session, endpoint.method, endpoint.template, None)


@pytest.mark.proof
@pytest.mark.parametrize("endpoint", SECURED, ids=lambda endpoint: endpoint.name)
async def test_no_answer_is_undocumented_to_whoever_may(
    target: Target, session: requests.Session, endpoint: Endpoint
) -> None:
    await run_in_thread(target, session, endpoint.method, endpoint.template, *endpoint.auth.schemes)


async def test_what_the_description_promises_of_a_valid_request_comes(
    target: Target, session: requests.Session
) -> None:
    """The fuzzing above would also be content with a service that refuses everything."""
    url, token = target.process.url, log_in(target, session)
    bearer = {"Authorization": f"Bearer {token}"}

    def answers() -> dict[tuple[str, str], requests.Response]:
        return {
            ("get", "/auth/me"): session.get(f"{url}/auth/me", headers=bearer, timeout=10),
            ("get", "/auth/sessions"): session.get(f"{url}/auth/sessions", headers=bearer, timeout=10),
            ("post", "/auth/introspect"): session.post(
                f"{url}/auth/introspect", data={"token": token}, auth=target.client, timeout=10
            ),
            ("post", "/auth/revoke"): session.post(
                f"{url}/auth/revoke", data={"token": token}, auth=target.client, timeout=10
            ),
            **{
                ("get", endpoint.path): session.get(f"{url}{endpoint.path}", timeout=10)
                for endpoint in ENDPOINTS
                if not endpoint.codes and endpoint.method == "GET"
            },
        }

    for (method, path), answer in (await anyio.to_thread.run_sync(answers)).items():
        assert answer.status_code == 200, (path, answer.text)
        target.schema[path][method.upper()].Case().validate_response(answer, checks=CHECKS)
