"""Settings of a deployment of the test's own, over stores that it shares with others."""

import secrets
from typing import Any

from authd.config import Secret, Settings


def settings_over(database_url: str, redis_url: str, **fields: Any) -> Settings:
    """Return settings with a new deployment's name, and with these fields."""
    required = {"database_url": Secret(database_url), "redis_url": Secret(redis_url), "secret": Secret("s" * 32)}
    chosen: dict[str, Any] = required | {"deployment": f"t-{secrets.token_hex(8)}"} | fields
    return Settings(**chosen)
