"""The list of stable codes and the map to HTTP say the same."""

import re
from collections.abc import Iterator
from typing import get_args

import pytest

# Imported for their refusals: a subclass may stand beside the code that raises it.
from authd import errors
from authd.errors import (
    InvalidRequest,
    LoginLocked,
    MalformedRequest,
    RefreshRefusalCode,
    RefreshRefused,
    Refusal,
    RegistrationLimited,
    Unavailable,
    UnsupportedMediaType,
)
from authd.infra.http import app
from authd.infra.http.problems import PROBLEMS, deadline_response, refusal_response
from authd.infra.http.server import protocol

PARTS = ("user_store", "session_store", "hashing", "deadline")
#: What the edge says itself, without a refusal of the domain.
OF_THE_EDGE = {
    "internal_error",
    "malformed_request",
    "connections_full",
    "body_timeout",
    *app._HTTP_CODES.values(),
    *protocol._DETAILS,
}
WITH_ARGUMENTS = {
    MalformedRequest,
    InvalidRequest,
    LoginLocked,
    RefreshRefused,
    RegistrationLimited,
    Unavailable,
    UnsupportedMediaType,
    UnsupportedMediaType,
}


def subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def every_refusal() -> list[Refusal]:
    plain = [kind() for kind in subclasses(Refusal) if kind not in WITH_ARGUMENTS]
    return [
        *plain,
        MalformedRequest("Not this."),
        InvalidRequest({"username": "Needed."}),
        LoginLocked(17),
        RegistrationLimited(17),
        UnsupportedMediaType("application/json"),
        *(RefreshRefused(code) for code in get_args(RefreshRefusalCode)),
        *(Unavailable(part) for part in PARTS),
    ]


def test_every_part_that_can_be_away_is_in_this_test() -> None:
    assert set(errors._UNAVAILABLE) == set(PARTS)


def test_every_refusal_has_a_problem_and_every_problem_a_source() -> None:
    assert {refusal.code for refusal in every_refusal()} | OF_THE_EDGE == PROBLEMS.keys()


def test_every_code_belongs_to_one_kind_of_refusal() -> None:
    kinds: dict[str, set[type]] = {}
    for refusal in every_refusal():
        kinds.setdefault(refusal.code, set()).add(type(refusal))
    assert {code: found for code, found in kinds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("refusal", every_refusal(), ids=lambda refusal: refusal.code)
async def test_refusals_are_plain_sentences_that_name_no_internal_part(refusal: Refusal) -> None:
    assert re.fullmatch(r"[A-Z].*\.", refusal.detail)
    assert not re.search(r"redis|postgres|kafka|sql|lua|hash|bcrypt|None|\{", refusal.detail, re.IGNORECASE)
    response = refusal_response(refusal)
    assert response.content_type == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    body = await response.get_json(force=True)
    assert (body["code"], body["detail"], body["status"]) == (refusal.code, refusal.detail, response.status_code)
    assert body["type"] == f"urn:authd:problem:{refusal.code}"


@pytest.mark.parametrize("refusal", every_refusal(), ids=lambda refusal: refusal.code)
def test_headers_follow_the_status(refusal: Refusal) -> None:
    response = refusal_response(refusal)
    assert (response.status_code in (429, 503)) == ("Retry-After" in response.headers)
    assert (response.status_code == 401) == ("WWW-Authenticate" in response.headers)


def test_an_invalid_access_token_has_its_rfc_6750_code_and_a_missing_one_has_none() -> None:
    invalid = refusal_response(errors.InvalidAccessToken())
    assert invalid.headers["WWW-Authenticate"] == 'Bearer realm="authd", error="invalid_token"'
    missing = refusal_response(errors.MissingToken())
    assert missing.headers["WWW-Authenticate"] == 'Bearer realm="authd"'


async def test_an_invalid_request_names_its_fields() -> None:
    response = refusal_response(InvalidRequest({"username": "A.", "password": "B."}))
    assert response.status_code == 422
    assert (await response.get_json(force=True))["errors"] == [
        {"field": "username", "detail": "A."},
        {"field": "password", "detail": "B."},
    ]


def test_waiting_times_are_said() -> None:
    assert refusal_response(LoginLocked(17)).headers["Retry-After"] == "17"
    assert refusal_response(Unavailable("hashing", 4)).headers["Retry-After"] == "4"
    assert deadline_response().headers["Retry-After"] == "1"
    assert deadline_response().status_code == 503
