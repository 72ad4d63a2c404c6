"""The endpoint that adds a user."""

from typing import Annotated

import msgspec
from msgspec import Meta
from quart import Request, Response

from authd.accounts.registration import FULL_NAME_CHARS_MAX, Accounts
from authd.config import Settings
from authd.errors import CrossSite, RegistrationLimited, UsernameTaken
from authd.infra.http.address import find_caller
from authd.infra.http.cors import refuse_cross_site
from authd.infra.http.endpoint import PUBLIC, Endpoint, Endpoints
from authd.infra.http.reading import read_json
from authd.infra.http.replies import json_response
from authd.passwords.formats import PASSWORD_BYTES_MAX, PASSWORD_CHARS_MIN
from authd.users.profile import Profile
from authd.users.usernames import USERNAME_CHARS_MAX

# For the description alone: a value that breaks one of them is refused by `Accounts`, with a sentence.
_USERNAME = Meta(extra_json_schema={"format": "email", "maxLength": USERNAME_CHARS_MAX})
_PASSWORD = Meta(extra_json_schema={"minLength": PASSWORD_CHARS_MIN, "maxLength": PASSWORD_BYTES_MAX})
_FULL_NAME = Meta(extra_json_schema={"maxLength": FULL_NAME_CHARS_MAX})


class RegisterRequest(msgspec.Struct):
    username: Annotated[str, _USERNAME]
    password: Annotated[str, _PASSWORD]
    full_name: Annotated[str | None, _FULL_NAME] = None

    def __repr__(self) -> str:
        return "RegisterRequest(***)"


def make_account_endpoints(settings: Settings, accounts: Accounts) -> list[Endpoint]:
    endpoint = Endpoints()

    @endpoint(
        "POST",
        "/auth/register",
        "Add a user",
        auth=PUBLIC,
        body=RegisterRequest,
        reply=Profile,
        status=201,
        refusals=(CrossSite, UsernameTaken, RegistrationLimited, "login_busy", "user_store_unavailable"),
    )
    async def register(request: Request) -> Response:
        # A body without a type is JSON here, for old clients, and a page may send one without asking.
        refuse_cross_site(request, settings.cors_origins)
        body = await read_json(request, RegisterRequest)
        caller = find_caller(request, settings.trusted_proxies)
        profile = await accounts.register(body.username, body.password, body.full_name or "", caller.address)
        return json_response(profile, 201)

    return endpoint.declared
