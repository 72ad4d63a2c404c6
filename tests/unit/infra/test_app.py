"""The application refuses what it would ignore."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from quart import Blueprint, Quart, Request, Response, signals

from authd.config import Settings
from authd.infra.http.app import App, AppSettings, IgnoredHook
from authd.infra.http.endpoint import PUBLIC, Endpoints
from authd.infra.http.replies import json_response


async def hook(*_: object, **__: object) -> None:
    pytest.fail("nothing runs it")


async def surround() -> AsyncIterator[None]:
    yield


HOOKS: dict[str, Callable[[Blueprint], Any]] = {
    "before_request": lambda routes: routes.before_request(hook),
    "after_request": lambda routes: routes.after_request(hook),
    "teardown_request": lambda routes: routes.teardown_request(hook),
    "url_value_preprocessor": lambda routes: routes.url_value_preprocessor(hook),
    "before_websocket": lambda routes: routes.before_websocket(hook),
    "after_websocket": lambda routes: routes.after_websocket(hook),
    "teardown_websocket": lambda routes: routes.teardown_websocket(hook),
    "errorhandler": lambda routes: routes.errorhandler(404)(hook),
    "websocket": lambda routes: routes.websocket("/talk")(hook),
    "route": lambda routes: routes.get("/hidden")(hook),
}
APP_HOOKS: dict[str, Callable[[Blueprint], Any]] = {
    "before_app_request": lambda routes: routes.before_app_request(hook),
    "after_app_request": lambda routes: routes.after_app_request(hook),
    "teardown_app_request": lambda routes: routes.teardown_app_request(hook),
    "app_url_value_preprocessor": lambda routes: routes.app_url_value_preprocessor(hook),
    "before_app_serving": lambda routes: routes.before_app_serving(hook),
}
SERVING_HOOKS: dict[str, Callable[[Quart], Any]] = {
    "before_serving": lambda app: app.before_serving(hook),
    "after_serving": lambda app: app.after_serving(hook),
    "while_serving": lambda app: app.while_serving(surround),
}


def make_app(settings: Settings) -> App:
    endpoint = Endpoints()

    @endpoint("GET", "/found", "A test", auth=PUBLIC, reply=None)
    async def found(request: Request) -> Response:
        return json_response({})

    return App(settings.section(AppSettings), endpoint.declared)


@pytest.fixture(scope="module")
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.mark.parametrize("register", (HOOKS | APP_HOOKS).values(), ids=HOOKS | APP_HOOKS)
def test_a_blueprint_whose_hook_would_be_ignored_is_refused(
    settings: Settings, register: Callable[[Blueprint], Any]
) -> None:
    app, guarded = make_app(settings), Blueprint("guarded", __name__)
    register(guarded)
    with pytest.raises(IgnoredHook):
        app.register_blueprint(guarded)


@pytest.mark.parametrize(
    "register",
    [*(hook for name, hook in HOOKS.items() if name != "errorhandler"), *SERVING_HOOKS.values()],
    ids=[*(name for name in HOOKS if name != "errorhandler"), *SERVING_HOOKS],
)
def test_an_application_whose_hook_would_be_ignored_does_not_start(
    settings: Settings, register: Callable[[Any], Any]
) -> None:
    app = make_app(settings)
    app.refuse_hooks()
    register(app)
    with pytest.raises(IgnoredHook):
        app.refuse_hooks()


def test_an_application_that_somebody_listens_to_does_not_start(settings: Settings) -> None:
    app = make_app(settings)
    with signals.request_started.connected_to(hook, app), pytest.raises(IgnoredHook):
        app.refuse_hooks()
    app.refuse_hooks()


def test_an_application_keeps_its_own_error_handlers(settings: Settings) -> None:
    routes = Blueprint("guarded", __name__)
    routes.app_errorhandler(418)(hook)
    make_app(settings).register_blueprint(routes)
