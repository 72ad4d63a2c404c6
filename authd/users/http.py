"""The endpoint that says whose a token is."""

from collections.abc import Awaitable, Callable

from quart import Request, Response

from authd.infra.http.endpoint import BEARER, Endpoint, Endpoints
from authd.infra.http.replies import json_response
from authd.users.profile import Profile


def make_user_endpoints(find_profile: Callable[[str], Awaitable[Profile]]) -> list[Endpoint]:
    """`find_profile`: of the user of an access token."""
    endpoint = Endpoints()

    @endpoint("GET", "/auth/me", "Who the user is", auth=BEARER, reply=Profile)
    async def me(request: Request, token: str) -> Response:
        return json_response(await find_profile(token))

    return endpoint.declared
