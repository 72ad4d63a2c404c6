"""What endpoints answer: JSON, and the replies that have nothing of their own to say."""

import msgspec
from quart import Response

JSON = "application/json"


class StatusReply(msgspec.Struct):
    status: str = "success"


class Empty(msgspec.Struct):
    """Nothing: that the answer came is all there is to say."""


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, content_type=JSON)
