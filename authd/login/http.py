"""The endpoint that opens a session for whoever knows a password."""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType
from quart import Request, Response

from authd.config import Settings
from authd.errors import CrossSite, InvalidCredentials, LoginLocked, SessionLimit
from authd.infra.http.address import find_caller
from authd.infra.http.cors import refuse_cross_site
from authd.infra.http.endpoint import FORM, NO_STORE, PUBLIC, STORES_UNAVAILABLE, Endpoint, Endpoints
from authd.infra.http.reading import read_form
from authd.infra.http.replies import json_response
from authd.login.login import Login, LoginPair


class LoginForm(msgspec.Struct):
    """The password grant of OAuth 2. What is optional here is not read."""

    username: Annotated[str, Meta(min_length=1)]
    password: Annotated[str, Meta(min_length=1)]
    grant_type: str | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET


def make_login_endpoints(settings: Settings, logins: Login) -> list[Endpoint]:
    endpoint = Endpoints()

    @endpoint(
        "POST",
        "/auth/login",
        "Open a session",
        auth=PUBLIC,
        body=LoginForm,
        body_media=FORM,
        reply=LoginPair,
        refusals=(CrossSite, InvalidCredentials, LoginLocked, SessionLimit, "login_busy", *STORES_UNAVAILABLE),
        cache=NO_STORE,
    )
    async def login(request: Request) -> Response:
        refuse_cross_site(request, settings.cors_origins)
        form = await read_form(request, "username", "password")
        caller = find_caller(request, settings.trusted_proxies)
        device_token = form.get("device_token") or request.headers.get("X-Device-Token", "")
        return json_response(await logins.log_in(form["username"], form["password"], caller, device_token))

    return endpoint.declared
