"""One request and its answer, in one task.

Quart's own connection starts two tasks for each request and reads a queue that Hypercorn fills. Here the bytes of the
body go straight to the request, and a client that hangs up cancels the handler: the same, at a fraction of the cost.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import structlog
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.config import Config
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, HTTPScope, Scope
from quart.asgi import ASGIHTTPConnection
from quart.utils import encode_headers

from authd.http.app import App

Send = Callable[[ASGISendEvent | None], Awaitable[None]]

_log = structlog.get_logger()


class Exchanges(TaskGroup):
    """The requests of one connection, as Hypercorn's protocol starts them."""

    async def spawn_app(
        self, app: AppWrapper, config: Config, scope: Scope, send: Send
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        exchange = Exchange(cast(App, app), cast(HTTPScope, scope), send)
        exchange.task = self._task_group.create_task(exchange.run())
        return exchange.receive


class Exchange(ASGIHTTPConnection):
    task: "asyncio.Task[None]"

    def __init__(self, app: App, scope: HTTPScope, send: Send) -> None:
        super().__init__(app, scope)
        self._send = send
        self._request = self._create_request_from_scope(send)

    async def receive(self, message: ASGIReceiveEvent) -> None:
        """Take what the client sent, or that it is gone."""
        if message["type"] == "http.request":
            self._request.body.append(message["body"])
            if not message["more_body"]:
                self._request.body.set_complete()
        elif self.task is not asyncio.current_task():  # who has answered in full comes here too
            self.task.cancel()

    async def run(self) -> None:
        try:
            response: Any = await self.app.handle_request(self._request)
            body = await response.get_data(as_text=False)
            headers = encode_headers(response.headers)
            await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        except Exception as error:
            _log.error("fault", exc_info=error)
        finally:
            await self._send(None)  # the end, and a bare 500 where nothing was sent
