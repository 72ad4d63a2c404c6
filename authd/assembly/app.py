"""The HTTP apps of one replica. Quart is imported from here on, and nowhere below."""

from authd.assembly.services import Services
from authd.infra.http.app import App
from authd.infra.http.openapi import make_openapi
from authd.infra.observe.http import make_inner_operations, make_operations
from authd.login.http import make_credentials
from authd.oauth.http import make_oauth


def build_app(services: Services) -> App:
    """Return the app at `AUTHD_BIND`."""
    settings = services.settings
    return App(
        settings,
        [
            make_credentials(settings, services.accounts, services.sessions),
            make_oauth(settings, services.clients, services.token_desk),
            make_operations(settings, services.health, services.ring),
            make_openapi(settings),
        ],
    )


def build_operations_app(services: Services) -> App:
    """Return the app at `AUTHD_OPERATIONS_BIND`."""
    return App(services.settings, [make_inner_operations(services.health)])
