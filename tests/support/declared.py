"""The endpoints as they are declared, without what they use: enough to list them."""

from typing import Any

from authd.assembly.app import make_endpoints
from authd.config import parse_settings
from authd.infra.http.endpoint import Endpoint

ISSUER = "https://auth.example.com/"


class _Unused:
    def __getattr__(self, name: str) -> Any:
        return self


def declared_endpoints(**settings: str) -> list[Endpoint]:
    """Return the endpoints at `AUTHD_BIND`."""
    required = {"AUTHD_DATABASE_URL": "postgresql://x", "AUTHD_REDIS_URL": "redis://x", "AUTHD_SECRET": "s" * 32}
    services: Any = _Unused()
    services.settings = parse_settings(required | {"AUTHD_ISSUER": ISSUER} | settings)
    return make_endpoints(services)
