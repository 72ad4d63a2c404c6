"""The endpoint that says whose a token is."""

from quart import Request, Response

from authd.infra.http.endpoint import BEARER, Endpoint, Endpoints
from authd.infra.http.replies import json_response
from authd.users.profile import Profile, Profiles


def make_user_endpoints(profiles: Profiles) -> list[Endpoint]:
    endpoint = Endpoints()

    @endpoint("GET", "/auth/me", "Who the user is", auth=BEARER, reply=Profile)
    async def me(request: Request, token: str) -> Response:
        return json_response(await profiles.read(token))

    return endpoint.declared
