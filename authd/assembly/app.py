"""The HTTP apps of one replica. Quart is imported from here on, and nowhere below."""

from authd.accounts.http import make_account_endpoints
from authd.assembly.services import Services
from authd.infra.http.app import App, AppSettings
from authd.infra.http.endpoint import Endpoint
from authd.infra.http.openapi import make_openapi_endpoints
from authd.infra.http.operations import make_operation_endpoints, make_probe_endpoints
from authd.login.http import make_login_endpoints
from authd.oauth.http import make_oauth_endpoints
from authd.sessions.http import make_session_endpoints
from authd.tokens.http import make_key_endpoints
from authd.users.http import make_user_endpoints


def build_app(services: Services) -> App:
    """Return the app at `AUTHD_BIND`."""
    return App(services.settings.section(AppSettings), make_endpoints(services))


def build_operations_app(services: Services) -> App:
    """Return the app at `AUTHD_OPERATIONS_BIND`."""
    return App(services.settings.section(AppSettings), make_operation_endpoints(services.health))


def make_endpoints(services: Services) -> list[Endpoint]:
    """Return what is served at `AUTHD_BIND`: with `AUTHD_OPERATIONS_BIND` nothing of it is for operators alone."""
    settings, health = services.settings, services.health
    endpoints = [
        *make_account_endpoints(settings, services.accounts),
        *make_login_endpoints(settings, services.logins),
        *make_session_endpoints(settings, services.sessions),
        *make_user_endpoints(services.profiles),
        *make_oauth_endpoints(settings, services.clients, services.token_desk),
        *make_key_endpoints(settings, services.ring),
        *(make_probe_endpoints(health) if settings.operations_bind else make_operation_endpoints(health)),
    ]
    return [*endpoints, *make_openapi_endpoints(settings.issuer, endpoints)]
