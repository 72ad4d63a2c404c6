"""One request and its answer, in one task.

Hypercorn's stream, its queue and Quart's two tasks stand between a connection and a handler elsewhere. Here the body's
bytes go straight to the request, a client that hangs up cancels the handler, and the answer is handed over as a whole:
the same, at a fraction of the cost.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from hypercorn.protocol.events import Body, EndBody, Event
from hypercorn.typing import HTTPScope
from quart.asgi import ASGIHTTPConnection
from quart.utils import encode_headers

from authd.infra.http.app import FAULT_DETAIL, App
from authd.infra.http.problems import PROBLEMS, problem_body, problem_headers
from authd.infra.observe import metrics

Headers = list[tuple[bytes, bytes]]
#: Sends a status, headers and a body; the connection is ready for the next request afterwards, or closed.
Answer = Callable[[int, Headers, bytes], Awaitable[None]]

_log = structlog.get_logger()


class Exchange(ASGIHTTPConnection):
    """What Hypercorn's protocol takes for its stream."""

    def __init__(self, app: App, scope: HTTPScope, answer: Answer, tasks: asyncio.TaskGroup) -> None:
        super().__init__(app, scope)
        self._answer = answer
        self._request = self._create_request_from_scope(_push_nothing)
        self._task = tasks.create_task(self._run())

    async def handle(self, event: Event) -> None:
        """Take a part of the body, its end, or the end of the whole."""
        if isinstance(event, Body):
            self._request.body.append(bytes(event.data))
        elif isinstance(event, EndBody):
            self._request.body.set_complete()
        elif self._task is not asyncio.current_task():  # the client hung up, and it is not that we have answered
            self._task.cancel()

    async def _run(self) -> None:
        try:
            response: Any = await self.app.handle_request(self._request)
            answer = response.status_code, encode_headers(response.headers), await response.get_data(as_text=False)
        except (Exception, asyncio.CancelledError) as error:
            if self._task.cancelling():
                raise
            # Also a cancellation that nobody asked for, as of a future of somebody else's.
            _log.error("fault", exc_info=error)
            body = problem_body("internal_error", FAULT_DETAIL)
            answer = PROBLEMS["internal_error"][0], problem_headers(len(body)), body
            metrics.refusals.labels("internal_error").inc()
        await self._answer(*answer)


async def _push_nothing(*_: Any) -> None:
    """Server push is a thing of HTTP/2."""
