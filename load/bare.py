"""What Quart on Hypercorn with one script call costs: the least that authd could cost. `load/bench` starts it.

It refreshes nothing and knows nobody: it reads a body, runs a script with as many arguments as a rotation has and as
long a reply, and answers as many bytes as authd.
"""

import sys

import anyio
import hypercorn.asyncio
import msgspec
from hypercorn.config import Config
from quart import Quart, Response, request
from redis.asyncio import Redis

ROTATE = """
redis.call('HMGET', KEYS[1], ARGV[1], 'e')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[11])
return { 'rotated', redis.call('TIME')[1], ARGV[11] }
"""
INSPECT = "return { 'live', redis.call('GET', KEYS[3]) or '', redis.call('HGET', KEYS[1], ARGV[1]) or '' }"
KEYS = ["bare:{1}:user:1", "bare:{1}:applied", "bare:{1}:profile:1"]
NUMBERS = [1_800_000_000_000] * 9
VALUE = "v" * 60
#: As long as authd's answers.
ACCESS_CHARS, REFRESH_CHARS, PROFILE_CHARS = 330, 150, 80


class Body(msgspec.Struct):
    refresh_token: str


def make_app(redis: Redis) -> Quart:
    app = Quart(__name__, static_folder=None, template_folder=None)
    rotate, inspect = redis.register_script(ROTATE), redis.register_script(INSPECT)

    @app.post("/auth/refresh_token")
    async def refresh() -> Response:
        body = msgspec.json.decode(await request.get_data(), type=Body)
        await rotate(KEYS[:2], ["session", *NUMBERS, VALUE, len(body.refresh_token)])
        pair = {"access_token": "x" * ACCESS_CHARS, "refresh_token": "y" * REFRESH_CHARS}
        return Response(msgspec.json.encode(pair), content_type="application/json")

    @app.get("/auth/me")
    async def me() -> Response:
        await inspect(KEYS, ["session", len(request.headers["Authorization"])])
        return Response(msgspec.json.encode({"username": "x" * PROFILE_CHARS}), content_type="application/json")

    return app


async def serve(bind: str, redis_url: str) -> None:
    config = Config()
    config.bind = [bind]
    config.errorlog = None
    async with Redis.from_url(redis_url) as redis:
        await hypercorn.asyncio.serve(make_app(redis), config, mode="asgi")


if __name__ == "__main__":
    anyio.run(serve, *sys.argv[1:], backend_options={"use_uvloop": True})
