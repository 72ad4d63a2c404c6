from collections.abc import Callable

import pytest

from authd.config import Settings, parse_settings

#: What a start needs at least.
REQUIRED = {
    "AUTHD_DATABASE_URL": "postgresql://authd:store-password@127.0.0.1/authd",
    "AUTHD_REDIS_URL": "redis://:store-password@127.0.0.1",
    "AUTHD_SECRET": "the-master-secret-of-these-tests-",
}


@pytest.fixture(scope="session")
def required() -> dict[str, str]:
    return dict(REQUIRED)


@pytest.fixture(scope="session")
def make_settings() -> Callable[..., Settings]:
    """Settings from field names: `make_settings(access_ttl_s=60)`."""

    def make(**fields: object) -> Settings:
        return parse_settings(REQUIRED | {f"AUTHD_{name.upper()}": str(value) for name, value in fields.items()})

    return make
